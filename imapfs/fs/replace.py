"""What happens to a file when another file gets its name.

Nothing is removed before its successor is in place. A draft that is being replaced is set aside, and restored
if the operation fails. A message is hidden, and removed from the server at the very end. Before it is hidden,
the draft that replaces it notes this on disk (`Draft.base`).

Some editors rename a file to a backup and then write a new file. A file that is created under the old name
within a few seconds is a new version of that message.
"""

import math
import time
from typing import Final

from imapfs.fs.files import Files
from imapfs.fs.tree import MailTree
from imapfs.model import Ino
from imapfs.names import is_message_name
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.store.spool import Base, Draft, Spool
from imapfs.sync.locate import Locator
from imapfs.sync.replaced import ReplacedMessages
from imapfs.sync.upload import Uploader

_MAX_EDITOR_PAUSE: Final = 10.0
"""Seconds between the rename of a file to its backup and the creation of the new file by an editor."""


class Replacement:
    """The file whose name is about to be given to another file, or that is about to be deleted.

    Used as a context manager around the operation, whose failure restores the file.
    """

    def __init__(self, replacer: "Replacer", draft: Draft | None, message: Node | None) -> None:
        self._replacer = replacer
        self.draft = draft
        """The draft, withdrawn from upload."""
        self.message = message
        """The message, or the message that the draft is a new version of."""

    def __enter__(self) -> "Replacement":
        if self.draft is not None:
            self._replacer.set_aside(self.draft)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.draft is None:
            return
        if kind is None:
            self._replacer.delete(self.draft)
        else:
            self._replacer.put_back(self.draft)


class Replacer:
    """Replaces drafts and messages of a mount."""

    def __init__(
        self,
        tree: MailTree,
        cache: Cache,
        spool: Spool,
        files: Files,
        locator: Locator,
        uploader: Uploader,
        replaced: ReplacedMessages,
    ) -> None:
        self._tree = tree
        self._cache = cache
        self._spool = spool
        self._files = files
        self._locator = locator
        self._uploader = uploader
        self._replaced = replaced
        self._renamed: dict[tuple[Ino, bytes], tuple[Ino, float]] = {}
        """Directory and name that a message had before an editor renamed it -> the message, and when."""
        self._versions: dict[tuple[Ino, bytes], tuple[Base, str, float]] = {}
        """The same for a new version that was not uploaded yet -> its base and flags, and when."""

    async def prepare(self, directory: Ino, name: bytes) -> Replacement:
        """Return what has a name, so that it can be replaced. A draft is withdrawn from upload.

        Raises ConnectionLost if only the server knows whether the draft was already uploaded.
        """
        target = self._tree.child(directory, name)
        if target is None or target.draft is None:
            return Replacement(self, None, target and target.node)
        if not await self._uploader.withdraw(target.draft):
            uploaded = self._tree.child(directory, name)
            return Replacement(self, None, uploaded and uploaded.node)
        return Replacement(self, target.draft, self._version_of(target.draft))

    def _version_of(self, draft: Draft) -> Node | None:
        """Return the message that a draft is a new version of."""
        node = self._cache.node(draft.ino)
        if node is None and draft.base is not None:
            node = self._locator.find(draft.base.ref)
        return node

    # -- drafts --------------------------------------------------------------------------------------------

    def set_aside(self, draft: Draft) -> None:
        """Free the name of a draft until `delete` or `put_back`."""
        self._spool.set_aside(draft)

    def delete(self, draft: Draft) -> None:
        """Delete a draft. Programs that have it open can still use it."""
        self._files.deleted(draft)
        self._spool.forget(draft)

    def put_back(self, draft: Draft) -> None:
        """Undo `set_aside` after a failure."""
        self._spool.put_back(draft)
        self.resubmit(draft)

    def resubmit(self, draft: Draft) -> None:
        """Submit a withdrawn draft for upload again, after a failure."""
        if self._spool.get(draft.ino) is draft and draft.state == "sending":
            self._uploader.submit(draft)

    # -- messages ------------------------------------------------------------------------------------------

    def make_version(self, draft: Draft, old: Node) -> None:
        """Have a draft replace a message when it is uploaded. It takes over the flags if it got none."""
        if (found := self._tree.reference(old)) is not None:
            keeps = draft.flagged or draft.base is not None
            draft.base, flags = found
            if not (keeps and draft.flags):
                draft.flags = flags

    async def remove(self, message: Node) -> None:
        """Remove a message whose successor is in place: now, or as soon as the server can be reached."""
        found = self._tree.reference(message)
        if found is not None:
            self._cache.hide(message.ino)
            await self._replaced.discard(found[0].ref)

    # -- editors -------------------------------------------------------------------------------------------

    def note_renamed(self, directory: Ino, name: bytes, new_name: bytes, ino: Ino) -> None:
        """Note that a message was renamed, if its new name is that of an editor's backup."""
        if is_message_name(name) and not is_message_name(new_name):
            self._renamed[directory, name] = ino, time.monotonic()

    def note_renamed_version(
        self, directory: Ino, name: bytes, new_name: bytes, base: Base, flags: str
    ) -> None:
        """Do as `note_renamed` for a new version of a message that an editor saves once more."""
        if is_message_name(name) and not is_message_name(new_name):
            self._versions[directory, name] = base, flags, time.monotonic()

    def continue_version(self, draft: Draft) -> None:
        """Let a new file go on as the version that an editor has just renamed from its name."""
        base, flags, at = self._versions.pop((draft.parent, draft.name), (None, "", -math.inf))
        if base is not None and time.monotonic() - at <= _MAX_EDITOR_PAUSE:
            draft.base, draft.flags = base, draft.flags or flags

    def just_renamed(self, directory: Ino, name: bytes) -> Node | None:
        """Return the message that an editor has just renamed from this name. It is returned only once."""
        ino, at = self.forget_renamed(directory, name)
        if ino is None or time.monotonic() - at > _MAX_EDITOR_PAUSE:
            return None
        return self._cache.node(ino)

    def forget_renamed(self, directory: Ino, name: bytes) -> tuple[Ino | None, float]:
        """Forget the message that had this name; return it, and when it was renamed."""
        return self._renamed.pop((directory, name), (None, -math.inf))
