"""Page tables of a guest in its own memory: what a 64-bit guest pages with, or L1's EPT or NPT for L2. Four levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np

from spte._arguments import flag, index, instance, integer, spell
from spte.access import EXEC, READ, RWX, WRITE, Access
from spte.arrays.records import U64s
from spte.bits import PFN_MASK, SHIFT_PAGE
from spte.errors import GuestTablesError
from spte.host.backing import Backing
from spte.platform import PAGE_SIZE

_RWX = int(RWX)  # in masks: the complement of a flag has no other bits
LARGE, NX = 1 << 7, 1 << 63
LEVELS = 4
GFN_BITS, FRAME_BITS = 9 * LEVELS, 40
FRAME = int(PFN_MASK)


class _Format(NamedTuple):
    """How an entry of one kind of tables looks."""

    link: int
    leaf: int  # of every leaf, with its permissions
    accessed: int
    dirty: int
    nx: int  # set where EXEC is missing; 0: permissions are the bits of Access themselves


_FORMATS = {
    "ept": _Format(link=_RWX, leaf=6 << 3, accessed=1 << 8, dirty=1 << 9, nx=0),  # write-back memory
    "npt": _Format(link=_RWX | 1 << 5, leaf=5, accessed=1 << 5, dirty=1 << 6, nx=NX),
    "long": _Format(link=_RWX | 1 << 5, leaf=5, accessed=1 << 5, dirty=1 << 6, nx=NX),
}
KINDS = tuple(_FORMATS)


def _entry(entry: int) -> int:
    return integer(entry, "entry", GuestTablesError, 0, 1 << 64)


class GuestTables:
    """Page tables that KVM reads from guest memory.

    Parameters
    ----------
    backing : Backing
        Memory of the memslot that holds them; its pages are taken from `page` on and mutated.
    gpa : int
        Guest-physical address at which the backing begins, bytes.
    kind : str
        ``ept`` or ``npt``: what L1 runs L2 with; ``long``: 64-bit paging of a guest.
    page : int
        First page of `backing` to take.

    Raises
    ------
    GuestTablesError
        EINVAL: unknown kind, `gpa` not of a page, or no page left.
    """

    def __init__(self, backing: Backing, gpa: int, kind: str = "ept", *, page: int = 0) -> None:
        backing = instance(backing, "backing", Backing, "a Backing")
        gpa, page = integer(gpa, "gpa", GuestTablesError), integer(page, "page", GuestTablesError)
        if instance(kind, "kind", str, "a name") not in _FORMATS:
            raise GuestTablesError(f"kind={spell(kind)} of guest tables is not known; take one of {', '.join(KINDS)}")
        if gpa % PAGE_SIZE or gpa < 0:
            raise GuestTablesError(f"gpa={gpa:#x} is not the address of a page; round down")
        if page < 0:
            raise GuestTablesError(f"page={page} is before the first of {backing!r}; take 0 or more")
        self._format = _FORMATS[kind]
        self._first, self._next, self._end = gpa >> 12, (gpa >> 12) + page, (gpa >> 12) + backing.size // PAGE_SIZE
        self._words: Callable[[int], U64s] = lambda gfn: backing.table(gfn - self._first)
        self.roots: list[int] = []
        self.add_root()

    def add_root(self) -> int:
        """Take a page for another root; returns its number, for `root` of the other methods."""
        self.roots.append(self._new_page())
        return len(self.roots) - 1

    def address(self, root: int = 0) -> int:
        """Return the guest-physical address of a root table: for `load_cr3` and ``enter_l2(ept=...)``."""
        return self._root(root) << 12

    def _root(self, root: int) -> int:
        if not 0 <= index(root, "root") < len(self.roots):
            raise GuestTablesError(f"root={spell(root)} was not added; there are {len(self.roots)}")
        return self.roots[root]

    def _new_page(self) -> int:
        if self._next >= self._end:
            self._refuse()
        page, self._next = self._next, self._next + 1
        self._words(page)[:] = 0
        return page

    def map(
        self, gfn: int, to: int, count: int = 1, *, level: int = 1, perm: Access | int = RWX, accessed: bool = True, dirty: bool = True,
        root: int = 0,
    ) -> None:  # fmt: skip
        """Translate `count` pages of `level` from page number `gfn` on to the gfns from `to` on. Mutates guest memory, before it runs.

        Parameters
        ----------
        gfn, to : int
            First page numbers, multiples of the page size of `level` in 4 KiB pages; all below 36 bits, what four levels reach, and 40.
        count : int
            Pages of `level`.
        level : int
            1 (4 KiB), 2 (2 MiB) or 3 (1 GiB).
        perm : Access or int
            1 READ, 2 WRITE, 4 EXEC, together; READ can not be taken away in NPT and 64-bit tables; EPT has no WRITE without it.
        accessed, dirty : bool
            A and D are set already.
        root : int
            Number of the root.

        Raises
        ------
        GuestTablesError
            EINVAL: unaligned page numbers or too large ones, a level, permission or root that there is not, a larger page in the way,
            no page left; nothing is changed.
        """
        gfn, to, count, level, perm, root = (
            integer(n, name, GuestTablesError)
            for n, name in ((gfn, "gfn"), (to, "to"), (count, "count"), (level, "level"), (perm, "perm"), (root, "root"))
        )
        accessed, dirty = flag(accessed, "accessed"), flag(dirty, "dirty")
        size = 1 << 9 * (level - 1) if level in (1, 2, 3) else 0
        if not size or gfn % size or to % size or not 0 <= perm <= RWX:
            raise GuestTablesError(f"gfn={gfn:#x}, to={to:#x}, level={level}, perm={perm}: take level 1, 2 or 3, its multiples, perm 0..7")
        if not self._format.nx and perm & (READ | WRITE) == WRITE:
            raise GuestTablesError(f"perm={perm} writes what it can not read, an EPT misconfiguration; add READ (1)")
        if not (0 <= gfn <= (1 << GFN_BITS) - count * size and 0 <= to <= (1 << FRAME_BITS) - count * size and count >= 0):
            raise GuestTablesError(f"gfn={gfn:#x}, to={to:#x}, count={count} leave {GFN_BITS} bits of gfn or {FRAME_BITS} of frame")
        self._root(root)
        self._check_way(gfn, count * size, level, root)
        flags = self.permissions(self._format.leaf, perm) | (LARGE if level > 1 else 0)
        flags |= (self._format.accessed if accessed else 0) | (self._format.dirty if dirty else 0)
        n = 0
        while n < count:
            first = gfn + n * size
            page, at = self.roots[root], LEVELS
            while at > level:
                entries, i = self._words(page), first >> 9 * (at - 1) & 511
                if not entries[i]:
                    entries[i] = self._new_page() << 12 | self._format.link
                page, at = (int(entries[i]) & FRAME) >> 12, at - 1
            i = first >> 9 * (level - 1) & 511
            some = min(512 - i, count - n)  # what lies in one table
            frames = np.arange(to + n * size, to + (n + some) * size, size, dtype=np.uint64)
            self._words(page)[i : i + some] = frames << SHIFT_PAGE | np.uint64(flags)
            n += some

    def _check_way(self, gfn: int, pages: int, level: int, root: int) -> None:
        """See that no larger page is in the way of a mapping, and that there is a page for each table that it needs."""
        span = 1 << 9 * level  # one table of `level`
        missing = set()
        for first in range(gfn & -span, gfn + pages, span):
            page, at = self.roots[root], LEVELS
            while at > level:
                entry = int(self._words(page)[first >> 9 * (at - 1) & 511])
                if entry & LARGE:
                    raise GuestTablesError(f"gfn={max(first, gfn):#x} is mapped by a page of level {at}; map it once")
                if not entry:
                    missing |= {(n, first >> 9 * (n - 1)) for n in range(level + 1, at + 1)}
                    if len(missing) > self._end - self._next:
                        self._refuse()
                    break
                page, at = (entry & FRAME) >> 12, at - 1

    def _refuse(self) -> NoReturn:
        raise GuestTablesError(f"no page left for guest tables behind gfn {self._end - 1:#x}; give them more memory")

    def permissions(self, entry: int, perm: Access | int) -> int:
        """Return `entry` with the permissions `perm`, as for `map`: a value to store; GuestTablesError (EINVAL) as there."""
        entry, perm = _entry(entry), integer(perm, "perm", GuestTablesError, 0, _RWX + 1)
        if not self._format.nx:
            return entry & ~_RWX | perm
        return entry & ~(int(WRITE) | NX) | perm & int(WRITE) | (0 if perm & EXEC else NX)

    def unused(self, entry: int, *, accessed: bool) -> int:
        """Return `entry` with D clear, and A too if `accessed`."""
        return _entry(entry) & ~(self._format.dirty | (self._format.accessed if flag(accessed, "accessed") else 0))

    def walk(self, gfn: int, root: int = 0) -> tuple[list[int], int, int]:
        """Return the gfns of the tables on the way to page `gfn` under `root`, the level of the last entry and its index there."""
        gfn = integer(gfn, "gfn", GuestTablesError, 0, 1 << GFN_BITS)
        page, level, pages = self._root(root), LEVELS, []
        while True:
            pages.append(page)
            i = gfn >> 9 * (level - 1) & 511
            entry = int(self._words(page)[i])
            if level == 1 or entry & LARGE or not entry:
                return pages, level, i
            page, level = (entry & FRAME) >> 12, level - 1

    def entry(self, gfn: int, root: int = 0) -> tuple[int, int, int]:
        """Return the last entry on the way to page `gfn` under `root`: its guest-physical address (for `store`), its value, its level."""
        pages, level, i = self.walk(gfn, root)
        return (pages[-1] << 12) + 8 * i, int(self._words(pages[-1])[i]), level

    def translate(self, gfn: int, root: int = 0) -> int:
        """Return the gfn that page `gfn` is mapped to under `root`; 0 and on where it is not."""
        _, entry, level = self.entry(gfn, root)
        return ((entry & FRAME) >> 12) + (gfn & ((1 << 9 * (level - 1)) - 1))
