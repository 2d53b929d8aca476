"""Checking and converting the values of settings, and sizes and mount options as people write them.

Each converter returns the value, or raises ValueError with the end of a sentence about it, such as "must be a
string". It takes any object that TOML or the command line may hold.
"""

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping

Converter = Callable[[object], object]


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if not value:
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


def printable(value: object) -> str:
    """Convert a text that becomes part of an IMAP command or an HTTP request."""
    found = text(value)
    if any(ord(char) < 32 or ord(char) == 127 for char in found):
        raise ValueError("must not contain control characters")
    # Arguments that are not UTF-8 arrive as surrogates, which no IMAP command can carry.
    if any("\ud800" <= char <= "\udfff" for char in found):
        raise ValueError("must be UTF-8")
    return found


def user(value: object) -> str:
    if value == "":
        raise ValueError("has no user")
    return printable(value)


def host(value: object) -> str:
    """Convert a host name or an address to lower case; an IPv6 address has no brackets."""
    if value == "":
        raise ValueError("has no host")
    found = text(value).lower()
    if ":" in found:
        try:
            return str(ipaddress.IPv6Address(found))
        except ValueError:
            raise ValueError("has no valid IPv6 address") from None
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", found):
        raise ValueError("has no valid host name")
    return found


def mailbox(value: object) -> str | None:
    """Convert a path to one without outer slashes; None for the whole account."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    path = value.strip("/")
    return printable(path) if path else None


def integer(minimum: int, maximum: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return value

    return convert


port = integer(1, 65535)


def seconds(maximum: int) -> Callable[[object], float]:
    def convert(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("must be a number of seconds")
        if not math.isfinite(value) or not 0 < value <= maximum:
            raise ValueError(f"must be more than 0 and at most {maximum} seconds")
        return float(value)

    return convert


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in choices:
            named = ", ".join(f'"{one}"' for one in choices[:-1])
            raise ValueError(f'must be {named} or "{choices[-1]}"')
        return str(value)

    return convert


def fingerprint(value: object) -> str:
    digits = text(value).replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("must be a SHA-256 fingerprint: 64 hexadecimal digits, with or without colons")
    return digits


def https_url(value: object) -> str:
    url = printable(value)
    # What is sent there is worth as much as a password.
    if not re.fullmatch(r"https://[^/?#@\s]+(/[^\s#]*)?", url):
        raise ValueError("must be an https:// address")
    return url


# ---- Sizes


def size(value: object) -> int:
    """Convert a number of bytes, or a text that `parse_size` takes."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return parse_size(text(value))


def size_or_zero(value: object) -> int:
    return 0 if value in ("0", 0) else size(value)


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?B)?|B)?", re.IGNORECASE | re.ASCII)


def parse_size(size: str) -> int:
    """Return the bytes in ``1073741824``, ``500M`` or ``10GiB`` (powers of 1024), ``500MB`` (of 1000).

    Raises ValueError, also for less than one byte.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None or len(size) > 30:
        raise ValueError("not a size: write for example 500M, 10GiB or a number of bytes")
    number, unit, suffix = match.groups()
    base = 1000 if suffix is not None and suffix.upper() == "B" else 1024
    factor = base ** ("KMGT".index(unit.upper()) + 1) if unit else 1
    count = int(number) * factor if number.isdecimal() else int(float(number) * factor)
    if not 1 <= count < 2**63:
        raise ValueError("not a usable size: it must be at least one byte and less than 8 EiB")
    return count


def show_size(count: float) -> str:
    """Return a number of bytes for people: ``1.5 GiB``, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


# ---- Mount options

_OPPOSITES: Mapping[str, str] = {
    "atime": "noatime",
    "dev": "nodev",
    "exec": "noexec",
    "suid": "nosuid",
}
_OPPOSITE = {**_OPPOSITES, **{off: on for on, off in _OPPOSITES.items()}}
_PASSED = frozenset({"allow_other", "allow_root", *_OPPOSITE})
# Options that mount(8) and fstab(5) allow for every file system, and those that hold for imapfs anyway.
_IGNORED = frozenset(
    {"_netdev", "async", "auto", "default_permissions", "defaults", "group", "noauto", "nofail", "nouser"}
    | {"owner", "relatime", "user", "users"}
)


def mount_options(value: object) -> list[str]:
    """Convert a string of mount options, or a list of such strings, to a list of known options."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise ValueError("must be a string or a list of strings")
    names = [name for one in texts for name in one.split(",") if name]
    sort_mount_options(names)
    return names


def sort_mount_options(names: Iterable[str]) -> tuple[bool | None, frozenset[str]]:
    """Return whether mount options ask for read-only (None: neither ro nor rw), and the others.

    The others are what fusermount3 and libfuse understand. The later of two contradicting options wins, as
    with mount(8). Options that only concern fstab(5) are dropped. Raises ValueError for unknown ones.
    """
    read_only: bool | None = None
    passed: set[str] = set()
    for name in names:
        if name in ("ro", "rw"):
            read_only = name == "ro"
        elif name in _PASSED:
            passed.discard(_OPPOSITE.get(name, ""))
            passed.add(name)
        elif name not in _IGNORED and not name.startswith(("x-", "comment=")):
            raise ValueError(f"unknown mount option {name!r}; known are ro, rw, {', '.join(sorted(_PASSED))}")
    return read_only, frozenset(passed)
