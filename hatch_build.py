"""Puts the manual pages and the shells' completion, made from the commands, into the wheel."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GeneratedFiles(BuildHookInterface[Any]):
    """For the wheel only: a source distribution holds what they are made from."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's interface
        """Write the files, and say where they go below the prefix of an installation."""
        sys.path.insert(0, self.root)
        try:
            from imapfs.cli.manual import generated
        finally:
            sys.path.remove(self.root)
        self._directory = tempfile.TemporaryDirectory(prefix="imapfs-build-")
        for number, (path, text) in enumerate(generated().items()):
            file = Path(self._directory.name) / str(number)
            file.write_text(text)
            build_data["shared_data"][str(file)] = path

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """They are in the wheel now."""
        self._directory.cleanup()
