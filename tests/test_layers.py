"""The layers of the program: imports go downward only, and each foreign library has one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "imapfs"
LAYERS = (
    {"__main__", "manual"},
    {"fstab"},
    {"cli"},
    {"parameters"},
    {"setup"},
    {"accounts", "discovery"},
    {"daemon", "download", "check", "watch"},
    {"config"},
    {"credentials", "consent", "settings"},
    {"oauth"},
    {"keystore", "webform"},
    {"apart"},
    {"fuse", "mounts", "machine", "systemd", "desktop"},
    {"xattrs", "announce"},
    {"vfs", "feed"},
    {"files", "upload"},
    {"append", "ahead"},
    {"fetch", "operations", "push"},
    {"sync", "spool", "sample"},
    {"moves"},
    {"bodies", "freshness", "events"},
    {"cache"},
    {"database"},
    {"imap.pool", "imap.idle"},
    {"imap.session"},
    {"imap.login", "imap.probe"},
    {"imap.wire"},
    {"imap.connect", "imap.sasl", "imap.refusals"},
    {"imap.grammar", "imap.throttle", "imap.backoff", "imap.trace", "network"},
    {"names", "headers", "providers"},
    {"errors", "caller", "redact"},
    {"model"},
    {"", "imap"},
)
"""From the top: a module imports from layers below its own only; "" is the package itself."""
DOORS = {
    "pyfuse3": {"fuse"},
    "imapclient": {"imap.wire"},
    "imaplib": {"imap.wire"},
    "sqlite3": {"database"},
    "dns": {"discovery"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what is imported anywhere in a module, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(name: str, known: set[str]) -> str | None:
    """The module of this package that an imported name is in; None for another package's."""
    parts = name.split(".")
    if parts[0] != "imapfs":
        return None
    while ".".join(parts[1:]) not in known:
        parts.pop()
    return ".".join(parts[1:])


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_only(module: str) -> None:
    levels = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert module in levels, f"imapfs.{module} belongs to no layer"
    for name in imports(MODULES[module]):
        target = inner(name, set(MODULES))
        if target is not None:
            assert levels[target] > levels[module], f"imapfs.{module} imports {name}, which is not below it"


@pytest.mark.parametrize("library", DOORS)
def test_library_is_known_to_one_module_only(library: str) -> None:
    users = {
        module
        for module, tree in MODULES.items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }
    assert users == DOORS[library]
