"""Small numbers by inode, in a few bytes each: the kernel may know of a million inodes.

A dict takes more than a hundred bytes an entry. The inodes of messages are consecutive numbers, so that an
array for neighbours is hardly ever half empty.
"""

from array import array
from typing import Final, Literal

from imapfs.model import Ino

_BITS: Final = 8
_MASK: Final = (1 << _BITS) - 1
"""An array has a number for each value of the inode's lowest bits."""


class InodeTable:
    """A number for each inode; 0 for all that nothing was noted of.

    ``kind``: "Q" for 64 bits, "B" for 8 (see `array.array`).
    """

    def __init__(self, kind: Literal["Q", "B"]) -> None:
        self._kind = kind
        self._arrays: dict[int, array[int]] = {}
        self._length = 0

    def __len__(self) -> int:
        """Return how many inodes have a number other than 0."""
        return self._length

    def __getitem__(self, ino: Ino) -> int:
        numbers = self._arrays.get(ino >> _BITS)
        return 0 if numbers is None else numbers[ino & _MASK]

    def __setitem__(self, ino: Ino, number: int) -> None:
        self.add(ino, number - self[ino])

    def add(self, ino: Ino, n: int) -> None:
        """Add ``n`` to the number of an inode. Raises OverflowError if that is negative or too large."""
        numbers = self._arrays.get(ino >> _BITS)
        if numbers is None:
            if not n:
                return
            numbers = self._arrays[ino >> _BITS] = array(self._kind, [0]) * (_MASK + 1)
        place = ino & _MASK
        before = numbers[place]
        numbers[place] = after = before + n
        if not before and after:
            self._length += 1
        elif before and not after:
            self._length -= 1
            if not any(numbers):
                del self._arrays[ino >> _BITS]


class InodeSet:
    """A set of inodes."""

    def __init__(self) -> None:
        self._table = InodeTable("B")

    def __contains__(self, ino: Ino) -> bool:
        return bool(self._table[ino])

    def __len__(self) -> int:
        return len(self._table)

    def add(self, ino: Ino) -> None:
        """Add an inode, if it is not in the set."""
        self._table[ino] = 1

    def discard(self, ino: Ino) -> None:
        """Remove an inode, if it is in the set."""
        self._table[ino] = 0
