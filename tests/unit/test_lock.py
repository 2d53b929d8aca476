"""The lock files hold what pyproject.toml asks for, and agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME, BUILD, DEV = "requirements.lock", "requirements-build.lock", "requirements-dev.lock"


def locked(name: str) -> dict[str, str]:
    """Return the versions in a lock file, each of which has hashes."""
    text = (ROOT / name).read_text()
    found = dict(re.findall(r"^([a-z0-9-]+)==(\S+)(?: ;.*)? \\\n +--hash=sha256:[0-9a-f]{64}", text, re.M))
    assert len(found) == len(re.findall(r"^[^ #\n]", text, re.M)), "an entry without a hash"
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (RUNTIME, PROJECT["project"]["dependencies"]),
        (BUILD, PROJECT["dependency-groups"]["build"]),
        (DEV, PROJECT["dependency-groups"]["dev"]),
    ],
)
def test_what_is_asked_for_is_locked_within_its_bounds(name: str, wanted: list[str]) -> None:
    versions = locked(name)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_what_builds_imapfs_is_locked() -> None:
    versions = locked(RUNTIME) | locked(BUILD)
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_lock_files_agree() -> None:
    assert locked(RUNTIME) | locked(BUILD) | locked(DEV) == locked(DEV)
