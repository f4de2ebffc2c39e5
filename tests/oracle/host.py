"""The host's side of the oracle: the pages of one backing and what userspace does to them, one dict entry a page.

Every operation returns the notifier passes it makes: lists of ranges (first page, pages), one flush a pass that drops something.
"""

import errno
from typing import ClassVar

DONTNEED, FREE, COLD, PAGEOUT = 4, 8, 20, 21
PAGES = {1: 1, 2: 512, 3: 512**2, 4: 512**3}


def align(gfn, level):
    return gfn - gfn % PAGES[level]


def runs(numbers):
    """Pack ascending numbers into (first, count)."""
    found = []
    for n in numbers:
        if found and found[-1][0] + found[-1][1] == n:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((n, 1))
    return found


class Host:
    """The host pages of one backing, page numbers from 0; its first page is aligned to its largest mapping.

    A page's PTE is "zero" (the zero page), "own" (writable) or "shared" (write-protected, a write takes it back); no entry: none.
    What is mapped huge has one entry, under its first page.
    """

    HUGE: ClassVar = {"thp": 2, "hugetlb2m": 2, "devdax2m": 2, "hugetlb1g": 3, "devdax1g": 3}
    serial = 0

    def __init__(self, kind, npages, populate=False):
        Host.serial += 1
        self.kind, self.npages, self.first = kind, npages, Host.serial * PAGES[4]
        self.huge = self.HUGE.get(kind, 1)
        self.pte, self.blocks, self.page_tables, self.read_only = {}, set(), set(), set()
        self.compound = set()  # pages that are part of a huge page, mapped huge or not
        for page in range(npages if populate else 0):
            self.touch(page, write=True)

    # -- what a fault asks

    def level(self, page):
        return self.huge if align(page, self.huge) in self.blocks else 1

    def at(self, page):
        return align(page, self.level(page))

    def touch(self, page, write):
        """Fault a page in; returns (the PTE is writable, it is the zero page, a zero page was copied), None if not allowed."""
        protected = page in self.read_only
        if write and protected:
            return None
        before = self.pte.get(self.at(page))
        if before is None and self.may_be_huge(page):
            self.blocks.add(align(page, self.huge))
            self.pte[self.at(page)] = "own"
            self.compound.update(range(align(page, self.huge), align(page, self.huge) + PAGES[self.huge]))
        elif before is None:
            self.page_tables.add(align(page, 2))
            self.pte[page] = "own" if write or self.kind == "shm" else "zero"
        elif write:
            self.pte[self.at(page)] = "own"
        now = self.pte[self.at(page)]
        return now == "own" and not protected, now == "zero", before == "zero" and write

    def in_large_block(self, page):
        """`page` lies where the backing may have a huge page, whether or not it has one now."""
        return self.huge > 1 and align(page, self.huge) + PAGES[self.huge] <= self.npages

    def is_compound(self, page):
        """The struct page is one of a transparent or HugeTLB page, or of device memory."""
        return page in self.compound

    def may_be_huge(self, page):
        block = align(page, self.huge)
        if not self.in_large_block(page):
            return False
        return self.kind != "thp" or (block not in self.page_tables and self.is_one_mapping(block))

    def is_one_mapping(self, block):
        """The aligned 2 MiB at `block` lie in one VMA."""
        inside = self.read_only.intersection(range(block, block + 512))
        return block + 512 <= self.npages and len(inside) in (0, 512)

    # -- what userspace does

    def split(self, block):
        self.blocks.discard(block)
        self.page_tables.add(block)
        self.pte |= dict.fromkeys(range(block, block + 512), self.pte.pop(block))

    def madvise(self, first, count, advice):
        """Returns passes, or an errno."""
        hugetlb, end = self.kind.startswith("hugetlb"), first + count
        if hugetlb and (advice != DONTNEED or first % PAGES[self.huge] or end % PAGES[self.huge]):
            return errno.EINVAL
        if self.kind == "shm" and advice == FREE:
            return errno.EINVAL
        met = [b for b in sorted(self.blocks) if first < b + PAGES[self.huge] and b < end]
        cut = [b for b in met if b < first or b + PAGES[self.huge] > end]
        for block in cut:
            self.split(block)
        if advice == DONTNEED:
            self.blocks.difference_update(range(first, end))
            self.compound.difference_update(range(first, end))
            for page in range(first, end):
                self.pte.pop(page, None)
        blocks = [(b, 512) for b in cut]
        return [[each] for each in ([(first, count), *blocks] if advice in (DONTNEED, FREE) else blocks)]

    def mprotect(self, first, count, protect):
        """Protect or unprotect, VMA by VMA; returns passes, or an errno."""
        if self.huge > 1 and self.kind != "thp" and (first % PAGES[self.huge] or count % PAGES[self.huge]):
            return errno.EINVAL
        passes = []
        for start, pages in runs([p for p in range(first, first + count) if (p in self.read_only) != protect]):
            passes += self.cut(start) + self.cut(start + pages) + [[(start, pages)]]
            for edge in (start, start + pages):
                if edge % 512:  # an empty block that was cut is never whole again: simpler than the host
                    self.page_tables.add(align(edge, 2))
            change = self.read_only.update if protect else self.read_only.difference_update
            change(range(start, start + pages))
        return passes

    def cut(self, edge):
        """Cut a VMA in two before page `edge`, unless one begins or ends there."""
        block = align(edge, 2)
        same = 0 < edge < self.npages and (edge - 1 in self.read_only) == (edge in self.read_only)
        if not same or edge == block or not self.is_one_mapping(block):
            return []
        if block in self.blocks:
            self.split(block)
        return [[(block, 512)]]

    def mappings(self):
        """The VMAs: runs of equal protection."""
        pages = range(self.npages)
        return sorted(runs(p for p in pages if p in self.read_only) + runs(p for p in pages if p not in self.read_only))

    def share(self):
        self.pte = {page: "shared" if state == "own" else state for page, state in self.pte.items()}

    def fork(self):
        if self.kind in ("shm", "devdax2m", "devdax1g"):
            return []
        self.share()
        return [[mapping] for mapping in self.mappings()]

    def clear_refs(self):
        """Write-protect what soft-dirty tracks; the one pass is the process's."""
        if self.huge == 1 or self.kind == "thp":
            self.share()
