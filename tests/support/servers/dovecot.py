"""A private Dovecot: unprivileged, loopback only, TLS, maildir, gone without trace when it is closed.

Started by root, the whole instance runs as ``nobody``; otherwise as the calling user. So there is one kind of
configuration, in which every Dovecot service runs as one user and nothing is chrooted.

What Dovecot serves is not always what lies in the Maildir: see `as_served`.
"""

import base64
import grp
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.support.requirements import SBIN, Missing, demand_dovecot
from tests.support.servers.account import DEADLINE, Dependents, Identity, ImapAccount, modified_utf7, run_as
from tests.support.servers.process import free_ports, server_user
from tests.support.servers.tls import CertificateAuthority

SPECIAL_USE = ("Drafts", "Sent", "Trash", "Junk")
"""Mailboxes that every account has beside INBOX, each with the RFC 6154 attribute of its name."""

_LINE_FEED = re.compile(rb"(?<!\r)\n")


class Dovecot:
    """A running server while the ``with`` block lasts; any user name is accepted with ``password``.

    ``plain`` opens a second listener at ``plain_port``, on which a connection starts as cleartext; without
    ``tls`` it stays cleartext, and there is no other. ``mechanisms`` are those of SASL that it offers, in
    Dovecot's spelling; ``client_certificates`` makes it ask for one, whose common name is then the user.
    ``tokens`` is the URL of an introspection endpoint (RFC 7662), which is asked about access tokens; without
    one the password is the token. ``prefix`` is that of the personal namespace, such as ``INBOX.`` with
    ``separator="."``. ``root`` is a directory with another system, whose Dovecot is run, which
    only root can do. ``quota`` is the limit of each account in Dovecot's notation (``10M``). ``certificate``
    (with its key) replaces the valid one for localhost and 127.0.0.1.

    Raises RuntimeError with the end of the server's log where it does not start, and Missing where it is not
    installed.
    """

    host = "localhost"

    def __init__(
        self,
        authority: CertificateAuthority,
        *,
        certificate: tuple[Path, Path] | None = None,
        password: str = "secret",
        plain: bool = False,
        tls: bool = True,
        mechanisms: Sequence[str] = ("plain", "login"),
        client_certificates: bool = False,
        tokens: str | None = None,
        separator: str = "/",
        prefix: str = "",
        quota: str | None = None,
        max_userip_connections: int = 10,
        root: Path | None = None,
    ) -> None:
        self.authority = authority
        self.dependents = Dependents()
        self.password = password
        self.separator = separator
        self.prefix = prefix
        self.port = 0
        self.plain_port: int | None = None
        self._certificate = certificate or authority.issue()
        self._plain = plain or not tls
        self._tls = tls
        self._mechanisms = mechanisms
        self._client_certificates = client_certificates
        self._tokens = tokens
        self._quota = quota
        self._max_userip_connections = max_userip_connections
        self._root = root
        user = server_user()
        self.uid = user.pw_uid
        self.gid = user.pw_gid
        self._user = user.pw_name
        self._group = grp.getgrgid(user.pw_gid).gr_name

    def __enter__(self) -> "Dovecot":
        if self._root is None:
            demand_dovecot()
        elif os.geteuid() != 0:
            raise Missing("only root can run the Dovecot of another system")
        # Not TMPDIR: a socket path has at most 107 bytes, and a TMPDIR of root's may be closed to "nobody".
        temporary = "/tmp" if self._root is None else self._root / "tmp"
        self.directory = Path(tempfile.mkdtemp(prefix="imapfs-dovecot-", dir=temporary))
        self._there = Path("/tmp", self.directory.name)
        """The same, as the server has it."""
        try:
            self._prepare()
            self._start()
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self.dependents.__exit__(kind, error, where)
        finally:
            try:
                self._stop()
            finally:
                shutil.rmtree(self.directory)

    def account(self, name: str) -> "Account":
        """Return the account of the user ``name``; it has INBOX and `SPECIAL_USE` from the beginning."""
        account = Account(self, name)
        account.prepare()
        return account

    def stop(self) -> None:
        """End it at once; `start_again` goes on with the same mail, at another port."""
        for process in self.processes():
            _kill(process, signal.SIGKILL)
        self._stop()

    def start_again(self) -> None:
        """Start after `stop`."""
        (self.directory / "log").unlink()
        self._start()

    def freeze(self) -> None:
        """Let it do nothing, and say nothing, until `thaw`."""
        for process in self.processes():
            _kill(process, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze`."""
        for process in self.processes():
            _kill(process, signal.SIGCONT)

    def doveadm(self, *arguments: str) -> str:
        """Run a doveadm command against this instance only and return its output."""
        done = subprocess.run(
            self._command("doveadm", "-c", str(self._there / "dovecot.conf"), *arguments),
            env=_environment(),
            **self._identity(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"doveadm {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def log_lines(self) -> list[str]:
        """Return the lines of the server's log so far, of every severity."""
        try:
            return (self.directory / "log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def own(self, path: Path) -> None:
        """Give ``path`` to the user that the server runs as."""
        if os.geteuid() != self.uid:
            os.chown(path, self.uid, self.gid)

    def _prepare(self) -> None:
        for path in (self.directory, *(self.directory / name for name in ("run", "state", "mail", "trace"))):
            path.mkdir(mode=0o755, exist_ok=True)
            self.own(path)
        files = {"server.pem": self._certificate[0], "server.key": self._certificate[1]}
        for name, source in {**files, "ca.pem": self.authority.certificate}.items():
            copy = self.directory / name
            copy.touch(mode=0o600)
            copy.write_bytes(source.read_bytes())
            self.own(copy)

    def _start(self) -> None:
        for _ in range(10):
            port, plain_port = free_ports(2)
            self.plain_port = plain_port if self._plain else None
            self.port = port if self._tls else plain_port
            configuration = self.directory / "dovecot.conf"
            configuration.write_text(self._configuration())
            self.own(configuration)
            with (self.directory / "stderr").open("wb") as errors:
                self._master = subprocess.Popen(
                    self._command("dovecot", "-F", "-c", str(self._there / configuration.name)),
                    env=_environment(),
                    # So that Ctrl-C in the terminal does not reach it, and that stopping reaches all of it.
                    start_new_session=True,
                    **self._identity(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
            try:
                self._wait_until_it_listens()
            except _PortTakenError:
                continue
            except BaseException:
                self._stop()
                raise
            return
        raise RuntimeError(f"dovecot found no free port on 127.0.0.1\n{self._end_of_log()}")

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + DEADLINE
        while not any("starting up" in line for line in self.log_lines()):
            if self._master.poll() is not None:
                log = self._end_of_log()
                if "Address already in use" in log:
                    (self.directory / "log").unlink()
                    raise _PortTakenError
                raise RuntimeError(f"dovecot did not start\n{log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"dovecot did not start within {DEADLINE:.0f} s\n{self._end_of_log()}")
            time.sleep(0.005)
        with socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE):
            pass

    def _end_of_log(self) -> str:
        errors = (self.directory / "stderr").read_text(errors="replace").splitlines()
        return "\n".join([*errors, *self.log_lines()][-15:])

    def _stop(self) -> None:
        # Sessions outlive a master that was told to end, but not the process group that it led. The signal is
        # sent again and again because a process just forked loses one, and then nobody tells it any more.
        for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, DEADLINE)):
            deadline = time.monotonic() + patience
            while (left := self.processes()) and time.monotonic() < deadline:
                for process in left:
                    _kill(process, number)
                time.sleep(0.005)
        self._master.wait()
        if left:
            raise RuntimeError(f"dovecot left processes behind: {left}")

    def processes(self) -> list[int]:
        """Return the ids of the processes of this instance that run (zombies, which hold nothing, do not)."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == self._master.pid and fields[0] not in "ZX":
                found.append(int(entry.name))
        return found

    def _command(self, *words: str) -> list[str]:
        """Return how to run one of Dovecot's programs; see `_identity` for the user."""
        if self._root is None:
            return list(words)
        return ["chroot", f"--userspec={self.uid}:{self.gid}", str(self._root), *words]

    def _identity(self) -> Identity:
        return {} if self._root is not None else run_as(self.uid, self.gid)

    def version(self) -> str:
        """Return what it says of its version."""
        return subprocess.run(
            self._command("dovecot", "--version"),
            env=_environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def _configuration(self) -> str:
        version = self.version()
        # Any byte may be in a password, and only base64 has none that the configuration would interpret.
        password = "{PLAIN.B64}" + base64.b64encode(self.password.encode()).decode()
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 4):
            return self._settings_since_2_4(password) + self._settings_common()
        return self._settings_before_2_4(password) + self._settings_common()

    def _settings_common(self) -> str:
        mailboxes = "".join(
            f"  mailbox {name} {{\n    special_use = \\{name}\n    auto = create\n  }}\n"
            for name in SPECIAL_USE
        )
        return f"""\
base_dir = {self._there}/run
state_dir = {self._there}/state
log_path = {self._there}/log
protocols = imap
listen = 127.0.0.1
ssl = {"yes" if self._tls else "no"}
mail_fsync = never
mailbox_list_index = yes
auth_mechanisms = {" ".join(self._mechanisms)}
{"auth_ssl_username_from_cert = yes" if self._client_certificates else ""}
auth_failure_delay = 0
default_internal_user = {self._user}
default_internal_group = {self._group}
default_login_user = {self._user}
# Within the usual limit of 1024 open files, of which Dovecot wants one for each possible client.
default_client_limit = 200
default_process_limit = 100
first_valid_uid = {self.uid}
first_valid_gid = {self.gid}
# Statistics are nobody's here, and every process would look for their socket.
stats_writer_socket_path =
service anvil {{
  chroot =
  client_limit = 1000
  # The penalty makes clients wait who come from an address that has sent a wrong password.
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service stats {{
  chroot =
}}
service imap-login {{
  chroot =
  process_min_avail = 1
  inet_listener imap {{
    port = {self.plain_port or 0}
  }}
  inet_listener imaps {{
    port = {self.port if self._tls else 0}
    ssl = yes
  }}
}}
protocol imap {{
  mail_max_userip_connections = {self._max_userip_connections}
}}
namespace inbox {{
  inbox = yes
  separator = {self.separator}
  prefix = {self.prefix}
{mailboxes}}}
"""

    def _settings_before_2_4(self, password: str) -> str:
        quota = ""
        if self._quota is not None:
            quota = f"""\
mail_plugins = quota
protocol imap {{
  mail_plugins = quota imap_quota
}}
plugin {{
  quota = count:User quota
  quota_vsizes = yes
  quota_grace = 0
  quota_rule = *:storage={self._quota}
}}
"""
        certificates = passdbs = ""
        if self._client_certificates:
            certificates = (
                f"ssl_ca = <{self._there}/ca.pem\nssl_verify_client_cert = yes\nssl_require_crl = no\n"
            )
            passdbs = "passdb {\n  driver = static\n  mechanisms = external\n  args = nopassword\n}\n"
        if self._tokens is not None:
            settings = self.directory / "oauth2.conf"
            settings.write_text(
                f"introspection_url = {self._tokens}\nintrospection_mode = post\n"
                "username_attribute = username\n"
            )
            self.own(settings)
            passdbs += (
                "passdb {\n  driver = oauth2\n  mechanisms = xoauth2 oauthbearer\n"
                f"  args = {self._there / settings.name}\n}}\n"
            )
        return f"""\
{certificates}ssl_cert = <{self._there}/server.pem
ssl_key = <{self._there}/server.key
disable_plaintext_auth = no
mail_location = maildir:~/Maildir:LAYOUT=fs
rawlog_dir = {self._there}/trace/%u
service imap-login {{
  service_count = 0
}}
{passdbs}passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid={self.uid} gid={self.gid} home={self._there}/mail/%u allow_all_users=yes
}}
{quota}"""

    def _settings_since_2_4(self, password: str) -> str:
        quota = ""
        if self._quota is not None:
            quota = f"""\
mail_plugins {{
  quota = yes
}}
protocol imap {{
  mail_plugins {{
    imap_quota = yes
  }}
}}
quota "User quota" {{
  quota_storage_grace = 0
  quota_storage_size = {self._quota}
}}
"""
        certificates = passdbs = ""
        if self._client_certificates:
            certificates = (
                f"ssl_server_ca_file = {self._there}/ca.pem\nssl_server_request_client_cert = yes\n"
                "ssl_server_require_crl = no\n"
            )
            passdbs = (
                "passdb external {\n  driver = static\n  mechanisms = external\n"
                "  fields {\n    nopassword = yes\n  }\n}\n"
            )
        if self._tokens is not None:
            certificates += (
                f"oauth2_introspection_url = {self._tokens}\noauth2_introspection_mode = post\n"
                "oauth2_username_attribute = username\n"
            )
            passdbs += "passdb oauth2 {\n  mechanisms = xoauth2 oauthbearer\n}\n"
        return f"""\
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
{certificates}ssl_server_cert_file = {self._there}/server.pem
ssl_server_key_file = {self._there}/server.key
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
mailbox_list_layout = fs
rawlog_dir = {self._there}/trace/%{{user}}
service imap-login {{
  restart_request_count = unlimited
}}
{passdbs}passdb static {{
  password = "{password}"
}}
userdb static {{
  allow_all_users = yes
  fields {{
    uid = {self.uid}
    gid = {self.gid}
    home = {self._there}/mail/%{{user}}
  }}
}}
{quota}"""


class Account(ImapAccount):
    """One user of a `Dovecot`; `append` drops one CR where several precede an LF, and one at the very end."""

    server: Dovecot

    def __init__(self, server: Dovecot, name: str) -> None:
        super().__init__(server, name)
        self._maildir = server.directory / "mail" / name / "Maildir"
        self._trace = server.directory / "trace" / name

    def prepare(self) -> None:
        """Create the mailboxes that every account has.

        Dovecot does so when one is first opened. But two connections that do it at once can deadlock over the
        locks of the mailbox list, upon which one of the processes ends itself; and a LIST that comes between
        says that such a mailbox cannot be selected.
        """
        for mailbox in ("INBOX", *SPECIAL_USE):
            self._mailbox_directory(mailbox)

    def back_up(self, to: Path) -> None:
        """Copy all mail of the account to ``to``, which is replaced, with all that the server knows of it."""
        shutil.rmtree(to, ignore_errors=True)
        subprocess.run(["cp", "-a", self._maildir, to], check=True)

    def restore(self, copy: Path) -> None:
        """Put back what `back_up` copied; the server must be stopped."""
        shutil.rmtree(self._maildir)
        subprocess.run(["cp", "-a", copy, self._maildir], check=True)

    def restart_from(self, copy: Path) -> None:
        """Stop the server, `restore`, and start it again, at another port."""
        self.server.stop()
        self.restore(copy)
        self.server.start_again()

    def start_trace(self) -> None:
        """Record what is said on the connections that log in from now on."""
        for path in (self._trace.parent, self._trace):
            path.mkdir(mode=0o700, exist_ok=True)
            self.server.own(path)

    def protocol_trace(self) -> list[bytes]:
        """Return the lines that clients sent after their login, connection by connection.

        Only of connections made since `start_trace`.
        """
        lines: list[bytes] = []
        for path in sorted(self._trace.glob("*.in")):
            lines += [
                line.partition(b" ")[2].rstrip(b"\r") for line in path.read_bytes().split(b"\n") if line
            ]
        return lines

    def _mailbox_directory(self, mailbox: str) -> Path:
        directory = self._maildir
        self._make(directory.parent)
        self._make(directory)
        if mailbox != "INBOX":
            for part in mailbox.split("/"):
                directory = directory / modified_utf7(part)
                self._make(directory)
        for name in ("tmp", "new", "cur"):
            self._make(directory / name)
        return directory

    def _as_stored(self, content: bytes) -> tuple[bytes, str]:
        return content, f",W={len(as_served(content))}"


def as_served(stored: bytes) -> bytes:
    """Return BODY[] of a message that lies in the Maildir as ``stored``.

    Dovecot sends CRLF for a bare LF and 0x80 for a NUL; CRLF, a bare CR and a missing final newline stay.
    """
    return _LINE_FEED.sub(b"\r\n", stored).replace(b"\0", b"\x80")


class _PortTakenError(Exception):
    """Somebody else bound the port between its choice and its use."""


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "") + SBIN + ":/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


def _kill(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)
