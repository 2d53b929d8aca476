"""What a step of ``imapfs check`` reports."""

from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "failed", "skipped"]


class Finding(NamedTuple):
    """A result, with the name of its step; these are the fields of ``--json``."""

    step: str
    status: Verdict
    """``warning``: a mount works, but not as well as it could."""
    detail: str
    remedy: str = ""


class Result(NamedTuple):
    """What a step yields."""

    status: Verdict
    detail: str
    remedy: str = ""
