"""The rows of the benchmark. To add one: a function that yields a `Sample` a repetition, under ``@row``.

A row takes its turns with its peer within one repetition, so that a busy moment of the machine hits both.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from scripts.benchmark.bench import MAILBOX, Bench
from scripts.benchmark.results import RowFailed, Sample, row

_MIB = 1 << 20
_FIRST_ENTRY = "import os, sys; next(os.scandir(sys.argv[1]))"
_BIG = 50 * _MIB
_FAST_ETHERNET = 100e6 / 8
"""Bytes a second of 100 Mbit/s."""

# ---- Never seen before


@row(
    "cold-ls",
    "cold ls -l, {messages} messages, {latency} ms",
    peer="IMAPClient fetching the same metadata on one connection",
    goal=0.8,
    limit="processor time of the daemon",
)
def cold_ls(bench: Bench) -> Iterator[Sample]:
    """``ls -l`` of a mailbox that the mount has never seen, against the bare fetch of the same data."""
    for _ in bench.repetitions():
        port = bench.at_a_distance()
        with bench.mounted(bench.archive, port) as mount:
            used = mount.used()
            ours = bench.ls(mount.mailbox, bench.settings.messages)
            used = mount.used() - used
        yield Sample(ours, bench.bare_metadata(bench.archive, port), used)


@row("first-entry", "first entry of {crowd} messages, {latency} ms", goal=1.0, unit="s")
def first_entry(bench: Bench) -> Iterator[Sample]:
    """How soon whoever lists a never-seen large mailbox has the first entry (with the start of Python)."""
    for _ in bench.repetitions():
        with bench.mounted(bench.crowd, bench.at_a_distance()) as mount:
            yield Sample(bench.time(sys.executable, "-ISc", _FIRST_ENTRY, mount.mailbox))


@row(
    "cold-grep",
    "cold grep -r, {messages} messages, {latency} ms",
    peer="mbsync's first sync, then grep",
    goal=0.5,
    limit="processor time of the daemon",
)
def cold_grep(bench: Bench) -> Iterator[Sample]:
    """``imapfs mount`` and ``grep -r``, the cache empty, against mbsync to an empty disk and ``grep -r``."""
    yield from _cold_grep(bench, bench.at_a_distance)


@row(
    "cold-grep-local",
    "cold grep -r, {messages} messages, no delay",
    peer="mbsync's first sync, then grep",
    goal=0.6,
    limit="processor time of the daemon",
)
def cold_grep_local(bench: Bench) -> Iterator[Sample]:
    """The same beside the server, where the network hides no work of either."""
    yield from _cold_grep(bench, lambda: bench.server.port)


def _cold_grep(bench: Bench, choose_port: Callable[[], int]) -> Iterator[Sample]:
    messages = bench.settings.messages
    for _ in bench.repetitions():
        port = choose_port()
        with bench.mounted(bench.archive, port) as mount:
            ours = mount.seconds + bench.grep(mount.mailbox, messages)
            used = mount.used()
        theirs = bench.first_mbsync(bench.archive, port, lambda mailbox: bench.grep(mailbox, messages))
        yield Sample(ours, theirs, used)


@row(
    "cold-rsync",
    "cold rsync -a out of the mount, {messages} messages, {latency} ms",
    peer="mbsync's first sync",
    goal=0.6,
    limit="processor time of the daemon",
)
def cold_rsync(bench: Bench) -> Iterator[Sample]:
    """``imapfs mount`` and ``rsync -a`` to an empty directory (in order of names), against mbsync to one."""
    for _ in bench.repetitions():
        port = bench.at_a_distance()
        out = bench.scratch()
        with bench.mounted(bench.archive, port) as mount:
            ours = mount.seconds + bench.time("rsync", "-a", f"{mount.mailbox}/", out)
            used = mount.used()
        if len(list(out.iterdir())) != bench.settings.messages:
            raise RowFailed("rsync did not copy every message")
        shutil.rmtree(out)
        yield Sample(ours, bench.first_mbsync(bench.archive, port), used)


# ---- Seen before


@row(
    "grep-again",
    "second grep -r, same mount",
    peer="grep -r in the Maildir",
    goal=9.0,
    limit="bare pyfuse3, whose handlers do nothing",
)
def grep_again(bench: Bench) -> Iterator[Sample]:
    """``grep -r`` of what was read before through the same mount, against the Maildir on the local disk."""
    yield from _grep_again(bench, "rw")


@row(
    "grep-again-ro",
    "second grep -r, same mount, --read-only",
    peer="grep -r in the Maildir",
    goal=4.0,
    limit="bare pyfuse3, whose handlers do nothing",
)
def grep_again_read_only(bench: Bench) -> Iterator[Sample]:
    """The same in a mount with ``--read-only``, where the kernel need not ask for every open file."""
    yield from _grep_again(bench, "ro", "--read-only")


def _grep_again(bench: Bench, mode: str, *options: str) -> Iterator[Sample]:
    messages = bench.settings.messages
    with bench.warm(*options) as mailbox, bench.bare(mode) as bare:
        for _ in bench.repetitions():
            yield Sample(*(bench.grep(path, messages) for path in (mailbox, bench.maildir, bare)))


@row("grep-bare", "second grep -r", peer="grep -r in bare pyfuse3, whose handlers do nothing", goal=1.3)
def grep_bare(bench: Bench) -> Iterator[Sample]:
    """The same files from a pyfuse3 that waits as imapfs does: all that is left are the handlers."""
    yield from _grep_beside(bench, bench.bare("rw"))


@row("grep-bindfs", "second grep -r", peer="grep -r in bindfs -o ro", goal=0.7)
def grep_bindfs(bench: Bench) -> Iterator[Sample]:
    """The same files by a file system in C that passes on another directory."""
    yield from _grep_beside(bench, bench.bindfs())


@row("grep-sshfs", "second grep -r", peer="grep -r in sshfs with its caches, from this machine", goal=0.35)
def grep_sshfs(bench: Bench) -> Iterator[Sample]:
    """The same files by sshfs: kernel_cache and caches that last an hour."""
    yield from _grep_beside(bench, bench.sshfs())


@row("grep-rclone", "second grep -r", peer="grep -r in rclone mount with its full cache", goal=0.1)
def grep_rclone(bench: Bench) -> Iterator[Sample]:
    """The same files by rclone mount: --vfs-cache-mode full."""
    yield from _grep_beside(bench, bench.rclone())


def _grep_beside(bench: Bench, peer: AbstractContextManager[Path]) -> Iterator[Sample]:
    messages = bench.settings.messages
    with bench.warm() as mailbox, peer as other:
        for _ in bench.repetitions():
            yield Sample(bench.grep(mailbox, messages), bench.grep(other, messages))


@row(
    "grep-remounted",
    "grep -r after a remount, bodies cached",
    peer="grep -r in the Maildir",
    goal=15.0,
    limit="processor time of the daemon",
)
def grep_remounted(bench: Bench) -> Iterator[Sample]:
    """``grep -r`` in a new mount with every body in the disk cache and nothing in the kernel's."""
    messages = bench.settings.messages
    for _ in bench.repetitions():
        cache = bench.warm_cache
        with bench.mounted(bench.archive, bench.at_a_distance(), cache=cache) as mount:
            used = mount.used()
            ours = bench.grep(mount.mailbox, messages)
            used = mount.used() - used
        yield Sample(ours, bench.grep(bench.maildir, messages), used)


@row(
    "ls-again",
    "warm ls -l",
    peer="ls -l of the Maildir",
    goal=1.5,
    limit="bare pyfuse3, whose handlers do nothing",
)
def ls_again(bench: Bench) -> Iterator[Sample]:
    """``ls -l`` of a mailbox that was listed before, against that of the Maildir's ``cur``."""
    messages = bench.settings.messages
    with bench.warm() as mailbox, bench.bare("rw") as bare:
        for _ in bench.repetitions():
            yield Sample(*(bench.ls(path, messages) for path in (mailbox, bench.maildir / "cur", bare)))


@row(
    "find-again",
    "warm find",
    peer="find in the Maildir",
    goal=2.0,
    limit="bare pyfuse3, whose handlers do nothing",
)
def find_again(bench: Bench) -> Iterator[Sample]:
    """``find`` by size, which needs the attributes of every message."""
    arguments = ("-type", "f", "-size", "+0")
    messages = bench.settings.messages
    with bench.warm() as mailbox, bench.bare("rw") as bare:
        for _ in bench.repetitions():
            paths = (mailbox, bench.maildir / "cur", bare)
            yield Sample(*(bench.time("find", path, *arguments, lines=messages) for path in paths))


@row("rsync-again", "warm rsync -a with nothing to do", peer="rsync -a out of the Maildir", goal=1.5)
def rsync_again(bench: Bench) -> Iterator[Sample]:
    """``rsync -a`` to a directory that is up to date; a body read or a file written would show as a line."""
    with bench.warm() as mailbox:
        ours, theirs = bench.scratch(), bench.scratch()
        bench.time("rsync", "-a", f"{mailbox}/", ours)
        bench.time("rsync", "-a", f"{bench.maildir}/cur/", theirs)
        for _ in bench.repetitions():
            yield Sample(
                bench.time("rsync", "-ai", f"{mailbox}/", ours, lines=0),
                bench.time("rsync", "-ai", f"{bench.maildir}/cur/", theirs, lines=0),
            )


@row(
    "remount",
    "remount and ls, {crowd} messages: 10 new, 5 gone, 20 reflagged, {latency} ms",
    peer="mbsync finding the same changes",
    goal=0.8,
    limit="processor time of the daemon",
)
def remount(bench: Bench) -> Iterator[Sample]:
    """``imapfs mount`` and ``ls`` of a known mailbox that another client changed, against another mbsync."""
    account = bench.crowd
    bench.link.set(0)
    cache, maildir = bench.fresh_cache(), bench.scratch()
    bench.mbsync(account, bench.link.port, maildir)
    with bench.mounted(account, bench.link.port, cache=cache) as mount:
        bench.time("ls", mount.mailbox)
    for number in bench.repetitions():
        here = bench.change(account, number)
        port = bench.at_a_distance()
        with bench.mounted(account, port, cache=cache) as mount:
            ours = mount.seconds + bench.time("ls", mount.mailbox, lines=here)
            used = mount.used()
        yield Sample(ours, bench.mbsync(account, port, maildir), used)


# ---- Large messages


@row(
    "first-bytes",
    "first 4 KiB of a 50 MB message, {latency} ms, 100 Mbit/s",
    goal=5.0,
    unit="RTT",
)
def first_bytes(bench: Bench) -> Iterator[Sample]:
    """``head -c 4096`` of a message that was listed but never read: no wait for the whole."""
    account = bench.new_account([_BIG])
    for _ in bench.repetitions():
        port = bench.at_a_distance(_FAST_ETHERNET)
        with bench.mounted(account, port) as mount:
            bench.time("ls", "-l", mount.mailbox)
            (path,) = mount.mailbox.iterdir()
            yield Sample(bench.time("head", "-c", "4096", path) / bench.settings.round_trip)


# ---- Changes


@row("mv", "mv of {few} messages to another mailbox, each, {latency} ms", goal=1.1, unit="RTT")
def move(bench: Bench) -> Iterator[Sample]:
    """One ``mv *.eml dir/``, after which another client finds every message in the other mailbox."""
    few = bench.settings.few
    for _ in bench.repetitions():
        account = bench.new_account([2000] * few)
        account.deliver("Done", [])
        with bench.mounted(account, bench.at_a_distance()) as mount:
            paths = sorted(mount.mailbox.iterdir())
            seconds = bench.time("mv", *paths, mount.path / "Done")
        found = bench.count(account, "Done"), bench.count(account, MAILBOX)
        if found != (few, 0):
            raise RowFailed(f"after mv there are {found[0]} messages there and {found[1]} here, of {few}")
        yield Sample(seconds / few / bench.settings.round_trip)


@row("setfattr", "setfattr of {few} messages, each, {latency} ms", goal=1.1, unit="RTT")
def flag(bench: Bench) -> Iterator[Sample]:
    """``\\Flagged`` by one ``setfattr`` of every message, after which another client sees all of them so."""
    yield from _flag(bench, 1)


@row("setfattr-8", "eight setfattr at once of {few} messages, each, {latency} ms", goal=0.3, unit="RTT")
def flag_at_once(bench: Bench) -> Iterator[Sample]:
    """The same by eight processes, each with an eighth of the messages."""
    yield from _flag(bench, 8)


def _flag(bench: Bench, processes: int) -> Iterator[Sample]:
    few = bench.settings.few
    for _ in bench.repetitions():
        account = bench.new_account([2000] * few)
        with bench.mounted(account, bench.at_a_distance()) as mount:
            paths = sorted(mount.mailbox.iterdir())
            set_flag = ("setfattr", "-n", "user.imap.flagged", "-v", "1")
            seconds = bench.at_once([(*set_flag, *paths[n::processes]) for n in range(processes)])
        if (found := bench.count(account, MAILBOX, "FLAGGED")) != few:
            raise RowFailed(f"after setfattr {found} messages of {few} are flagged")
        yield Sample(seconds / few / bench.settings.round_trip)


@row(
    "rsync-in",
    "rsync -a of {few} new messages into the mount until all are on the server, {latency} ms",
    peer="mbsync pushing the same",
    goal=0.8,
    limit="processor time of the daemon, and writing the files durably to the local disk",
)
def rsync_in(bench: Bench) -> Iterator[Sample]:
    """``imapfs mount``, ``rsync -a``, ``imapfs sync``, against one mbsync from a Maildir of the same."""
    few = bench.settings.few
    sources = bench.sources(few)
    for _ in bench.repetitions():
        account = bench.new_account([1000])
        for mailbox in ("Ours", "Theirs"):
            account.deliver(mailbox, [])
        port = bench.at_a_distance()
        with bench.mounted(account, port) as mount:
            copied = bench.time("rsync", "-a", f"{sources}/", mount.path / "Ours")
            ours = mount.seconds + copied + bench.wait_until_sent(mount)
            used = mount.used()
        theirs = bench.mbsync(account, port, bench.maildir_of(sources, "Theirs"), "Theirs", push=True)
        for mailbox in ("Ours", "Theirs"):
            if (found := bench.count(account, mailbox)) != few:
                raise RowFailed(f"of {few} messages {found} arrived in {mailbox}")
        yield Sample(ours, theirs, used + bench.durable(sources))


# ---- Very many messages


@row(
    "million-listed",
    "first listing of {million} messages in 100 mailboxes: the second half",
    peer="the first half",
    goal=1.2,
    unit="times",
)
def million_listed(bench: Bench) -> Iterator[Sample]:
    """``ls`` of 50 mailboxes, never seen before, against that of the 50 before: it should be linear."""
    yield Sample(bench.million.second, bench.million.first)


@row("million-memory", "peak RSS after that", goal=150.0, unit="MB")
def million_memory(bench: Bench) -> Iterator[Sample]:
    """The daemon's VmHWM."""
    yield Sample(bench.million.peak / 1e6)


@row("million-disk", "database after that, a message", goal=500.0, unit="bytes")
def million_disk(bench: Bench) -> Iterator[Sample]:
    """All of SQLite's files."""
    yield Sample(bench.million.database / bench.settings.million)


@row("million-again", "ls -R of these after a remount", peer="the same before it", goal=1.5, unit="times")
def million_again(bench: Bench) -> Iterator[Sample]:
    """``ls -R`` in a new mount with the cache, against that in the mount that has listed everything."""
    yield from map(Sample, bench.million.remounted, bench.million.warm)


# ---- What it costs


@row("memory", "peak RSS, {crowd} messages listed and grepped", goal=90.0, unit="MB")
def memory(bench: Bench) -> Iterator[Sample]:
    """The daemon's VmHWM after ``ls -l`` and ``grep -r`` of the large mailbox."""
    yield Sample(bench.memory[1] / 1e6)


@row("memory-slope", "RSS a further message", goal=100.0, unit="bytes")
def memory_slope(bench: Bench) -> Iterator[Sample]:
    """The difference of the peaks with the large mailbox and with a fifth of it."""
    fifth, whole = bench.memory
    yield Sample((whole - fifth) / (bench.settings.crowd - bench.settings.crowd // 5))


@row("idle-wakeups", "wake-ups of an idle daemon", goal=0.0, unit="/s")
def idle_wakeups(bench: Bench) -> Iterator[Sample]:
    """Voluntary context switches of all its threads, after the last of its work is done."""
    yield Sample(bench.idle[0])


@row("idle-cpu", "processor time of an idle daemon", goal=0.0, unit="%")
def idle_cpu(bench: Bench) -> Iterator[Sample]:
    """Over the same seconds."""
    yield Sample(bench.idle[1])


@row("help", "imapfs --help", goal=0.25, unit="s")
def start(bench: Bench) -> Iterator[Sample]:
    """The start of the program, which every use of it pays."""
    for _ in bench.repetitions():
        yield Sample(bench.time(sys.executable, "-m", "imapfs", "--help"))
