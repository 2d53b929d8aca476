"""Scratch directories: directories that begin with a dot, for the temporary files of programs.

No server has them. What is in one stays on this computer, whatever its name, until it is renamed out. Some
programs put every file that they transfer into such a directory first (``rsync --delay-updates``).

The cache has a scratch directory as a node without a mailbox. It can be rebuilt, so the paths are recorded
beside the spool, and that is durable before a program is told that the directory exists.
"""

import json
import logging
from pathlib import Path
from typing import Final

from imapfs.atomic import replace_file
from imapfs.errors import CacheError, NotPermitted
from imapfs.fs.tree import MailTree
from imapfs.log import report, shown_path
from imapfs.model import Ino
from imapfs.names import as_bytes, as_text, is_file_name
from imapfs.store.cache import Cache
from imapfs.store.rows import Node
from imapfs.store.spool import Spool
from imapfs.sync.changes import ChangeHub, Changes

log = logging.getLogger(__name__)

_RECORD: Final = "directories.json"
_RESERVED: Final = {b".text", b".parts", b".search", b".maildir"}
"""Names of views to come."""

_Path = tuple[bytes, ...]
"""Names from the account's root."""


def check_scratch_name(name: bytes) -> None:
    """Raise NotPermitted for a name that no scratch directory may have."""
    if name in _RESERVED:
        raise NotPermitted("this name is reserved")
    if name.lower().startswith(b".trash"):
        # File managers then offer to delete permanently, which is an unlink.
        raise NotPermitted("the account has its own Trash")


class ScratchDirectories:
    """The scratch directories of a mount."""

    def __init__(self, tree: MailTree, cache: Cache, spool: Spool, hub: ChangeHub) -> None:
        self._tree = tree
        self._cache = cache
        self._spool = spool
        self._hub = hub
        self._file = spool.directory / _RECORD
        self._paths: dict[Ino, _Path] = {}

    def restore(self) -> None:
        """Make the directories of an earlier mount again, where the cache does not have them.

        Called before drafts are placed. Raises nothing.
        """
        found: dict[_Path, Ino] = {}
        for path in sorted(_load(self._file), key=lambda path: (len(path), path)):
            try:
                found[path] = self._restore(path, found.get(path[:-1]))
            except CacheError as error:
                report(error, f"the scratch directory {shown_path(path)} is not shown")
        self._paths = {ino: path for path, ino in found.items()}
        self.follow()

    def _restore(self, path: _Path, parent: Ino | None) -> Ino:
        """Return the directory with a path. ``parent`` is the scratch directory that it is in, if any."""
        ino = self._cache.directory_at(path) if parent is None else self._directory(parent, path[-1])
        if ino is not None and self._tree.is_scratch(ino):
            return ino
        if parent is None:
            parent = self._cache.directory_at(path[:-1])
        if parent is None:
            parent = self._tree.root  # its mailbox was deleted
        return self._cache.add_local_directory(parent, self._free_name(parent, path[-1])).ino

    def _directory(self, parent: Ino, name: bytes) -> Ino | None:
        node = self._cache.child(parent, name)
        return None if node is None else node.ino

    def make(self, parent: Ino, name: bytes) -> Node:
        """Make a directory; durable when this returns. Raises NotPermitted, CacheError."""
        check_scratch_name(name)
        made = self._cache.add_local_directory(parent, name)
        self._paths[made.ino] = self._cache.path(made.ino)
        try:
            self._save()
        except CacheError:
            del self._paths[made.ino]
            self._cache.remove_local_directory(made.ino)
            raise
        return made

    def rename(self, ino: Ino, parent: Ino, name: bytes) -> None:
        """Give a directory another place. Raises NotPermitted if it would no longer be local."""
        if not name.startswith(b".") and not self._tree.is_scratch(parent):
            raise NotPermitted("a directory for temporary files cannot become a mailbox")
        check_scratch_name(name)
        self._paths.setdefault(ino, self._cache.path(ino))
        self._cache.move_local_directory(ino, parent, name)
        self.follow()

    def remove(self, ino: Ino) -> None:
        """Remove a directory that is empty."""
        self._cache.remove_local_directory(ino)
        self._paths.pop(ino, None)
        self._try_save()

    def on_changes(self, changes: Changes) -> None:
        """Follow mailboxes that were renamed; move the directories of deleted ones to the top."""
        if not self._paths or not (changes.added or changes.gone or changes.moved):
            return
        gone = {node.ino for node in changes.gone if node.is_dir}
        for ino, path in list(self._paths.items()) if gone else ():
            node = self._cache.node(ino)
            if node is not None and node.parent in gone:
                root = self._tree.root
                name = self._free_name(root, path[-1])
                try:
                    self._cache.move_local_directory(ino, root, name)
                except CacheError as error:
                    report(error, f"the scratch directory {shown_path(path)} is not shown")
                    continue
                shown = shown_path(path)
                log.warning("%s: its mailbox was deleted; it is now at the top of the mount", shown)
                self._hub.publish(Changes(root, added=[(ino, name)]))
        self.follow()

    def _free_name(self, parent: Ino, name: bytes) -> bytes:
        free, n = name, 1
        while self._tree.child(parent, free) is not None:
            n += 1
            free = b"%s~%d" % (name[:240], n)
        return free

    def follow(self) -> None:
        """Bring the record, and the paths of the files within, up to date with the cache."""
        moved = {}
        for ino, path in self._paths.items():
            now = self._cache.path(ino)
            if now != path:
                moved[path] = self._paths[ino] = now
        if not moved:
            return
        self._try_save()
        for draft in self._spool:
            if draft.path in moved:
                draft.path = moved[draft.path]
                self._spool.try_save(draft)

    def _try_save(self) -> None:
        try:
            self._save()
        except CacheError as error:
            report(error, "scratch directories are not recorded")

    def _save(self) -> None:
        record = [[as_text(name) for name in path] for path in self._paths.values()]
        try:
            replace_file(self._file, json.dumps(record).encode(), durable=True)
        except OSError as error:
            raise CacheError.from_os_error(error, f"cannot write {self._file}") from None


def _load(file: Path) -> set[_Path]:
    try:
        found = json.loads(file.read_bytes())
        paths = {tuple(map(as_bytes, path)) for path in found}
        if not all(path and all(map(is_file_name, path)) for path in paths):
            raise ValueError("a path is not valid")
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): what is in scratch directories is at the top", file, error)
        return set()
    return paths
