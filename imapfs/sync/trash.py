"""Which mailbox is the Trash. `rm` must not destroy a message because a server names none.

In this order: the setting ``trash``; the mailbox that the server marks as ``\\Trash`` (RFC 6154), or that was
made here; a mailbox that is known by its name. The last one only takes mail in: what is in it is deleted for
good only after the user has named it.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from imapfs.model import ROOT, Ino
from imapfs.store.cache import Cache

NAME: Final = b"Trash"
"""The name of one that is made, as most clients make it."""

NAMES: Final = tuple(
    name.casefold()
    for name in (
        # Dovecot, Cyrus, Courier, Fastmail, Thunderbird, Apple Mail, Outlook, Exchange, in English.
        "Trash", "Deleted Items", "Deleted Messages", "Deleted", "Bin", "Trash Can", "Rubbish",
        # The same mail programs and large providers (GMX, Orange, Libero, Terra, WP, Mail.ru, QQ, NetEase,
        # Naver, Yahoo Japan) in the languages of their users.
        "Papierkorb", "Gelöscht", "Gelöschte Elemente", "Gelöschte Objekte", "Gelöschte Nachrichten",
        "Corbeille", "Éléments supprimés", "Messages supprimés", "Cestino", "Posta eliminata",
        "Papelera", "Elementos eliminados", "Mensajes eliminados", "Lixeira", "Lixo", "Itens excluídos",
        "Itens eliminados", "Prullenbak", "Prullenmand", "Verwijderde items", "Papperskorgen",
        "Borttagna objekt", "Papirkurv", "Slettet post", "Slettede elementer", "Roskakori", "Poistetut",
        "Kosz", "Elementy usunięte", "Koš", "Odstraněná pošta", "Kuka", "Törölt elemek", "Coș de gunoi",
        "Elemente șterse", "Κάδος απορριμμάτων", "Διαγραμμένα", "Корзина", "Удаленные", "Удалённые", "Кошик",
        "Çöp Kutusu", "Silinmiş Öğeler", "ゴミ箱", "削除済みアイテム", "已删除", "已删除邮件", "已刪除的郵件",
        "휴지통", "지운 편지함",
    )
)  # fmt: skip


def known_by_name(paths: Iterable[tuple[bytes, ...]]) -> tuple[bytes, ...] | None:
    """Return the mailbox at the top, or directly below INBOX, with the name that is first in `NAMES`."""

    def rank(path: tuple[bytes, ...]) -> int:
        within = path[1:] if len(path) == 2 and path[0] == b"INBOX" else path
        name = within[0].decode("utf-8", "replace").casefold() if len(within) == 1 else ""
        return NAMES.index(name) if name in NAMES else len(NAMES)

    first = min(paths, key=rank, default=())
    return first if rank(first) < len(NAMES) else None


class Trash(NamedTuple):
    """The Trash of an account."""

    ino: Ino
    why: Literal["setting", "special-use", "name"]

    @property
    def is_sure(self) -> bool:
        """Whether what is in it may be deleted for good."""
        return self.why != "name"


class TrashFinder:
    """Finds the Trash in the cache. ``setting`` is its path in the mount, if the user has named it."""

    def __init__(self, cache: Cache, setting: str | None) -> None:
        self._cache = cache
        self._setting = setting

    @property
    def may_make(self) -> bool:
        """Whether a mailbox may be made as Trash: unless the user has named one."""
        return self._setting is None

    def find(self) -> Trash | None:
        """Return the Trash, or None if there is none."""
        if self._setting is not None:
            ino = self._cache.directory_at(tuple(self._setting.strip("/").encode().split(b"/")))
            return None if ino is None else Trash(ino, "setting")
        marked = self._cache.special_use("\\Trash")
        if marked is not None:
            return Trash(marked, "special-use")
        inbox = self._cache.directory_at((b"INBOX",))
        found = {
            (*above, node.name): box
            for parent, above in ((ROOT, ()), (inbox, (b"INBOX",)))
            if parent is not None
            for node in self._cache.directories(parent)
            if node.name is not None
            and (box := self._cache.mailbox(node.ino)) is not None
            and box.selectable
            and box.server_name is not None
        }
        path = known_by_name(found)
        if path is None:
            return None
        box = found[path]
        return Trash(box.ino, "special-use" if self._cache.made_trash == box.server_name else "name")
