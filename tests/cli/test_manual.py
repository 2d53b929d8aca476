"""Help, manual pages, README and completion say the same, because they are made from the same."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from imapfs.account.settings import OAUTH_SETTINGS, SETTINGS
from imapfs.cli import manual
from imapfs.cli.fstab import helper
from imapfs.cli.main import all_commands
from tests.support.mounting import DEADLINE, ROOT, Mounter
from tests.support.servers.dovecot import Account

PAGES = [path for path in manual.generated() if "/man/" in path]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is generated, as an installation has it."""
    directory = tmp_path_factory.mktemp("prefix")
    for path, text in manual.generated().items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    return directory


def rendered(page: Path) -> str:
    command = ["groff", "-ww", "-man", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=110n", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert done.stderr == ""
    return done.stdout


# ---- Documentation and manual pages


def test_documentation_has_each_option_of_mount_as_help_has_it() -> None:
    rows = []
    context = click.Context(all_commands()["mount"])
    for parameter in all_commands()["mount"].params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
            names, (meaning, _, default) = record[0], record[1].partition("  [default: ")
            shown = names.replace("[", "").replace("]", "").replace("|", r"\|")
            rows.append(f"| `{shown}` | {meaning} | {default.removesuffix(']')} |")
    page = (ROOT / "docs/options.md").read_text().splitlines()
    start = page.index("| option | meaning | default |") + 2
    assert page[start : start + len(rows) + 1] == [*rows, ""], "\n".join(
        ["docs/options.md should have:", *rows]
    )


LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name
)
def test_each_link_in_the_documentation_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) < 1200
    assert {path.name for path in ROOT.glob("docs/*.md")} == set(re.findall(r"\(docs/(\w+\.md)", readme))


def test_no_command_declares_an_option_that_the_table_of_settings_has() -> None:
    flags = {f"--{setting.key}" for setting in SETTINGS} | {setting.flag for setting in SETTINGS}
    sources = [path.read_text() for path in (ROOT / "imapfs/cli").rglob("*.py") if path.name != "fstab.py"]
    declared = {
        argument.value
        for source in sources
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "click.option"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    assert "--json" in declared
    assert not declared & flags


@pytest.mark.parametrize("path", PAGES)
def test_page_is_clean_roff(prefix: Path, path: str) -> None:
    text = rendered(prefix / path)
    assert "imapfs" in text
    assert "\\" not in text


def test_page_has_every_command_and_option(prefix: Path) -> None:
    text = rendered(prefix / "share/man/man1/imapfs.1")
    for name, command in all_commands().items():
        assert f"   imapfs {name} " in text
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(option in text for option in parameter.opts)
    text = rendered(prefix / "share/man/man8/mount.imapfs.8")
    assert all(
        f"       {option.opts[0]}" in text for option in helper.params if isinstance(option, click.Option)
    )


def test_page_has_every_key_of_the_configuration_file(prefix: Path) -> None:
    lines = rendered(prefix / "share/man/man5/imapfs.toml.5").splitlines()
    for setting in (*SETTINGS, *OAUTH_SETTINGS):
        assert any(line.startswith(f"       {setting.key}") for line in lines)


def test_text_that_looks_like_a_request_comes_out_as_it_is(tmp_path: Path) -> None:
    hostile = ".so /etc/passwd 'quoted' \\fB -x ~ ^ `"
    (tmp_path / "page").write_text(f".TH X 1\n.SH NAME\nx\n{manual._paragraphs(hostile)}\n")
    assert hostile in rendered(tmp_path / "page")


# ---- Completion


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with two accounts and an ``imapfs`` in its bin."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/imapfs"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m imapfs "$@"\n')
    script.chmod(0o755)
    config = tmp_path / ".config/imapfs/config.toml"
    config.parent.mkdir(parents=True)
    account = 'host = "h"\nuser = "u"\n'
    config.write_text(f"[accounts.work]\n{account}[accounts.private]\n{account}")
    return tmp_path


_ASK = {
    "bash": """
        source $0; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        compopt() { echo "shell: $1 $2"; }
        _imapfs_completion imapfs; printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        compdef() {}; compadd() { eval "print -l -- \\${${@[-1]}}"; }; _path_files() { echo "shell: $*"; }
        _describe() { print -l -- "${(@)completions_with_descriptions%%:*}"; }
        source $0; words=("$@"); CURRENT=$#
        _imapfs_completion
    """,
    "fish": "source $argv[1]; complete -C (string join ' ' -- $argv[2..])",
}


def ask(shell: str, prefix: Path, home: Path, *words: str) -> list[str]:
    """What ``shell`` offers for the last of the words of a command line."""
    script = str(prefix / manual._COMPLETIONS[shell])
    done = subprocess.run(
        [shell, "-c", _ASK[shell], script, *words],
        env={"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.stderr == ""
    # fish explains after a tab.
    return [line.split("\t")[0] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    "shell", ["bash", *(name for name in ("zsh", "fish") if shutil.which(name) is not None)]
)
def test_shell_completes_commands_options_and_accounts(shell: str, prefix: Path, home: Path) -> None:
    assert ask(shell, prefix, home, "imapfs", "um") == ["umount"]
    assert ask(shell, prefix, home, "imapfs", "mount", "--cache-s") == ["--cache-size"]
    assert ask(shell, prefix, home, "imapfs", "mount", "--delete", "t") == ["trash"]
    assert ask(shell, prefix, home, "imapfs", "mount", "") == ["private", "work"]
    for command in ("mount", "check", "login"):
        assert ask(shell, prefix, home, "imapfs", command, "w") == ["work"]


def test_paths_are_left_to_the_shell(prefix: Path, home: Path) -> None:
    assert ask("bash", prefix, home, "imapfs", "mount", "work", "") == ["shell: -o dirnames"]
    assert ask("bash", prefix, home, "imapfs", "mount", "--all", "") == ["shell: -o dirnames"]
    assert ask("bash", prefix, home, "imapfs", "mount", "--ca-file", "x") == ["shell: -o default"]


def test_broken_configuration_completes_nothing(prefix: Path, home: Path) -> None:
    (home / ".config/imapfs/config.toml").write_text("[")
    assert ask("bash", prefix, home, "imapfs", "mount", "") == []


def test_mountpoints_are_completed_without_a_look_at_the_mount(
    prefix: Path, home: Path, user: Account, mount: Mounter
) -> None:
    made = mount(user)
    for command in ("umount", "watch", "sync", "retry", "status"):
        assert ask("bash", prefix, home, "imapfs", command, str(made.path)[:-2]) == [str(made.path)]
