"""Makes a package for Debian of a wheel: what it needs comes from Debian. See scripts/release."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Final

PROGRAMS: Final = {
    "usr/bin/imapfs": "imapfs.cli.main",
    # Where mount(8) looks for it.
    "usr/sbin/mount.imapfs": "imapfs.cli.fstab",
}
_PROGRAM: Final = """\
#!/usr/bin/python3
import sys

from {module} import main

sys.exit(main())
"""
_SCRIPTS: Final = {
    "postinst": '#!/bin/sh\nset -e\nif [ "$1" = configure ]; then py3compile -p imapfs; fi\n',
    "prerm": "#!/bin/sh\nset -e\npy3clean -p imapfs\n",
}
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9]+)((?:[<>]=?[\d.]+,?)+)")
_BOUND: Final = re.compile(r"(<|>=)([\d.]+)")


def main(arguments: list[str]) -> int:
    """Write DIRECTORY/imapfs_VERSION_all.deb."""
    parser = argparse.ArgumentParser(prog="scripts/deb.py", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("directory", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made) / "imapfs"
        about = unpack(given.wheel, root)
        package = given.directory / f"imapfs_{about['Version']}_all.deb"
        write_control(root, about)
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, package], check=True)
    return 0


def unpack(wheel: Path, root: Path) -> Message:
    """Put the files of a wheel where Debian has them; return the wheel's metadata."""
    packages = root / "usr/lib/python3/dist-packages"
    packages.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (data,) = packages.glob("*.data")
    shutil.move(data / "data/share", root / "usr/share")
    shutil.rmtree(data)
    (info,) = packages.glob("*.dist-info")
    # What these two say is for pip.
    for name in ("RECORD", "WHEEL"):
        (info / name).unlink()
    documents = root / "usr/share/doc/imapfs"
    documents.mkdir(parents=True)
    shutil.move(info / "licenses/LICENSE", documents / "copyright")
    (info / "licenses").rmdir()
    for where, module in PROGRAMS.items():
        program = root / where
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(_PROGRAM.format(module=module))
    for page in (root / "usr/share/man").rglob("*.[1-8]"):
        subprocess.run(["gzip", "-9n", page], check=True)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() or str(path.relative_to(root)) in PROGRAMS else 0o644)
    return Parser().parsestr((info / "METADATA").read_text())


def write_control(root: Path, about: Message) -> None:
    """Write what dpkg wants to know."""
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    lines = [
        "Package: imapfs",
        f"Version: {about['Version']}",
        "Architecture: all",
        "Maintainer: The imapfs authors <imapfs@localhost>",
        f"Installed-Size: {size // 1024 + 1}",
        f"Depends: {', '.join(depends(about))}",
        "Section: mail",
        "Priority: optional",
        f"Description: {about['Summary']}",
        " Programs that can open a file can work with mail: file managers, grep, rsync.",
        " Renaming, deleting and tagging a file do that to the message on the server.",
    ]
    control = root / "DEBIAN"
    control.mkdir()
    (control / "control").write_text("\n".join(lines) + "\n")
    for name, text in _SCRIPTS.items():
        (control / name).write_text(text)
        (control / name).chmod(0o755)


def depends(about: Message) -> Iterator[str]:
    """Return the packages of Debian that have what the wheel requires. Raises ValueError."""
    yield "fuse3"
    yield f"python3 (>= {about['Requires-Python'].removeprefix('>=')})"
    for requirement in about.get_all("Requires-Dist", []):
        found = _REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise ValueError(f"this requirement is not understood: {requirement}")
        for sign, version in _BOUND.findall(found[2]):
            yield f"python3-{found[1]} ({'<<' if sign == '<' else sign} {version})"


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(sys.argv[1:]))
