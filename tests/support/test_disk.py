"""The disk that loses its power: what must be there afterwards, what may be, and what cannot."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.disk import Disk

PROGRAM = """
import os, sys
root = sys.argv[1]
os.mkdir(f"{root}/d")
with open(f"{root}/d/a.tmp", "wb") as file:
    file.write(b"first")
    file.flush()
    os.fsync(file.fileno())
    file.write(b" second")
os.rename(f"{root}/d/a.tmp", f"{root}/d/a")
directory = os.open(f"{root}/d", os.O_RDONLY)
os.fsync(directory)
open(f"{root}/d/b", "wb").close()
open(f"{root}/d/c", "wb").close()
os.unlink(f"{root}/d/a")
"""


def run(disk: Disk, program: str, **more: object) -> int:
    environment = {**os.environ, **disk.environment(**more)}  # type: ignore[arg-type]
    return subprocess.run([sys.executable, "-c", program, disk.root], env=environment).returncode


def test_what_may_be_there_after_a_power_cut(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert run(disk, PROGRAM) == 0
    assert disk.image() == {"d": None, "d/b": b"", "d/c": b""}

    def nothing() -> bool:
        return False

    def everything() -> bool:
        return True

    assert disk.after_power_cut(nothing, nothing) == {"d": None, "d/a": b"first"}
    assert disk.after_power_cut(nothing, everything) == {"d": None, "d/a": b"first second"}
    assert disk.after_power_cut(everything, nothing) == disk.image()
    chance = random.Random(1)
    seen = {frozenset(disk.after_power_cut(lambda: chance.random() < 0.5, nothing)) for _ in range(100)}
    # The changes of one directory stay in order.
    assert seen == {
        frozenset({"d", "d/a"}),
        frozenset({"d", "d/a", "d/b"}),
        frozenset({"d", "d/a", "d/b", "d/c"}),
        frozenset({"d", "d/b", "d/c"}),
    }


def test_a_full_disk_and_one_that_is_put_back(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    assert run(disk, PROGRAM) == 0
    before = disk.image()
    disk.fill()
    assert run(disk, "import sys; open(sys.argv[1] + '/new', 'wb')") == 1
    disk.free()
    assert run(disk, "import sys; open(sys.argv[1] + '/new', 'wb').write(b'x')") == 0
    assert disk.image() == {**before, "new": b"x"}
    disk.put(before)
    assert disk.image() == before
    assert not list(disk.changes())


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_process_is_killed_before_a_change(tmp_path: Path, stop: int) -> None:
    disk = Disk(tmp_path)
    assert run(disk, PROGRAM, stop=stop) == (-9 if stop < 11 else 0)
    assert len(list(disk.changes())) == min(stop - 1, 10)


def test_a_database_is_recorded_whole(tmp_path: Path) -> None:
    """SQLite does nothing behind the recorder's back but for the map that is left out."""
    disk = Disk(tmp_path)
    program = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1] + "/db", isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("CREATE TABLE t (x)")
db.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
import os; os._exit(0)
"""
    assert run(disk, program) == 0
    assert disk.after_power_cut(lambda: True, lambda: True) == disk.image()
