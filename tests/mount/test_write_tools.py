"""Real programs through a real mount; what became of the mail is then read over a connection of its own."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.support.mail import plain
from tests.support.mailboxes import Held, all_uids, everything, file_of, held, in_order, mailboxes, settle
from tests.support.mounting import DEADLINE, Mount, Mounter
from tests.support.servers.dovecot import Account

DATE = 1_700_000_000
LATER = 1_750_000_000
SEEN = frozenset({"\\Seen"})
MARKED = frozenset({"\\Seen", "\\Flagged"})


def run(*command: str | Path, stdin: bytes = b"", code: int = 0, cwd: Path | None = None) -> str:
    """Run a program, which must exit with ``code``; returns what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE * 2,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm"},
    )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == code, f"exit code {done.returncode}: {said}"
    return said


def shell(script: str, *arguments: str | Path) -> None:
    """Run a shell script; its arguments are ``$1`` and so on."""
    run("sh", "-euc", script, "sh", *arguments)


def files(directory: Path, messages: Iterable[bytes], *, mtime: int = LATER) -> Path:
    """Return ``directory``, made with the files ``0.eml``, ``1.eml`` and so on."""
    directory.mkdir(exist_ok=True)
    for number, content in enumerate(messages):
        path = directory / f"{number}.eml"
        path.write_bytes(content)
        os.utime(path, (mtime, mtime))
    return directory


def lf(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")


@pytest.fixture
def mounted(user: Account, mount: Mounter) -> Mount:
    """Mount an account with three messages in INBOX and one in Work."""
    user.deliver("INBOX", [(plain(n), DATE + n, "FS") for n in (1, 2, 3)])
    user.deliver("Work", [(plain(4), DATE + 4, "S")])
    return mount(user)


def inbox(*numbers: int) -> list[Held]:
    """What `mounted` has put into INBOX."""
    return in_order(*(Held(plain(n), DATE + n, MARKED) for n in numbers))


WORK = Held(plain(4), DATE + 4, SEEN)


# ---- mv


def test_mv_within_a_mailbox_changes_nothing_on_the_server(user: Account, mounted: Mount) -> None:
    before = all_uids(user)
    run("mv", file_of(mounted, 1), mounted.path / "INBOX" / "my own name.eml")
    assert (mounted.path / "INBOX" / "my own name.eml").read_bytes() == plain(1)
    assert len(os.listdir(mounted.path / "INBOX")) == 3
    mounted.unmount()
    assert all_uids(user) == before
    assert everything(user) == {"INBOX": inbox(1, 2, 3), "Work": [WORK]}


def test_mv_moves_a_message_with_its_flags_and_its_date(user: Account, mounted: Mount) -> None:
    run("mv", file_of(mounted, 1), mounted.path / "Work")
    mounted.unmount()
    assert everything(user) == {"INBOX": inbox(2, 3), "Work": in_order(WORK, *inbox(1))}


def test_mv_of_many_at_once(user: Account, mounted: Mount) -> None:
    shell('mv "$1"/* "$2"', mounted.path / "INBOX", mounted.path / "Work")
    assert os.listdir(mounted.path / "INBOX") == []
    mounted.unmount()
    assert everything(user) == {"Work": in_order(WORK, *inbox(1, 2, 3))}


@pytest.mark.parametrize("target", ["INBOX", "Work"])
def test_mv_over_a_message_deletes_that_one(user: Account, mounted: Mount, target: str) -> None:
    existing = file_of(mounted, 2) if target == "INBOX" else file_of(mounted, 1, "Work")
    run("mv", file_of(mounted, 1), existing)
    assert existing.read_bytes() == plain(1)
    mounted.unmount()
    if target == "INBOX":
        assert everything(user) == {"INBOX": inbox(1, 3), "Work": [WORK], "Trash": inbox(2)}
    else:
        assert everything(user) == {"INBOX": inbox(2, 3), "Work": inbox(1), "Trash": [WORK]}


def test_mv_from_another_file_system_keeps_the_date(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "source", [plain(10), lf(plain(11))])
    shell('mv "$1"/*.eml "$2"', source, mounted.path / "Work")
    assert os.listdir(source) == []
    assert sorted(os.listdir(mounted.path / "Work"))[:2] == ["0.eml", "1.eml"]
    mounted.unmount()
    new = [Held(plain(10), LATER), Held(plain(11), LATER)]
    assert everything(user) == {"INBOX": inbox(1, 2, 3), "Work": in_order(WORK, *new)}


def test_mv_to_another_file_system_deletes_the_message(user: Account, mounted: Mount, tmp_path: Path) -> None:
    run("mv", file_of(mounted, 1), tmp_path / "kept.eml")
    assert (tmp_path / "kept.eml").read_bytes() == plain(1)
    assert (tmp_path / "kept.eml").stat().st_mtime == DATE + 1
    mounted.unmount()
    assert everything(user) == {"INBOX": inbox(2, 3), "Work": [WORK], "Trash": inbox(1)}


def test_mv_renames_a_mailbox_with_its_messages(user: Account, mounted: Mount) -> None:
    run("mv", mounted.path / "Work", mounted.path / "Play")
    assert file_of(mounted, 1, "Play").read_bytes() == plain(4)
    mounted.unmount()
    assert everything(user) == {"INBOX": inbox(1, 2, 3), "Play": [WORK]}


# ---- cp


def test_cp_of_a_new_file(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "source", [lf(plain(10))]) / "0.eml"
    earliest = int(time.time())
    run("cp", source, mounted.path / "Work" / "new.eml")
    assert (mounted.path / "Work" / "new.eml").exists()
    mounted.unmount()
    (new,) = [message for message in held(user, "Work").values() if message != WORK]
    assert new.content == plain(10)
    assert new.flags == frozenset()
    assert earliest <= new.date <= time.time()


@pytest.mark.parametrize("option", ["-a", "-p"])
def test_cp_that_preserves_keeps_date_and_mode(
    user: Account, mounted: Mount, tmp_path: Path, option: str
) -> None:
    source = files(tmp_path / "source", [plain(10)]) / "0.eml"
    source.chmod(0o640)
    copy = mounted.path / "Work" / "new.eml"
    run("cp", option, source, copy)
    settle(mounted)
    assert (copy.stat().st_mtime, copy.stat().st_mode & 0o777) == (LATER, 0o640)
    mounted.unmount()
    assert everything(user)["Work"] == in_order(WORK, Held(plain(10), LATER))


def test_cp_a_of_a_directory_makes_mailboxes(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "Project", [plain(10), plain(11)])
    files(source / "Sub", [plain(12)])
    run("cp", "-a", source, mounted.path)
    mounted.unmount()
    assert everything(user) == {
        "INBOX": inbox(1, 2, 3),
        "Work": [WORK],
        "Project": in_order(Held(plain(10), LATER), Held(plain(11), LATER)),
        "Project/Sub": [Held(plain(12), LATER)],
    }


def test_cp_of_a_message_is_a_second_message(user: Account, mounted: Mount) -> None:
    run("cp", "-p", file_of(mounted, 1), mounted.path / "Work" / "copy.eml")
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == inbox(1, 2, 3)
    assert [(m.content, m.date) for m in after["Work"] if m != WORK] == [(plain(1), DATE + 1)]


def test_cp_over_a_message_replaces_it(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "source", [plain(10)]) / "0.eml"
    target = file_of(mounted, 1)
    inode = target.stat().st_ino
    run("cp", source, target)
    settle(mounted)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == plain(10)
    mounted.unmount()
    assert everything(user) == {
        "INBOX": in_order(Held(plain(10), DATE + 1, MARKED), *inbox(2, 3)),
        "Work": [WORK],
        "Trash": inbox(1),
    }


def test_cp_of_a_message_out_is_exact(mounted: Mount, tmp_path: Path) -> None:
    run("cp", "-a", mounted.path / "INBOX", tmp_path / "out")
    out = sorted((tmp_path / "out").iterdir())
    assert sorted(path.read_bytes() for path in out) == sorted(plain(n) for n in (1, 2, 3))
    assert {path.stat().st_mtime for path in out} == {DATE + 1, DATE + 2, DATE + 3}


# ---- rm


def test_rm_puts_messages_into_trash_and_from_there_they_are_gone(user: Account, mounted: Mount) -> None:
    run("rm", file_of(mounted, 1), file_of(mounted, 2))
    assert len(os.listdir(mounted.path / "Trash")) == 2
    shell('rm "$1"/*', mounted.path / "Trash")
    assert os.listdir(mounted.path / "Trash") == []
    mounted.unmount()
    assert everything(user) == {"INBOX": inbox(3), "Work": [WORK]}


def test_rm_r_deletes_a_mailbox_after_what_is_in_it(user: Account, mounted: Mount) -> None:
    run("mkdir", "-p", mounted.path / "Work" / "Sub")
    run("cp", "-p", file_of(mounted, 1), mounted.path / "Work" / "Sub" / "one.eml")
    run("touch", mounted.path / "Work" / "Sub" / "scratch")
    run("rm", "-r", mounted.path / "Work")
    mounted.unmount()
    assert not [name for name in mailboxes(user) if name.startswith("Work")]
    after = everything(user)
    assert after["INBOX"] == inbox(1, 2, 3)
    # The copy is in Trash, or was not sent before it was deleted.
    assert WORK in after["Trash"] and len(after["Trash"]) <= 2


# ---- rsync


@pytest.mark.parametrize("ends", ["CRLF", "LF"])
def test_rsync_in_and_again(user: Account, mounted: Mount, tmp_path: Path, ends: str) -> None:
    messages = [plain(n) if ends == "CRLF" else lf(plain(n)) for n in range(10, 15)]
    source = files(tmp_path / "source", messages)
    run("rsync", "-a", f"{source}/", mounted.path / "New")
    settle(mounted)
    before = all_uids(user)
    said = run("rsync", "-a", "--itemize-changes", f"{source}/", mounted.path / "New")
    if ends == "CRLF":
        assert ".eml" not in said
    mounted.unmount()
    assert all_uids(user) == before
    assert everything(user) == {
        "INBOX": inbox(1, 2, 3),
        "Work": [WORK],
        "New": in_order(*(Held(plain(n), LATER) for n in range(10, 15))),
    }


def test_rsync_settles_while_the_first_files_are_on_their_way(
    user: Account, mounted: Mount, tmp_path: Path
) -> None:
    source = files(tmp_path / "source", [plain(n) for n in range(10, 30)])
    for _ in range(3):
        run("rsync", "-a", f"{source}/", mounted.path / "New")
    mounted.unmount()
    assert everything(user)["New"] == in_order(*(Held(plain(n), LATER) for n in range(10, 30)))


def test_rsync_out_and_again(user: Account, mounted: Mount, tmp_path: Path) -> None:
    before = all_uids(user)
    run("ls", "-R", mounted.path)  # the first listing of a mailbox changes its directory
    run("rsync", "-a", f"{mounted.path}/", tmp_path / "out")
    assert run("rsync", "-a", "--itemize-changes", f"{mounted.path}/", tmp_path / "out") == ""
    copied = [path.read_bytes() for path in (tmp_path / "out" / "INBOX").iterdir()]
    assert sorted(copied) == sorted(plain(n) for n in (1, 2, 3))
    mounted.unmount()
    assert all_uids(user) == before


def test_rsync_delete(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "source", [plain(n) for n in (10, 11, 12)])
    run("rsync", "-a", f"{source}/", mounted.path / "New")
    settle(mounted)
    (source / "1.eml").unlink()
    run("rsync", "-a", "--delete", f"{source}/", mounted.path / "New")
    mounted.unmount()
    after = everything(user)
    assert after["New"] == in_order(Held(plain(10), LATER), Held(plain(12), LATER))
    assert after["Trash"] == [Held(plain(11), LATER)]


@pytest.mark.parametrize("options", [["--inplace"], ["--inplace", "--no-whole-file"]])
def test_rsync_inplace(user: Account, mounted: Mount, tmp_path: Path, options: Sequence[str]) -> None:
    source = files(tmp_path / "source", [plain(10), plain(11)])
    run("rsync", "-a", *options, f"{source}/", mounted.path / "New")
    settle(mounted)
    (source / "1.eml").write_bytes(plain(11) + b"one more line\r\n")
    os.utime(source / "1.eml", (LATER + 7, LATER + 7))
    run("rsync", "-a", *options, f"{source}/", mounted.path / "New")
    settle(mounted)
    before = all_uids(user)
    run("rsync", "-a", *options, f"{source}/", mounted.path / "New")
    mounted.unmount()
    assert all_uids(user) == before
    after = everything(user)
    assert after["New"] == in_order(Held(plain(10), LATER), Held(plain(11) + b"one more line\r\n", LATER + 7))
    assert after["Trash"] == [Held(plain(11), LATER)]


def test_rsync_delay_updates(user: Account, mounted: Mount, tmp_path: Path) -> None:
    """It puts files into a directory of its own first: it transferred nothing, and its exit code was 0."""
    source = files(tmp_path / "source", [plain(10), plain(11)])
    command = "rsync", "-a", "--delay-updates", f"{source}/", mounted.path / "New"
    run(*command)
    settle(mounted)
    assert everything(user)["New"] == in_order(Held(plain(10), LATER), Held(plain(11), LATER))
    (source / "1.eml").write_bytes(plain(12))
    os.utime(source / "1.eml", (LATER + 7, LATER + 7))
    run(*command)
    settle(mounted)
    before = all_uids(user)
    run(*command)
    assert {name for name in os.listdir(mounted.path / "New") if not name.endswith(".eml")} == set()
    assert mounted.status()["scratch"] == []
    mounted.unmount()
    assert all_uids(user) == before
    after = everything(user)
    assert after["New"] == in_order(Held(plain(10), LATER), Held(plain(12), LATER + 7))
    assert after["Trash"] == [Held(plain(11), LATER)]


def test_what_is_left_in_a_scratch_directory_is_named(mounted: Mount) -> None:
    """A program that was interrupted leaves mail there that is on no server."""
    (mounted.path / "Work" / ".~tmp~").mkdir()
    (mounted.path / "Work" / ".~tmp~" / "left.eml").write_bytes(plain(9))
    assert mounted.status()["scratch"] == [{"path": "Work/.~tmp~/left.eml", "size": len(plain(9))}]
    said = subprocess.run(
        [sys.executable, "-m", "imapfs", "umount", mounted.path],
        env=mounted.environment, capture_output=True, text=True, check=True, timeout=DEADLINE,
    ).stdout  # fmt: skip
    assert said.splitlines() == ["Work/.~tmp~/left.eml: in a scratch directory, and so on this computer only"]


# ---- tar


def test_tar_in_and_out(user: Account, mounted: Mount, tmp_path: Path) -> None:
    files(tmp_path / "Project", [plain(10), lf(plain(11))])
    run("tar", "-C", tmp_path, "-cf", tmp_path / "in.tar", "Project")
    run("tar", "-C", mounted.path, "-xf", tmp_path / "in.tar", "--no-same-owner")
    settle(mounted)
    assert everything(user)["Project"] == in_order(Held(plain(10), LATER), Held(plain(11), LATER))
    run("tar", "-C", mounted.path, "-cf", tmp_path / "out.tar", "Project")
    (tmp_path / "out").mkdir()
    run("tar", "-C", tmp_path / "out", "-xf", tmp_path / "out.tar")
    assert (tmp_path / "out" / "Project" / "1.eml").read_bytes() == plain(11)
    assert (tmp_path / "out" / "Project" / "1.eml").stat().st_mtime == LATER
    mounted.unmount()
    assert everything(user)["Project"] == in_order(Held(plain(10), LATER), Held(plain(11), LATER))


# ---- what changes one file


ADDED = b"X-Note: changed\r\n"


@pytest.mark.parametrize(
    "script",
    [
        """sed -i '1s/^/X-Note: changed\\r\\n/' "$1" """,
        """perl -i -pe 'print "X-Note: changed\\r\\n" if $. == 1' "$1" """,
        """printf '0a\\nX-Note: changed\\r\\n.\\nw\\nq\\n' | ed -s "$1" >&2""",
        """{ printf 'X-Note: changed\\r\\n'; cat "$1"; } > "$1.new"; mv "$1.new" "$1" """,
        """{ printf 'X-Note: changed\\r\\n'; cat "$1"; } > "$2"; cat "$2" > "$1" """,
        """{ printf 'X-Note: changed\\r\\n'; cat "$1"; } > "$2"; dd if="$2" of="$1" bs=512 status=none""",
        """{ printf 'X-Note: changed\\n'; tr -d '\\r' < "$1"; } > "$2"; cp "$2" "$1" """,
    ],
    ids=["sed -i", "perl -i", "ed", "mv over", "redirect", "dd", "cp of LF"],
)
def test_a_line_added_at_the_start(user: Account, mounted: Mount, tmp_path: Path, script: str) -> None:
    target = file_of(mounted, 1)
    shell(script, target, tmp_path / "scratch")
    assert target.exists()
    assert len(os.listdir(mounted.path / "INBOX")) == 3
    mounted.unmount()
    after = everything(user)
    changed = [message for message in after["INBOX"] if message not in inbox(2, 3)]
    assert [message.content for message in changed] == [ADDED + plain(1)]
    assert changed[0].flags == MARKED
    assert len(after["INBOX"]) == 3
    assert after["Trash"] == inbox(1)
    assert after["Work"] == [WORK]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("""printf 'more\\r\\n' >> "$1" """, plain(1) + b"more\r\n"),
        ("""echo more >> "$1"; echo even more >> "$1" """, plain(1) + b"more\r\neven more\r\n"),
        ("""{ echo more; echo even more; } >> "$1" """, plain(1) + b"more\r\neven more\r\n"),
        ("""truncate -s 1500 "$1" """, plain(1)[:1500]),
        ("""truncate -s 1501 "$1"; truncate -s 1500 "$1" """, plain(1)[:1500]),
        ("""printf XYZ | dd of="$1" bs=1 seek=1000 conv=notrunc status=none""",
         plain(1)[:1000] + b"XYZ" + plain(1)[1003:]),
        ("""{ printf 'A: b\\n\\n'; echo c; } > "$1" """, b"A: b\r\n\r\nc\r\n"),
        ("""echo 'A: b' > "$1"; echo >> "$1" """, b"A: b\r\n\r\n"),
        ("""printf 'A: b\\n\\n' | tee "$1" > /dev/null""", b"A: b\r\n\r\n"),
    ],
    ids=[
        ">>", ">> twice", "{} >>", "truncate", "truncate twice", "dd notrunc", "{ a; b; } >", "> and >>",
        "tee",
    ],
)  # fmt: skip
def test_a_message_written_in_place(user: Account, mounted: Mount, script: str, expected: bytes) -> None:
    target = file_of(mounted, 1)
    inode = target.stat().st_ino
    shell(script, target)
    settle(mounted)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == expected
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == in_order(Held(expected, DATE + 1, MARKED), *inbox(2, 3))
    assert inbox(1)[0] in after["Trash"]
    assert after["Work"] == [WORK]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("""{ echo 'A: b'; echo; echo c; } > "$1" """, b"A: b\r\n\r\nc\r\n"),
        ("""echo 'A: b' > "$1" """, b"A: b\r\n"),
        ("""cat > "$1" <<'END'\nA: b\n\nc\nEND\n""", b"A: b\r\n\r\nc\r\n"),
        ("""exec 3> "$1"; echo 'A: b' >&3; echo >&3; (echo c >&3); exec 3>&-""", b"A: b\r\n\r\nc\r\n"),
    ],
)
def test_a_new_message_written_by_the_shell(
    user: Account, mounted: Mount, script: str, expected: bytes
) -> None:
    shell(script, mounted.path / "Work" / "new.eml")
    assert sorted(os.listdir(mounted.path / "Work"))[-1] == "new.eml"
    mounted.unmount()
    assert [message.content for message in everything(user)["Work"] if message != WORK] == [expected]


def test_install_over_a_message_makes_a_new_one_as_it_unlinks_first(
    user: Account, mounted: Mount, tmp_path: Path
) -> None:
    source = files(tmp_path / "source", [plain(10)]) / "0.eml"
    run("install", "-p", "-m", "600", source, file_of(mounted, 1))
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == in_order(Held(plain(10), LATER), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


def test_touch_of_a_message_changes_its_time_here_only(user: Account, mounted: Mount) -> None:
    before = all_uids(user)
    target = file_of(mounted, 1)
    run("touch", "-d", f"@{LATER}", target)
    assert target.stat().st_mtime == LATER
    earliest = time.time() - 1
    run("touch", target)
    assert target.stat().st_mtime >= earliest
    mounted.unmount()
    assert all_uids(user) == before
    assert everything(user) == {"INBOX": inbox(1, 2, 3), "Work": [WORK]}


def test_touch_of_a_new_name_makes_an_empty_file_that_is_not_sent(user: Account, mounted: Mount) -> None:
    before = all_uids(user)
    target = mounted.path / "Work" / "new.eml"
    run("touch", target)
    settle(mounted)
    assert target.stat().st_size == 0
    assert all_uids(user) == before
    shell("""printf 'A: b\\n\\n' > "$1" """, target)
    mounted.unmount()
    assert [message.content for message in everything(user)["Work"] if message != WORK] == [b"A: b\r\n\r\n"]


def test_chmod_of_a_message_is_kept_here(user: Account, mounted: Mount) -> None:
    before = all_uids(user)
    run("chmod", "640", file_of(mounted, 1))
    assert file_of(mounted, 1).stat().st_mode & 0o777 == 0o640
    mounted.unmount()
    assert all_uids(user) == before


# ---- gio


def test_gio_copy(user: Account, mounted: Mount, tmp_path: Path) -> None:
    source = files(tmp_path / "source", [plain(10)]) / "0.eml"
    run("gio", "copy", "--preserve", source, mounted.path / "Work" / "new.eml")
    settle(mounted)
    run("gio", "copy", mounted.path / "Work" / "new.eml", tmp_path / "back.eml")
    assert (tmp_path / "back.eml").read_bytes() == plain(10)
    mounted.unmount()
    assert everything(user)["Work"] == in_order(WORK, Held(plain(10), LATER))


def test_gio_save_over_a_message(user: Account, mounted: Mount) -> None:
    target = file_of(mounted, 1)
    run("gio", "save", target, stdin=plain(10))
    settle(mounted)
    assert target.read_bytes() == plain(10)
    assert len(os.listdir(mounted.path / "INBOX")) == 3
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == in_order(Held(plain(10), DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)


def test_gio_save_of_a_new_message(user: Account, mounted: Mount) -> None:
    run("gio", "save", mounted.path / "Work" / "new.eml", stdin=plain(10))
    mounted.unmount()
    assert sorted(m.content for m in everything(user)["Work"]) == sorted([plain(4), plain(10)])


@pytest.mark.parametrize("target", ["Work/moved.eml", "INBOX/renamed.eml"])
def test_gio_move(user: Account, mounted: Mount, target: str) -> None:
    run("gio", "move", file_of(mounted, 1), mounted.path / target)
    assert (mounted.path / target).read_bytes() == plain(1)
    mounted.unmount()
    if target.startswith("Work"):
        assert everything(user) == {"INBOX": inbox(2, 3), "Work": in_order(WORK, *inbox(1))}
    else:
        assert everything(user) == {"INBOX": inbox(1, 2, 3), "Work": [WORK]}


def test_gio_trash_makes_no_mailbox_and_gio_remove_unlinks(user: Account, mounted: Mount) -> None:
    before = mailboxes(user)
    target = file_of(mounted, 1)
    run("gio", "trash", target, code=1)
    assert target.exists()
    run("gio", "remove", target)
    mounted.unmount()
    assert mailboxes(user) == before
    assert everything(user) == {"INBOX": inbox(2, 3), "Work": [WORK], "Trash": inbox(1)}


# ---- editors


def vim(target: Path, *options: str) -> None:
    settings = [word for option in options for word in ("-c", f"set {option}")]
    # /tmp is where vim keeps no backups by default.
    run(
        "vim", "-u", "NONE", "-i", "NONE", "-N", "--not-a-term", "-c", "set backupskip=", *settings,
        "-c", "1s/^/X-Note: changed\\r/", "-c", "wq", target,
    )  # fmt: skip


def emacs(target: Path, settings: str) -> None:
    program = f"""(progn (setq create-lockfiles t backup-enable-predicate (lambda (_) t)) {settings}
        (find-file (pop command-line-args-left)) (goto-char (point-min)) (insert "X-Note: changed\\n")
        (save-buffer) (kill-emacs 0))"""
    run("emacs", "-Q", "--batch", "--eval", program, target)


def nano(target: Path, *options: str) -> None:
    """At a terminal, as there is no other way."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", LC_ALL="C.UTF-8")
        os.execvp("nano", ["nano", "-I", *options, str(target)])
    try:
        _wait_for(terminal, b"Exit")
        os.write(terminal, b"X-Note: changed\r\x0f")
        _wait_for(terminal, b"File Name to Write")
        os.write(terminal, b"\r")
        _wait_for(terminal, b"Wrote ")
        os.write(terminal, b"\x18")
        _wait_for(terminal, None)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def _wait_for(terminal: int, text: bytes | None) -> None:
    """Read what is shown until it has ``text``; None for the end of the program."""
    shown = b""
    deadline = time.monotonic() + DEADLINE
    while text is None or text not in shown:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            assert text is None, shown
            return


def check_edited(user: Account, mounted: Mount, target: Path, *, backup: bool) -> None:
    """Exactly one message, the edited one, under its old name; what was there is in Trash."""
    settle(mounted)
    assert target.read_bytes() == ADDED + plain(1)
    kept = Path(f"{target}~")
    assert kept.exists() == backup
    if backup:
        assert kept.read_bytes() == plain(1)
    assert len(os.listdir(target.parent)) == 3 + backup
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == in_order(Held(ADDED + plain(1), DATE + 1, MARKED), *inbox(2, 3))
    assert after["Trash"] == inbox(1)
    assert after["Work"] == [WORK]


@pytest.mark.parametrize("copy", ["yes", "no", "auto"])
@pytest.mark.parametrize("keep", ["nobackup writebackup", "backup", "nobackup nowritebackup"])
def test_vim(user: Account, mounted: Mount, keep: str, copy: str) -> None:
    target = file_of(mounted, 1)
    vim(target, keep, f"backupcopy={copy}")
    check_edited(user, mounted, target, backup=keep == "backup")


@pytest.mark.parametrize(
    "settings",
    [
        "(setq make-backup-files t)",
        "(setq make-backup-files nil)",
        "(setq make-backup-files t backup-by-copying t)",
        "(setq make-backup-files nil file-precious-flag t)",
    ],
    ids=["backup by renaming", "no backup", "backup by copying", "precious"],
)
def test_emacs(user: Account, mounted: Mount, settings: str) -> None:
    target = file_of(mounted, 1)
    emacs(target, settings)
    check_edited(user, mounted, target, backup="make-backup-files t" in settings)


@pytest.mark.parametrize("options", [[], ["-B"]], ids=["no backup", "backup"])
def test_nano(user: Account, mounted: Mount, options: Sequence[str]) -> None:
    target = file_of(mounted, 1)
    nano(target, *options)
    check_edited(user, mounted, target, backup=bool(options))


def test_an_editor_that_saves_twice_leaves_one_message(user: Account, mounted: Mount) -> None:
    target = file_of(mounted, 1)
    vim(target, "backup", "backupcopy=no")
    vim(target, "backup", "backupcopy=no")
    settle(mounted)
    assert target.read_bytes() == ADDED * 2 + plain(1)
    mounted.unmount()
    after = everything(user)
    assert after["INBOX"] == in_order(Held(ADDED * 2 + plain(1), DATE + 1, MARKED), *inbox(2, 3))
    assert inbox(1)[0] in after["Trash"]


def test_an_editor_that_makes_a_new_message(user: Account, mounted: Mount) -> None:
    target = mounted.path / "Work" / "new.eml"
    run("vim", "-u", "NONE", "-i", "NONE", "-N", "--not-a-term", "-c", "normal iA: b", "-c", "wq", target)
    mounted.unmount()
    assert sorted(m.content for m in everything(user)["Work"]) == sorted([plain(4), b"A: b\r\n"])


def test_attributes_go_with_copies_by_rsync_and_tar(user: Account, mounted: Mount, tmp_path: Path) -> None:
    shell("mkdir $1/A $1/B; ls $1/INBOX; setfattr -n user.xdg.tags -v work $1/INBOX/*.1.eml", mounted.path)
    shell(
        "rsync -aX $1/INBOX/ $1/A/ && rsync -aX $1/INBOX/ $2/ && rsync -aX $1/INBOX/ $1/A/",
        mounted.path,
        tmp_path,
    )
    shell(
        "tar -C $1/INBOX --xattrs -cf $2/x.tar . && tar -C $1/B --xattrs -xf $2/x.tar", mounted.path, tmp_path
    )
    run(sys.executable, "-m", "imapfs", "sync", mounted.path)
    found = everything(user)
    expected = sorted((message.content, frozenset(message.flags)) for message in found["INBOX"])
    assert len(expected) == 3
    for copy in ("A", "B"):
        assert sorted((one.content, frozenset(one.flags)) for one in found[copy]) == expected
