"""The table of inodes holds what a dict would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imapfs.kernel.inode_table import InodeSet, InodeTable
from imapfs.model import Ino

INODES = st.one_of(st.integers(1, 600), st.integers(1 << 48, (1 << 48) + 600)).map(Ino)


@given(st.lists(st.tuples(INODES, st.integers(0, 3))))
def test_it_holds_the_last_number_of_each_inode(numbers: list[tuple[Ino, int]]) -> None:
    table, expected = InodeTable("Q"), dict[Ino, int]()
    for ino, number in numbers:
        table[ino] = expected[ino] = number
    assert {ino: table[ino] for ino in expected} == expected
    assert len(table) == sum(number > 0 for number in expected.values())


@given(st.lists(st.tuples(INODES, st.booleans())))
def test_a_set_of_inodes_is_a_set(changes: list[tuple[Ino, bool]]) -> None:
    found, expected = InodeSet(), set[Ino]()
    for ino, is_in in changes:
        (found.add if is_in else found.discard)(ino)
        (expected.add if is_in else expected.discard)(ino)
    assert len(found) == len(expected)
    assert all((ino in found) == (ino in expected) for ino, _ in changes)


def test_what_is_forgotten_takes_no_memory() -> None:
    table = InodeTable("Q")
    for ino in range(10_000):
        table.add(Ino(ino), 2)
    for ino in range(10_000):
        table.add(Ino(ino), -2)
    assert len(table) == 0
    assert table._arrays == {}


def test_a_number_is_never_negative() -> None:
    with pytest.raises(OverflowError):
        InodeTable("Q").add(Ino(7), -1)
