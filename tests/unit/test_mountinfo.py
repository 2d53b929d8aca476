"""Other users have a part in the list of mounts: it is read line by line, whatever is in it."""

from pathlib import Path

from imapfs.mountinfo import Mount, parse

OURS = rb"36 35 0:40 / /home/alice/mail rw,nosuid - fuse.imapfs imaps://alice@host rw"
STRANGE = [
    b"37 35 0:41 / /tmp/cr\rdir rw,nosuid - fuse.sshfs host: rw",
    b"38 35 0:42 / /tmp/ff\x0c\x0b\x1c\x85dir rw - fuse.x \xff\xfe rw",
    rb"39 35 0:43 / /tmp/\777\040x rw - fuse.y z rw",
    b"40 35",
    b"",
    b" - ",
    b"41 35 0:44 / /tmp/x rw - ",
    b"x" * 100_000,
]


def test_a_strange_line_hides_no_other() -> None:
    ours = Mount(Path("/home/alice/mail"), "fuse.imapfs", "imaps://alice@host")
    for line in STRANGE:
        found = parse(b"\n".join([line, OURS, line, b""]))
        assert found.count(ours) == 1
    assert Mount(Path("/tmp/cr\rdir"), "fuse.sshfs", "host:") in parse(b"\n".join(STRANGE))
