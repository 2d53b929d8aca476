"""The steps of ``imapfs check`` that concern this machine: FUSE and the cache."""

import contextlib
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from imapfs.account.values import show_size
from imapfs.cli.check.finding import Result
from imapfs.daemon import preflight
from imapfs.errors import ImapfsError
from imapfs.model import MountConfig


class MachineSteps:
    """Independent of each other, and of the server."""

    def __init__(self, config: MountConfig) -> None:
        self._config = config

    def device(self) -> Iterator[Result]:
        preflight.check_device()
        yield Result("ok", f"{preflight.DEVICE} can be used")

    def fusermount(self) -> Iterator[Result]:
        preflight.check_fusermount()
        yield Result("ok", f"{shutil.which('fusermount3')}")

    def pyfuse3(self) -> Iterator[Result]:
        try:
            importlib.import_module("imapfs.kernel.adapter")
        except ImportError as error:
            raise ImapfsError(
                f"pyfuse3 cannot be used: {error}",
                remedy="install libfuse3-dev, pkg-config, gcc and python3-dev, then reinstall imapfs",
            ) from None
        yield Result("ok", "pyfuse3 can be used")

    def allow_other(self) -> Iterator[Result]:
        preflight.check_options(self._config.fuse_options)
        who = "all users" if preflight.user_allow_other() else "only root"
        yield Result("ok", f"{who} may use -o allow_other (user_allow_other in {preflight.FUSE_CONF})")

    def cache(self) -> Iterator[Result]:
        directory = self._config.cache_dir
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield Result("failed", f"{existing} is not writable", "choose another directory with --cache-dir")
            return
        free = shutil.disk_usage(existing).free
        room = free + _used(directory)
        if room < self._config.cache_size:
            yield Result(
                "warning",
                f"{show_size(free)} free at {existing}, but the cache may grow to "
                f"{show_size(self._config.cache_size)}",
                f"use --cache-size {max(room // 2 >> 20, 1)}M, or another directory with --cache-dir",
            )
        else:
            yield Result("ok", f"{show_size(free)} free at {existing}")


def _used(directory: Path) -> int:
    """Return the bytes on disk below ``directory``."""
    total = 0
    for root, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(root, name)).st_blocks * 512
    return total
