"""The process that announces changes to inotify reaches nothing but what it is to announce."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyfuse3 import FUSEError

from imapfs.errors import NotPermitted
from imapfs.fs.events import EventStream
from imapfs.kernel import caller
from imapfs.kernel.adapter import Adapter
from imapfs.kernel.inotify import Announcer
from imapfs.model import Ino
from tests.support.mounting import DEADLINE


def test_only_what_is_expected_is_answered() -> None:
    unused: Any = None
    announcer = Announcer(unused, unused, unused, Path("/"), read_only=False)
    adapter = Adapter(
        unused, unused, unused, unused, unused, announcer, EventStream(), timeout=1, read_only=False
    )
    parent, name = Ino(2), b"1.eml"
    for request, arguments in (
        ("mknod", (parent, name, 0o600, 0)),
        ("mkdir", (parent, name, 0o700)),
        ("unlink", (parent, name)),
        ("rmdir", (parent, name)),
        ("rename", (parent, name, parent, b"2.eml", 0)),
        ("setattr", (parent,)),
    ):
        with pytest.raises(NotPermitted):
            adapter.answer_announcer(request, *arguments)
    for request in ("create", "open", "setxattr", "removexattr", "opendir", "link", "symlink", "getxattr"):
        with pytest.raises(FUSEError) as refused:
            adapter.answer_announcer(request, parent, name)
        assert refused.value.errno == errno.EPERM


def test_call_never_reaches_another_file_system(tmp_path: Path) -> None:
    bystander = tmp_path / "INBOX" / "1.eml"
    bystander.parent.mkdir()
    bystander.touch()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", caller.__file__, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    directory = bystander.parent.stat().st_ino
    commands = [["prove"], *([what, "INBOX", directory, "1.eml"] for what in ("unlink", "mknod", "utime"))]
    answers, _ = process.communicate("".join(json.dumps(line) + "\n" for line in commands), timeout=DEADLINE)
    assert [os.strerror(int(line)) for line in answers.split()][1:] == [os.strerror(errno.EXDEV)] * 3
    assert int(answers.split()[0]) != 0
    assert process.returncode == 0
    assert bystander.exists()
