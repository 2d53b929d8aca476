"""Events reach each listener once, and not at all where the kernel reports the change."""

import contextlib

from imapfs.fs.events import Event, EventStream, Place
from imapfs.model import Ino, Uid

DATE = 1_700_000_000


def event(number: int) -> Event:
    return Event("arrived", Place(Ino(2), (b"INBOX",), b"%d.eml" % number), Ino(number), Uid(number), "")


# -- whose change it was


def test_change_by_a_request_is_reported_only_if_the_request_fails() -> None:
    stream, seen = EventStream(), list[Event]()
    stream.subscribe(seen.append)
    with stream.request((Ino(2), b"1.eml")):
        stream.publish(event(1))
        stream.publish(event(2))
    assert seen == [event(2)]
    with contextlib.suppress(FileNotFoundError), stream.request((Ino(2), b"1.eml")):
        stream.publish(event(1))
        raise FileNotFoundError
    assert seen == [event(2), event(1)]
    stream.publish(event(1))
    assert len(seen) == 3


def test_change_of_flags_by_a_request_is_about_the_inode() -> None:
    stream, seen = EventStream(), list[Event]()
    stream.subscribe(seen.append)
    flags = Event("flags", event(1).place, Ino(1), Uid(1), "\\Seen")
    with stream.request(Ino(1)):
        stream.publish(flags)
        stream.publish(event(1))
    assert seen == [event(1)]


def test_each_listener_is_told() -> None:
    stream, first, second = EventStream(), list[Event](), list[Event]()
    stream.subscribe(first.append)
    stream.publish(event(1))
    stream.subscribe(second.append)
    stream.publish(event(2))
    assert (first, second) == ([event(1), event(2)], [event(2)])


def test_json_has_the_keys_of_the_kind() -> None:
    assert event(1).as_json() == {
        "event": "arrived", "path": "INBOX/1.eml", "inode": 1, "uid": 1, "flags": []
    }  # fmt: skip
    source = Place(Ino(2), (), b"Old")
    renamed = Event("renamed", Place(Ino(2), (), b"New"), Ino(3), source=source)
    assert renamed.as_json() == {"event": "renamed", "path": "New", "inode": 3, "from": "Old"}
