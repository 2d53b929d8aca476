"""The command line as a person meets it: real processes and mounts, with a stand-in for the mail behind."""

import contextlib
import errno
import functools
import json
import logging
import os
import pty
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio

from imapfs import __version__, mountinfo
from imapfs.daemon import control
from imapfs.daemon.mount import Observer
from imapfs.errors import AuthenticationFailed, ImapfsError
from imapfs.model import CredentialProvider, MountConfig

ROOT = Path(__file__).parents[2]
SECRET = "correct-horse"
SOURCE = "imaps://alice@mail.example.org"
DEADLINE = 60.0


# ---- The stand-in for imapfs.daemon.mount; it runs in the child processes


class EmptyMailbox(pyfuse3.Operations):
    """An empty root directory that tells its status, or, if ``stuck``, never answers when asked for it."""

    def __init__(self, status: dict[str, object], stuck: bool) -> None:
        super().__init__()
        self.status = json.dumps(status).encode()
        self.stuck = stuck

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700)
        return entry

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(1)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()

    async def getxattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name != control.STATUS_XATTR.encode():
            raise pyfuse3.FUSEError(errno.ENODATA)
        if self.stuck:
            await trio.sleep_forever()
        return self.status


def serve(config: MountConfig, credentials: CredentialProvider, observer: Observer) -> None:
    """What imapfs.daemon.mount.serve promises, or one of the ways to break it that STAND_IN names."""
    log = logging.getLogger("imapfs.daemon.mount")
    password = credentials.get()
    log.info("first\nsecond \x1b[31m %s", password)
    log.debug("a detail")
    home = Path(os.environ["STAND_IN_HOME"])
    way = os.environ["STAND_IN"]
    (home / "pid.new").write_text(str(os.getpid()))
    (home / "pid.new").rename(home / "pid")
    if way == "refuse":
        raise ImapfsError("the server does not want this; ask it nicely")
    if way == "reject":
        observer.state("it said no", needs_person=True)
        raise AuthenticationFailed("the server refuses the login")
    if way == "unlinked":
        raise ImportError("libfuse3.so.3: cannot open shared object file")
    if way == "break":
        raise RuntimeError("a bug")
    if way == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "wait":
        signal.pause()
    assert password is not None
    assert password.reveal() == SECRET
    status: dict[str, object] = {
        "pid": os.getpid(),
        "source": config.account.url,
        "mountpoint": str(config.mountpoint),
        "state": "online",
        "reason": None,
        "read_only": config.read_only,
        "connections": {"open": 1, "limit": config.connections},
        "cache": {"path": "[cache]", "bytes": 1536, "limit": config.cache_size},
    }
    options = {
        *pyfuse3.default_options,
        f"fsname={config.account.url}",
        "subtype=imapfs",
        *config.fuse_options,
    }
    pyfuse3.init(EmptyMailbox(status, stuck=way == "stick"), str(config.mountpoint), options)

    async def serve_until_unmounted() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            observer.live()

    trio.run(serve_until_unmounted)
    observer.ending()
    pyfuse3.close()
    while way == "linger" and not (home / "may end").exists():
        time.sleep(0.01)
    open_files = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2))
    (home / "ended").write_text(f"{os.getcwd()} {' '.join(open_files)}")


def run_with_stand_in() -> None:
    module = types.ModuleType("imapfs.daemon.mount")
    module.serve = serve  # type: ignore[attr-defined]
    sys.modules["imapfs.daemon.mount"] = module
    from imapfs.cli.main import main

    main()


# ---- Running it


class Cli:
    """The command with a home of its own; ``stand_in`` says how the stand-in behaves."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mountpoint = home / "mount point"
        self.mountpoint.mkdir()
        self.password = home / "password"
        self.password.write_text(SECRET)
        self.password.chmod(0o600)
        self.log = home / "log"
        self.extra: dict[str, str] = {}
        """Added to the environment."""

    def environment(self, stand_in: str) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
            "STAND_IN": stand_in,
            "STAND_IN_HOME": str(self.home),
            **self.extra,
        }

    def start(self, *arguments: str | Path, stand_in: str = "mount") -> subprocess.Popen[str]:
        mounting = ["-c", "from tests.cli.test_main import run_with_stand_in as run; run()"]
        how = mounting if arguments[0] == "mount" else ["-m", "imapfs"]
        return subprocess.Popen(
            [sys.executable, *how, *arguments],
            env=self.environment(stand_in),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path, stand_in: str = "mount") -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, stand_in=stand_in) as process:
            try:
                out, err = process.communicate(timeout=DEADLINE)
            finally:
                process.kill()
        assert SECRET not in out + err
        assert "Traceback" not in out
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def mount(self, *more: str | Path, stand_in: str = "mount") -> subprocess.CompletedProcess[str]:
        return self.run(*self.mount_arguments(), *more, stand_in=stand_in)

    def mount_arguments(self) -> list[str | Path]:
        return ["mount", SOURCE, self.mountpoint, "--password-file", self.password, "--log-file", self.log]

    def refusal(self, *arguments: str | Path, stand_in: str = "mount") -> str:
        """The line on stderr of a command that must fail."""
        result = self.run(*arguments, stand_in=stand_in)
        assert result.returncode in (1, 3), result
        assert result.stdout == ""
        assert result.stderr.startswith("imapfs: ")
        assert result.stderr.count("\n") == 1
        return result.stderr.strip()

    def pid(self) -> int:
        """Of the process that serves the mount, as soon as it does."""
        wait_for((self.home / "pid").exists)
        return int((self.home / "pid").read_text())

    def clean_up(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.home / "pid").read_text()), signal.SIGKILL)
        subprocess.run(["fusermount3", "-u", "-z", self.mountpoint], capture_output=True, check=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    command = Cli(tmp_path)
    yield command
    command.clean_up()


# ---- Usage


def imapfs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imapfs", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_version() -> None:
    result = imapfs("--version")
    assert (result.returncode, result.stdout) == (0, f"imapfs {__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, sep='\\n')); import imapfs.__main__"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "click" in result.stdout.splitlines()
    heavy = {
        "rich",
        "keyring",
        "trio",
        "pyfuse3",
        "imapclient",
        "platformdirs",
        "sqlite3",
        "tomllib",
        "tomlkit",
    }
    assert heavy.isdisjoint(result.stdout.splitlines())


def test_login_is_for_accounts_with_oauth(cli: Cli) -> None:
    assert "no account 'work'" in cli.refusal("login", "work")
    assert "no table 'oauth' in" in cli.refusal("login", "imaps://alice@h")


def test_mount_has_exactly_these_options() -> None:
    from imapfs.cli.mount import mount

    assert {name for option in mount.params for name in option.opts if name.startswith("-")} == {
        *("--password-command", "--password-file", "--token-command", "--all", "--auth"),
        *("--ca-file", "--tls-fingerprint", "--client-cert", "--client-key", "--insecure-plaintext"),
        *("--cache-dir", "--cache-size", "--read-only"),
        *(
            "--names",
            "--sent",
            "--drafts",
            "--list-attributes",
            "--trash",
            "--delete",
            "--fetch-ahead",
            "--connections",
            "--timeout",
            "--poll",
            "--foreground",
            "-f",
            "--log-file",
            "--verbose",
            "-v",
            "-o",
        ),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["mount"],
        ["mount", SOURCE],
        ["unmount", "/x"],
        ["mount", SOURCE, "/x", "--nonsense"],
        ["mount", SOURCE, "/x", "--connections", "many"],
        ["mount", SOURCE, "/x", "--password", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = imapfs(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: imapfs")


# ---- Refusals before anything is mounted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["imaps://alice@h", "--insecure-plaintext"], "write imap://"),
        ([SOURCE, "--tls-fingerprint", "ab:cd"], "--tls-fingerprint: must be a SHA-256"),
        ([SOURCE, "--client-key", "key.pem"], "client-cert"),
        ([SOURCE, "--auth", "external"], "client-cert"),
        ([f"imaps://alice:{SECRET}@h"], "--password-command"),
        (["work"], ".config/imapfs/config.toml"),
        ([SOURCE, "--cache-size", "huge"], "--cache-size: not a size"),
        ([SOURCE, "--connections", "0"], "--connections: must be"),
        ([SOURCE, "--names", "date"], '--names: must be "subject", "uid" or a template'),
        ([SOURCE, "--names", "{date}_{subject}"], "--names: must have the field {uid}"),
        ([SOURCE, "--timeout", "0"], "--timeout: must be"),
        ([SOURCE, "-o", "ro,colour"], "'colour'"),
        ([SOURCE, "--ca-file", "none.pem"], "none.pem: does not exist"),
        ([SOURCE, "--password-command", f"echo {SECRET}; exit 7"], "exit code 7"),
        ([SOURCE], "the keyring, or the prompt"),
    ],
)
def test_mount_is_refused_on_one_line(cli: Cli, arguments: list[str], says: str) -> None:
    assert says in cli.refusal("mount", arguments[0], cli.mountpoint, *arguments[1:])
    assert not (cli.home / "pid").exists()


def test_unusable_mountpoint_is_refused_before_the_password_is_asked_for(cli: Cli) -> None:
    def mounted_on(path: Path) -> str:
        return cli.refusal("mount", SOURCE, path, "--password-command", f"touch {cli.home}/asked; echo x")

    assert "does not exist: create it" in mounted_on(cli.home / "missing")
    assert "is not a directory" in mounted_on(cli.password)
    assert "is not a directory" in mounted_on(cli.password / "below")
    assert "is not empty" in mounted_on(cli.home)
    assert "proc file system" in mounted_on(Path("/proc"))
    assert not (cli.home / "asked").exists()


def test_cache_or_log_inside_the_mountpoint_is_refused(cli: Cli) -> None:
    assert "cache directory" in cli.refusal(*cli.mount_arguments(), "--cache-dir", cli.mountpoint / "cache")
    assert "log file" in cli.refusal(*cli.mount_arguments(), "--log-file", cli.mountpoint / "log")


def test_missing_fusermount3_names_the_package(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "install the package fuse3" in cli.refusal(*cli.mount_arguments())


def test_log_that_cannot_be_written_is_refused(cli: Cli) -> None:
    assert "--log-file" in cli.refusal(*cli.mount_arguments(), "--log-file", cli.home)


# ---- How the background process reports


def test_refusal_of_the_background_process_is_shown_and_logged(cli: Cli) -> None:
    line = cli.refusal(*cli.mount_arguments(), stand_in="refuse")
    assert line == "imapfs: the server does not want this; ask it nicely"
    assert "ERROR imapfs.daemon.background: the server does not want this" in cli.log.read_text()


def test_bug_is_one_line_and_the_traceback_is_in_the_log(cli: Cli) -> None:
    line = cli.refusal(*cli.mount_arguments(), stand_in="break")
    assert line == f"imapfs: internal error: RuntimeError: a bug; see {cli.log}"
    assert "Traceback" in cli.log.read_text()
    assert SECRET not in cli.log.read_text()


def test_death_without_a_word_points_at_the_log(cli: Cli) -> None:
    line = cli.refusal(*cli.mount_arguments(), stand_in="die")
    assert "signal 9" in line
    assert str(cli.log) in line


def test_ctrl_c_while_waiting_ends_both_processes(cli: Cli) -> None:
    with cli.start(*cli.mount_arguments(), stand_in="wait") as process:
        pid = cli.pid()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not Path(f"/proc/{pid}").exists()


def test_refusal_in_the_foreground(cli: Cli) -> None:
    assert cli.refusal(*cli.mount_arguments(), "-f", stand_in="refuse").endswith("ask it nicely")


# ---- A live mount


def test_mount_returns_when_live_and_umount_when_the_daemon_has_ended(cli: Cli) -> None:
    result = cli.mount(stand_in="linger")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.path.ismount(cli.mountpoint)
    assert os.getsid(cli.pid()) == cli.pid()

    with cli.start("umount", cli.mountpoint) as process:
        wait_for(lambda: not os.path.ismount(cli.mountpoint))
        # What the daemon still has to finish takes as long as it takes.
        wait_for(lambda: waits_for(process.pid, cli.pid()) or process.poll() is not None)
        assert process.poll() is None
        assert not (cli.home / "ended").exists()
        (cli.home / "may end").touch()
        assert process.communicate(timeout=DEADLINE) == ("", "")
    assert process.returncode == 0
    assert (cli.home / "ended").read_text() == "/ /dev/null /dev/null /dev/null"
    assert cli.mount().returncode == 0


def waits_for(process: int, other: int) -> bool:
    """Whether a process without children sleeps, and has a descriptor that tells it when ``other`` ends."""
    proc = Path(f"/proc/{process}")
    try:
        descriptors = [path.read_text() for path in (proc / "fdinfo").iterdir()]
        children = (proc / "task" / str(process) / "children").read_text()
        state = (proc / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return not children and state == "S" and any(f"\nPid:\t{other}\n" in text for text in descriptors)


def test_foreground_serves_until_unmounted(cli: Cli) -> None:
    arguments = [argument for argument in cli.mount_arguments() if argument not in ("--log-file", cli.log)]
    with cli.start(*arguments, "--foreground") as process:
        wait_for(lambda: os.path.ismount(cli.mountpoint))
        assert cli.pid() == process.pid
        assert cli.run("umount", cli.mountpoint).returncode == 0
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert "INFO imapfs.daemon.mount: first" in err


def test_log_is_private_has_one_line_for_an_event_and_no_password(cli: Cli) -> None:
    cli.mount()
    text = cli.log.read_text()
    assert "INFO imapfs.daemon.mount: first\\nsecond \\x1b[31m Secret(...)\n" in text
    assert "a detail" not in text
    assert SECRET not in text
    assert stat.S_IMODE(cli.log.stat().st_mode) == 0o600


def test_verbose_logs_details(cli: Cli) -> None:
    cli.mount("-v")
    assert "DEBUG imapfs.daemon.mount: a detail" in cli.log.read_text()


def test_log_goes_to_the_xdg_directory_by_default(cli: Cli) -> None:
    assert cli.run("mount", SOURCE, cli.mountpoint, "--password-file", cli.password).returncode == 0
    (log,) = (cli.home / ".local/state/imapfs/log").glob("alice@mail.example.org-*.log")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_account_of_the_configuration_file(cli: Cli) -> None:
    config = cli.home / ".config/imapfs/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        """
        [accounts.work]
        host = "mail.example.org"
        user = "bob"
        password-file = "../../password"
        log-file = "../../log"
        connections = 7
        read-only = true
        options = "noexec"
        """
    )
    assert cli.run("mount", "work", cli.mountpoint, "--connections", "3").returncode == 0
    status = control.read_status(cli.mountpoint)
    assert status["source"] == "imaps://bob@mail.example.org"
    assert status["connections"]["limit"] == 3
    assert status["read_only"] is True
    assert os.statvfs(cli.mountpoint).f_flag & os.ST_NOEXEC


def test_second_mount_on_the_same_directory_is_refused(cli: Cli) -> None:
    cli.mount()
    line = cli.refusal(*cli.mount_arguments())
    assert "is in use" in line
    assert "imapfs umount" in line
    assert SOURCE in line


def test_busy_mount_stays_and_the_line_says_what_to_do(cli: Cli) -> None:
    cli.mount()
    held = os.open(cli.mountpoint, os.O_RDONLY)
    try:
        assert "is busy: close the programs" in cli.refusal("umount", cli.mountpoint)
    finally:
        os.close(held)
    assert cli.run("umount", cli.mountpoint).returncode == 0


def test_dead_mount_is_explained_and_can_be_unmounted(cli: Cli) -> None:
    cli.mount()
    os.kill(cli.pid(), signal.SIGKILL)
    wait_for(lambda: not_connected(cli.mountpoint))
    # The command itself gives up after 5 s, in which a busy machine may not have started its child.
    while "has not answered within" in (line := cli.refusal("status", cli.mountpoint)):
        pass
    assert "the daemon has died" in line
    assert "fusermount3 -u" in line
    assert "unavailable" in cli.run("status").stdout
    assert cli.run("umount", cli.mountpoint).returncode == 0
    assert not os.path.ismount(cli.mountpoint)


def test_help_of_a_command_is_shown_in_both_ways(cli: Cli) -> None:
    assert cli.run("help", "umount").stdout == cli.run("umount", "--help").stdout
    assert cli.run("help").stdout == cli.run("--help").stdout
    assert "no such command: nothing" in cli.run("help", "nothing").stderr


def test_dead_mount_is_mounted_again(cli: Cli) -> None:
    cli.mount()
    dead = cli.pid()
    os.kill(dead, signal.SIGKILL)
    wait_for(lambda: not_connected(cli.mountpoint))
    cli.mount()
    assert cli.pid() != dead


def not_connected(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def test_stuck_daemon_does_not_hang_the_caller(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.mount(stand_in="stick")
    with pytest.raises(ImapfsError, match="not answered within"):
        control.read_status(cli.mountpoint, timeout=0.2)
    impatient = functools.partial(control.read_status, timeout=0.2)
    monkeypatch.setattr(control, "read_status", impatient)
    with pytest.raises(ImapfsError, match="does not answer: detach it"):
        control.unmount(cli.mountpoint)


def test_umount_and_status_of_what_is_not_ours(cli: Cli) -> None:
    for command in ("umount", "status"):
        assert "is not an imapfs mount" in cli.refusal(command, cli.mountpoint)
        assert "is not an imapfs mount" in cli.refusal(command, "/proc")
        assert "is not an imapfs mount" in cli.refusal(command, cli.home / "missing")


def test_mountpoint_may_be_given_relative_or_through_a_link(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.mount()
    (cli.home / "link").symlink_to(cli.mountpoint)
    monkeypatch.chdir(cli.home)
    assert cli.run("status", cli.home / "link").returncode == 0
    assert mountinfo.mount_at(Path(cli.mountpoint.name)) == mountinfo.mount_at(cli.mountpoint) is not None


# ---- Status


def test_status_as_json(cli: Cli) -> None:
    cli.mount()
    one = json.loads(cli.run("status", cli.mountpoint, "--json").stdout)
    assert one["pid"] == cli.pid()
    assert one["mountpoint"] == str(cli.mountpoint)
    every = json.loads(cli.run("status", "--json").stdout)
    assert one in every


def test_status_for_people(cli: Cli) -> None:
    cli.mount()
    lines = cli.run("status", cli.mountpoint).stdout.splitlines()
    assert f"account: {SOURCE}" in lines
    assert f"mounted on: {cli.mountpoint} (process {cli.pid()})" in lines
    assert "server: online" in lines
    assert "connections: 1 of 4" in lines
    assert any(line.startswith("cache: 1.5 KiB of 10 GiB; ") for line in lines)
    assert "not sent: nothing" in lines
    assert not any(line.endswith((": -", ": []")) for line in lines)
    assert f"{cli.mountpoint}  {SOURCE}  online" in cli.run("status").stdout.splitlines()


def test_status_on_a_terminal_is_a_table(cli: Cli) -> None:
    cli.mount()
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "imapfs", "status", str(cli.mountpoint)])
    shown = b""
    # Linux reports that the other side of a terminal is closed as EIO.
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    os.waitpid(child, 0)
    assert b"online" in shown
    assert b"[cache]" in shown
    assert b"state:" not in shown


# ---- mountinfo


def test_mountinfo_escapes_are_undone() -> None:
    data = (
        rb"42 27 0:39 / /mnt/a\040b\011c\012d\134e\043f\303\244" + b"\xc3\xa4 rw,nosuid shared:1 master:2 - "
        rb"fuse.imapfs imaps://a\040b@h rw,user_id=0" + b"\n"
        b"43 27 0:40 / / rw - ext4 /dev/root rw\n"
    )
    assert mountinfo.parse(data) == [
        mountinfo.Mount(Path("/mnt/a b\tc\nd\\e#fää"), "fuse.imapfs", "imaps://a b@h"),
        mountinfo.Mount(Path("/"), "ext4", "/dev/root"),
    ]
