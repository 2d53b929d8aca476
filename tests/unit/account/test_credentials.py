import dataclasses
import errno
import logging
import os
import pty
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from imapfs.account import credentials, keyring
from imapfs.account.credentials import CredentialSources, resolve
from imapfs.errors import CredentialError
from imapfs.model import Account, Secret
from tests.support.mounting import ROOT

SECRET = "correct horse"
ACCOUNT = Account("mail.example.org", "alice")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a keyring of this test's own, with nothing in it."""
    path = tmp_path / "keyring"
    path.write_text("{}")
    monkeypatch.setenv("IMAPFS_TEST_KEYRING", str(path))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "tests.support.keyrings.FileKeyring")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


def keep(password: str) -> None:
    keyring.save(keyring.PASSWORDS, ACCOUNT.url, Secret(password))


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with open(os.devnull) as null:
        monkeypatch.setattr(sys, "stdin", null)
        yield


def found(sources: CredentialSources, account: Account = ACCOUNT) -> str | None:
    """What there is to log in with; None for the client certificate alone."""
    secret = resolve(account, sources).get()
    return secret.reveal() if secret is not None else None


def refusal(sources: CredentialSources) -> str:
    """The one line of the error; the secret must be nowhere in it or in the traceback."""
    with pytest.raises(CredentialError) as caught:
        resolve(ACCOUNT, sources)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    line = str(caught.value)
    assert "\n" not in line
    return line


def password_file(directory: Path, data: bytes = SECRET.encode() + b"\n", mode: int = 0o600) -> Path:
    path = directory / "password"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "command",
    [
        f"echo '{SECRET}'",
        f"printf '{SECRET}'",
        f"printf '{SECRET}\\r\\nuser: alice\\n'",
        f"printf 'x\\n{SECRET}\\n' | tail -n 1",
        f"echo '{SECRET}'; echo a warning >&2",
    ],
)
def test_command_prints_the_password_on_its_first_line(command: str) -> None:
    assert found(CredentialSources(command=command)) == SECRET


def test_spaces_and_non_ascii_belong_to_the_password() -> None:
    assert found(CredentialSources(command="printf ' pä ss \\n'")) == " pä ss "


def test_failed_command_tells_code_and_last_error_line() -> None:
    line = refusal(
        CredentialSources(command=f"echo '{SECRET}'; echo first >&2; echo no such entry >&2; exit 3")
    )
    assert "exit code 3" in line
    assert line.endswith("no such entry")
    assert "signal 9" in refusal(CredentialSources(command="kill -9 $$"))


def test_command_without_a_password_is_refused() -> None:
    assert "empty" in refusal(CredentialSources(command="true"))
    assert "UTF-8" in refusal(CredentialSources(command=f"printf '{SECRET}\\377\\n'"))


def test_command_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(CredentialSources(command="true")) == (
        "the password command cannot be started: No such file or directory"
    )


def test_command_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_COMMAND_TIMEOUT", 0.1)
    assert "did not end" in refusal(CredentialSources(command=f"echo '{SECRET}'; exec sleep 60"))


def test_password_is_in_no_environment(tmp_path: Path) -> None:
    resolve(ACCOUNT, CredentialSources(file=password_file(tmp_path)))
    environment = found(CredentialSources(command="env -0 | tr '\\0\\n' '  '")) or ""
    assert "PATH=" in environment
    assert SECRET not in environment


def test_command_wins_over_the_file(tmp_path: Path) -> None:
    sources = CredentialSources(command="echo one", file=password_file(tmp_path))
    assert found(sources) == "one"


def test_changed_password_is_found_when_the_old_one_is_refused(tmp_path: Path) -> None:
    path = password_file(tmp_path)
    provider = resolve(ACCOUNT, CredentialSources(file=path))
    old = provider.get()
    assert provider.get(refused=old) is old
    path.write_text("battery staple")
    assert provider.get() is old
    new = provider.get(refused=old)
    assert new is not None
    assert new.reveal() == "battery staple"
    # Another connection was refused with the old one too.
    assert provider.get(refused=old) is new
    path.unlink()
    assert provider.get(refused=new) is new


def test_failed_command_does_not_fall_through() -> None:
    keep(SECRET)
    assert "exit code 1" in refusal(CredentialSources(command="exit 1"))


def test_first_line_of_the_file(tmp_path: Path) -> None:
    path = password_file(tmp_path, f"{SECRET}\r\nsecond\n".encode())
    assert found(CredentialSources(file=path)) == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_file_that_others_may_access_is_refused(tmp_path: Path, mode: int) -> None:
    line = refusal(CredentialSources(file=password_file(tmp_path, mode=mode)))
    assert f"{mode:04o}" in line
    assert "chmod 600" in line


def test_pipe_is_accepted_whatever_its_mode(tmp_path: Path) -> None:
    receiver, sender = os.pipe()
    os.write(sender, SECRET.encode() + b"\n")
    os.close(sender)
    try:
        assert found(CredentialSources(file=Path(f"/dev/fd/{receiver}"))) == SECRET
    finally:
        os.close(receiver)


def test_bad_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: cannot be read: {os.strerror(errno.ENOENT)}" in refusal(
        CredentialSources(file=missing)
    )
    assert "Is a directory" in refusal(CredentialSources(file=tmp_path))
    assert "empty" in refusal(CredentialSources(file=password_file(tmp_path, b"\nsecond\n")))
    assert "UTF-8" in refusal(CredentialSources(file=password_file(tmp_path, b"\xff" + SECRET.encode())))


def test_keyring_is_asked_for_the_url() -> None:
    keep(SECRET)
    assert found(CredentialSources()) == SECRET


@pytest.mark.parametrize(
    ("name", "secret"), [("work", "one"), ("home", "two"), (None, "two"), ("a/b", "two")]
)
def test_systemd_credential_is_found_by_the_accounts_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, secret: str
) -> None:
    (tmp_path / "work").write_text("one\n")
    (tmp_path / "imapfs").write_text("two\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("three\n")
    # As with an access list for the user of the service.
    (tmp_path / "work").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert found(CredentialSources(name=name)) == secret


def test_order_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep("keyring")
    assert found(CredentialSources()) == "keyring"
    (tmp_path / "imapfs").write_text("systemd")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert found(CredentialSources()) == "systemd"
    assert found(CredentialSources(token_command="echo token")) == "token"
    assert found(CredentialSources(file=password_file(tmp_path), token_command="echo token")) == SECRET


@pytest.mark.usefixtures("no_terminal")
def test_certificate_alone_will_do() -> None:
    with_certificate = dataclasses.replace(ACCOUNT, client_cert=Path("me.pem"))
    assert found(CredentialSources(), with_certificate) is None
    keep(SECRET)
    assert found(CredentialSources(), with_certificate) == SECRET
    assert found(CredentialSources(), dataclasses.replace(with_certificate, auth="external")) is None


@pytest.mark.usefixtures("no_terminal")
def test_nothing_found_names_the_four_ways() -> None:
    line = refusal(CredentialSources())
    for way in ("--password-command", "--password-file", "keyring", "prompt", ACCOUNT.url):
        assert way in line


@pytest.mark.usefixtures("no_terminal")
def test_broken_keyring_counts_as_not_found(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.unlink()
    with caplog.at_level(logging.DEBUG, "imapfs"):
        assert "--password-command" in refusal(CredentialSources())
    assert "KeyringLocked" in caplog.text


@pytest.mark.usefixtures("no_terminal")
def test_missing_keyring_library_counts_as_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyring.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "--password-command" in refusal(CredentialSources())


@pytest.mark.parametrize(("typed", "code"), [(SECRET.encode() + b"\n", 0), (b"\n", 3), (b"\x04", 3)])
def test_terminal_is_asked_without_echo(typed: bytes, code: int) -> None:
    script = f"""
import sys
from imapfs import errors, model
from imapfs.account import credentials
try:
    found = credentials.resolve(model.Account("h", "alice"), credentials.CredentialSources())
except errors.CredentialError:
    sys.exit(3)
sys.exit(found.get().reveal() != {SECRET!r})
"""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])
    shown = b""
    try:
        while not shown.endswith(b": "):
            shown += os.read(terminal, 1024)
        os.write(terminal, typed)
        while data := os.read(terminal, 1024):
            shown += data
    except OSError as error:
        # How Linux reports that the other side of a terminal is closed.
        assert error.errno == errno.EIO
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert b"Password for imaps://alice@h: " in shown
    assert SECRET.encode() not in shown
