"""The layers of the program: imports go downward only, and each foreign library has one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imapfs"
LAYERS = ("cli", "daemon", "kernel", "fs", "sync", "store", "account", "imap", "")
"""From the top: a package imports from itself and those behind it; "" are the modules outside packages."""
DOORS = {
    "pyfuse3": {"kernel.adapter"},
    "imapclient": {"encoding"},
    "imaplib": set(),
    "sqlite3": {"store.database"},
    "dns": {"account.discovery"},
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


def layer(module: str) -> int:
    """The number of a module's package, from the top; that of `imapfs.__main__` is the command line's."""
    package, dot, _ = module.partition(".")
    return 0 if module == "__main__" else LAYERS.index(package if dot or package in LAYERS else "")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_only(module: str) -> None:
    for name in imports(MODULES[module]):
        target = inner(name, set(MODULES))
        if target is not None:
            assert layer(target) >= layer(module), f"imapfs.{module} imports {name}, which is not below it"


def test_no_module_imports_itself_in_a_circle() -> None:
    below = {
        module: {inner(name, set(MODULES)) for name in imports(tree)} for module, tree in MODULES.items()
    }
    left = {module: targets - {module, None} for module, targets in below.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left


@pytest.mark.parametrize("library", DOORS)
def test_library_is_known_to_one_module_only(library: str) -> None:
    users = {
        module
        for module, tree in MODULES.items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }
    assert users == DOORS[library]
