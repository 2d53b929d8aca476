"""Adds the manual pages and shell completions, which are generated from the commands, to the wheel."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GeneratedFiles(BuildHookInterface[Any]):
    """For wheels only: a source distribution contains what the files are generated from."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's interface
        """Write the files, and add their paths below the prefix of an installation."""
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
        """Remove the files, which are in the wheel now."""
        self._directory.cleanup()
