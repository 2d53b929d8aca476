"""Extended attributes of messages, drafts and mailboxes: what each means, read and written.

``user.imap.flags`` has all flags of a message, ``user.imap.seen`` and the like have one each, and
``user.xdg.tags``, which file managers can edit, has the keywords. The names ``user.xdg.origin.*`` and
``user.mime_type`` follow the freedesktop.org conventions.
"""

import contextlib
import re
from collections.abc import Callable
from functools import partial
from typing import Final

from imapfs.errors import Invalid, NoAttribute, NotPermitted, NotSupported
from imapfs.fs.refresh import DirectoryRefresher
from imapfs.fs.tree import MailTree
from imapfs.imap.grammar import format_iso
from imapfs.imap.pool import SessionPool
from imapfs.imap.session import Session
from imapfs.log import printable
from imapfs.model import ROOT, Ino
from imapfs.store.cache import Cache
from imapfs.store.rows import Details, Mailbox
from imapfs.store.spool import Draft, Spool
from imapfs.sync.flags import FlagChanger
from imapfs.sync.mailbox_list import display_name
from imapfs.sync.upload import Uploader

_SYSTEM_FLAGS: Final = {
    b"user.imap.seen": "\\Seen",
    b"user.imap.answered": "\\Answered",
    b"user.imap.flagged": "\\Flagged",
    b"user.imap.deleted": "\\Deleted",
    b"user.imap.draft": "\\Draft",
}
_FLAGS: Final = b"user.imap.flags"
_TAGS: Final = b"user.xdg.tags"
_WRITABLE: Final = frozenset({_FLAGS, _TAGS, *_SYSTEM_FLAGS})
_STATE: Final = b"user.imap.state"
_MAILBOX_NUMBERS: Final = (
    b"user.imap.uidvalidity",
    b"user.imap.uidnext",
    b"user.imap.messages",
    b"user.imap.unseen",
)
_FLAG = re.compile(r"\\?[!#$&'+,\-./0-9:;<=>?@A-Z^_`a-z|~\[}]+")
"""RFC 9051 section 9: flag-keyword is an atom, which may have ``[`` and ``}``. Some servers refuse ``]``."""

Change = Callable[[list[str]], tuple[set[str], set[str]]]
"""Takes the flags of a message, and returns those to add and those to remove."""


class ExtendedAttributes:
    """Reads and writes the extended attributes of messages, drafts and directories."""

    def __init__(
        self,
        tree: MailTree,
        refresher: DirectoryRefresher,
        cache: Cache,
        spool: Spool,
        pool: SessionPool,
        flags: FlagChanger,
        uploader: Uploader,
        list_all: bool,
    ) -> None:
        self._tree = tree
        self._refresher = refresher
        self._cache = cache
        self._spool = spool
        self._pool = pool
        self._flags = flags
        self._uploader = uploader
        self.lists_all = list_all

    # -- reading -------------------------------------------------------------------------------------------

    async def get(self, ino: Ino, name: bytes) -> bytes:
        """Return the value of an attribute. Raises NoAttribute, or NotSupported outside ``user.``"""
        if not name.startswith(b"user."):
            raise NotSupported("only user attributes")
        if not name.startswith((b"user.imap.", b"user.xdg.", b"user.mime_type")):
            raise NoAttribute("no such attribute")
        found = self._file(ino)
        if found is None:
            found = await self._directory(ino, ask=name in _MAILBOX_NUMBERS)
        try:
            return found[name]
        except KeyError:
            raise NoAttribute("no such attribute") from None

    def names(self, ino: Ino) -> list[bytes]:
        """Return the names of the attributes, without asking the server.

        Programs that copy attributes set all that are listed, and fail if one cannot be set. So the others
        are listed only if the user wants that; they can be read in any case.
        """
        found = self._file(ino)
        if found is not None:
            return [name for name in found if self.lists_all or name in _WRITABLE]
        if not self.lists_all:
            return []
        names: list[bytes] = []
        mailbox = self._cache.mailbox(self._tree.node(ino).ino)
        if mailbox is not None and mailbox.server_name is not None:
            names += _mailbox(mailbox)
            if mailbox.selectable:
                names += _MAILBOX_NUMBERS
        return names

    def _file(self, ino: Ino) -> dict[bytes, bytes] | None:
        """Return the attributes of a message or draft; None for a directory."""
        draft = self._spool.get(ino)
        if draft is not None:
            return _draft(draft)
        details = self._cache.details(ino)
        if details is None:
            return None
        return _message(details, self._cache.mailbox(details.parent))

    async def _directory(self, ino: Ino, *, ask: bool) -> dict[bytes, bytes]:
        """Return the attributes of a directory; ``ask``: those that may need the server."""
        ino = self._tree.node(ino).ino
        mailbox = self._cache.mailbox(ino)
        if mailbox is None or mailbox.server_name is None:
            return {}
        name = mailbox.server_name
        if not ask or not mailbox.selectable:
            return _mailbox(mailbox)
        if mailbox.complete:
            await self._refresher.mailbox(ino)
            mailbox = self._cache.mailbox(ino) or mailbox
            messages, unseen = self._cache.counts(ino)
            numbers = {
                "UIDVALIDITY": int(mailbox.uidvalidity),
                "UIDNEXT": mailbox.uidnext,
                "MESSAGES": messages,
                "UNSEEN": unseen,
            }
        else:
            # STATUS is enough: there is no need to list a mailbox only to count its messages.
            numbers = await self._pool.run(partial(Session.status, mailbox=name))
        return {f"user.imap.{key.lower()}".encode(): b"%d" % number for key, number in numbers.items()}

    # -- writing -------------------------------------------------------------------------------------------

    async def set(self, ino: Ino, name: bytes, value: bytes) -> None:
        """Set an attribute. This changes flags, on the server if the file is a message."""
        if not name.startswith(b"user."):
            raise NotSupported("only user attributes")
        if name == _STATE:
            if value != b"sending":
                raise Invalid("the only state that can be set is 'sending', which tries the upload again")
            if ino == ROOT:
                self._pool.try_now()
            else:
                self._retry(ino)
            return
        try:
            change = _change(name, value)
        except NotSupported:
            with contextlib.suppress(NoAttribute):
                if await self.get(ino, name) == value:
                    return  # a program copies it to where it is already
            raise
        await self._change(ino, change)

    async def remove(self, ino: Ino, name: bytes) -> None:
        """Remove an attribute, which removes the flags that it stands for."""
        if name in _SYSTEM_FLAGS or name in {_FLAGS, _TAGS}:
            await self._change(ino, _change(name, b""))
            return
        if self._file(ino) is None or name not in (self._file(ino) or {}):
            raise NoAttribute("no such attribute")
        raise NotPermitted("this attribute cannot be removed")

    async def _change(self, ino: Ino, change: Change) -> None:
        draft = self._spool.get(ino)
        if draft is None:
            if self._tree.node(ino).is_dir:
                raise NotSupported("a mailbox has no flags")
            await self._flags.change(ino, change)
            # A program may have begun a new version meanwhile, with the previous flags.
            draft = self._spool.get(ino)
        if draft is not None:
            draft.change_flags(change)

    def _retry(self, ino: Ino) -> None:
        """Try to upload a refused draft again."""
        draft = self._spool.get(ino)
        if draft is None or draft.state != "unsent":
            raise Invalid("it is not in the state 'unsent'")
        draft.dirty = False
        self._uploader.submit(draft, now=True)


def _change(name: bytes, value: bytes) -> Change:
    """Return the change of flags that setting an attribute means. Raises NotSupported, Invalid."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise Invalid("flags must be UTF-8 text") from None
    if name in _SYSTEM_FLAGS:
        if text.strip() not in {"", "0", "1"}:
            raise Invalid("the value must be 1 or 0")
        return partial(_one, _SYSTEM_FLAGS[name], text.strip() == "1")
    if name == _FLAGS:
        return partial(_all, _checked(text.split()), lambda _: True)
    if name == _TAGS:
        tags = [tag.strip().replace(" ", "_") for tag in text.split(",")]
        keywords = _checked([tag for tag in tags if tag])
        if any(tag.startswith("\\") for tag in keywords):
            raise Invalid("a tag cannot begin with a backslash")
        return partial(_all, keywords, lambda flag: not flag.startswith("\\"))
    raise NotSupported("this attribute cannot be set")


def _checked(flags: list[str]) -> list[str]:
    for flag in flags:
        if not _FLAG.fullmatch(flag) or flag.lower() == "\\recent":
            raise Invalid(f"{flag} is not a valid flag")
    return flags


def _one(flag: str, wanted: bool, has: list[str]) -> tuple[set[str], set[str]]:
    same = {f for f in has if f.lower() == flag.lower()}
    if wanted:
        return (set() if same else {flag}), set()
    return set(), same


def _all(wanted: list[str], concerned: Callable[[str], bool], has: list[str]) -> tuple[set[str], set[str]]:
    lower = {flag.lower() for flag in wanted}
    has_lower = {flag.lower() for flag in has}
    add = {flag for flag in wanted if flag.lower() not in has_lower}
    return add, {flag for flag in has if concerned(flag) and flag.lower() not in lower}


def _mailbox(mailbox: Mailbox) -> dict[bytes, bytes]:
    found = {b"user.imap.mailbox": printable(display_name(mailbox.server_name or b""), 4096).encode()}
    if mailbox.special_use:
        found[b"user.imap.special_use"] = mailbox.special_use.encode()
    return found


def _flag_attributes(text: str) -> dict[bytes, bytes]:
    flags = text.split()
    lower = {flag.lower() for flag in flags}
    found = {_FLAGS: text.encode()}
    for name, flag in _SYSTEM_FLAGS.items():
        found[name] = b"1" if flag.lower() in lower else b"0"
    found[_TAGS] = printable(",".join(flag for flag in flags if not flag.startswith("\\")), 32768).encode()
    return found


def _draft(draft: Draft) -> dict[bytes, bytes]:
    state = "sending" if draft.state == "open" else draft.state
    found = {_STATE: state.encode(), **_flag_attributes(draft.flags)}
    if draft.error:
        found[b"user.imap.error"] = printable(draft.error).encode("utf-8", "replace")
    return found


def _message(details: Details, mailbox: Mailbox | None) -> dict[bytes, bytes]:
    found = {
        "user.imap.uid": str(details.uid),
        "user.imap.uidvalidity": str(mailbox.uidvalidity if mailbox else 0),
        "user.imap.internaldate": format_iso(details.date, details.zone),
        "user.mime_type": "message/rfc822",
    }
    if details.modseq:
        found["user.imap.modseq"] = str(details.modseq)
    origin = (("subject", details.subject), ("from", details.from_), ("message-id", details.message_id))
    for key, value in origin:
        if value:
            found[f"user.xdg.origin.email.{key}"] = printable(value, 2000)
    encoded = {key.encode(): value.encode("utf-8", "replace") for key, value in found.items()}
    return _flag_attributes(details.flags) | encoded
