"""A private Cyrus, unprivileged, loopback only, TLS: another server with a mind of its own about mail.

It is not installed, because its packages conflict with Dovecot's: ``scripts/servers`` unpacks it.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from tests.support.requirements import Missing
from tests.support.servers.account import run_as
from tests.support.servers.process import Program, copy_programs, free_ports, server_user
from tests.support.servers.tls import CertificateAuthority

UNPACKED = Path(__file__).parents[3] / ".servers" / "cyrus"
"""The packages; nothing is run from here, because the user that the server runs as may not get here."""

_PROGRAMS = ("master", "imapd", "ctl_cyrusdb", "saslpasswd2")


class Cyrus:
    """A running server while the ``with`` block lasts, with one user; INBOX and Trash are made at the login.

    Raises Missing where it is not unpacked, and RuntimeError where it does not start.
    """

    def __init__(self, authority: CertificateAuthority, user: str, password: str) -> None:
        self._certificate = authority.issue()
        self._user = user
        self._password = password
        self._account = server_user()

    def __enter__(self) -> "Cyrus":
        if not (UNPACKED / "stamp").exists():
            raise Missing("the packages of Cyrus could not be unpacked")
        # Not TMPDIR: a socket path has at most 107 bytes, and a TMPDIR of root's may be closed to "nobody".
        self.directory = Path(tempfile.mkdtemp(prefix="imapfs-cyrus-", dir="/tmp"))
        try:
            self._prepare()
            (self.port,) = free_ports(1)
            (self.directory / "imapd.conf").write_text(self._settings())
            (self.directory / "cyrus.conf").write_text(self._services())
            self._own_all()
            self._master = Program(
                [
                    self.directory / "bin/master", "-D",
                    "-C", self.directory / "imapd.conf",
                    "-M", self.directory / "cyrus.conf",
                    "-p", self.directory / "master.pid",
                ],
                self.port,
                self.directory / "log",
                environment=self._environment(),
                identity=run_as(self._account.pw_uid, self._account.pw_gid),
            )  # fmt: skip
            self._master.start()
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._master.stop()
        finally:
            shutil.rmtree(self.directory)

    def stop(self) -> None:
        """End it; `start_again` goes on with the same mail at the same port."""
        self._master.stop()

    def start_again(self) -> None:
        """Start after `stop`. Raises RuntimeError where it does not start."""
        self._master.start()

    def _prepare(self) -> None:
        self.directory.chmod(0o755)
        below = ("db", "socket", "log", "msg", "proc", "lock", "sync")
        for name in ("bin", "spool", "tmp", *(f"conf/{name}" for name in below)):
            (self.directory / name).mkdir(parents=True)
        programs = [path for name in _PROGRAMS for path in UNPACKED.glob(f"usr/**/{name}")]
        copy_programs(programs, UNPACKED, self.directory / "bin")
        for name, source in zip(("server.pem", "server.key"), self._certificate, strict=True):
            shutil.copyfile(source, self.directory / name)
        subprocess.run(
            [
                self.directory / "bin/saslpasswd2", "-p", "-c", "-u", "localhost",
                "-f", self.directory / "sasldb2", self._user,
            ],
            env=self._environment(),
            input=self._password.encode(),
            check=True,
            capture_output=True,
        )  # fmt: skip

    def _own_all(self) -> None:
        if os.geteuid() != self._account.pw_uid:
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _environment(self) -> dict[str, str]:
        ours = str(self.directory / "bin")
        plugins = ":".join([ours, *(str(path) for path in Path("/usr/lib").glob("*/sasl2"))])
        return {"LD_LIBRARY_PATH": ours, "SASL_PATH": plugins, "CYRUS_VERBOSE": "1"}

    def _settings(self) -> str:
        base = self.directory
        return f"""\
configdirectory: {base}/conf
defaultpartition: default
partition-default: {base}/spool
temp_path: {base}/tmp
cyrus_user: {self._account.pw_name}
servername: localhost
altnamespace: yes
unixhierarchysep: yes
allowplaintext: yes
sasl_pwcheck_method: auxprop
sasl_auxprop_plugin: sasldb
sasl_sasldb_path: {base}/sasldb2
sasl_mech_list: PLAIN LOGIN
tls_server_cert: {base}/server.pem
tls_server_key: {base}/server.key
autocreate_quota: 0
autocreate_inbox_folders: Drafts | Sent | Trash
xlist-drafts: Drafts
xlist-sent: Sent
xlist-trash: Trash
expunge_mode: immediate
delete_mode: immediate
imapidlepoll: 1
duplicatesuppression: no
search_engine: none
"""

    def _services(self) -> str:
        programs, settings = f"{self.directory}/bin", f"-C {self.directory}/imapd.conf"
        return f"""\
START {{
  recover cmd="{programs}/ctl_cyrusdb {settings} -r"
}}
SERVICES {{
  imaps cmd="{programs}/imapd {settings} -s" listen="127.0.0.1:{self.port}" prefork=1 maxchild=100
}}
EVENTS {{
}}
"""
