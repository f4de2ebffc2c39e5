"""The oracle's page tables: leaves and tables in dicts, one entry each; splits, zaps, protection, flushes."""

import dataclasses

from oracle.host import PAGES, align
from oracle.memory import SPAN, Leaf


class Tables:
    """`leafs` and `tables` are keyed by (level, first address); `mmio` maps an address to its generation.

    Steps that a mutant may leave out are named where they are taken: by `flush`, `does` and `each`.
    """

    # How many addresses each gfn has, one a view: the direct root's, and what maps the gfn once more, another guest address under
    # shadow paging, or L2. Each has leaves and translations of its own, and no fast faults; of L2, hardware logs nothing.
    views = 1
    tdp = True  # the tables are the TDP MMU's

    def does(self, step):
        return step not in self.mutants

    def each(self, step, found):
        """All of `found`; a mutant forgets all but the first."""
        return found if self.does(step) else found[:1]

    def clear_tables(self):
        self.leafs, self.tables, self.mmio = {}, set(), {}
        self.nx_marks = {}  # table -> 1: linked by an exec fault under the NX mitigation, 2: where a huge page would fit

    def find(self, gfn):
        return next(((lv, self.leafs[lv, align(gfn, lv)]) for lv in (1, 2, 3) if (lv, align(gfn, lv)) in self.leafs), None)

    def places(self, gfn, levels=(1, 2, 3)):
        """Keys of every leaf of `levels` that maps `gfn`, view by view."""
        keys = ((level, align(gfn, level) + view * SPAN) for view in range(self.views) for level in levels)
        return [key for key in keys if key in self.leafs]

    def seen(self):
        """Leaves, tables and MMIO SPTEs that a walk may meet: all."""
        return self.leafs, self.tables, self.mmio

    def seen_mmio(self, at):
        """The generation of the MMIO SPTE that a walk to `at` meets, None if it meets none."""
        return self.mmio.get(at)

    def leafs_of(self, slot):
        """[(level, first address, leaf)] of what the slot maps."""
        if slot.as_id:
            return []  # no vCPU is ever in SMM
        return [(level, at, leaf) for (level, at), leaf in self.leafs.items() if slot.base <= at % SPAN < slot.end]

    def protect(self, leaf):
        """Make the next write visible; tells whether anything changed."""
        if self.cdls and not (leaf.by_w and self.does("W of L2 leaves")):
            changed, leaf.d = leaf.d, False
        else:
            changed, leaf.w = leaf.w, False
        return changed

    def split(self, level, gfn):
        """Replace the huge leaf at (`level`, `gfn`) by a table of 512 smaller ones."""
        parent = self.leafs.pop((level, gfn))
        self.tables.add((level - 1, gfn))
        child = dataclasses.replace(parent, x=parent.x or (level == 2 and self.nx))
        step = PAGES[level - 1]
        self.leafs |= {(level - 1, gfn + i * step): Leaf(**vars(child)) for i in range(512)}

    def split_range(self, start, end):
        for level in (3, 2):
            for gfn in [g for lv, g in self.leafs if lv == level and g < end and start < g + PAGES[level]]:
                self.split(level, gfn)

    def drop_table(self, level, first):
        """Unlink the table of `level` at gfn `first`, with all below it; returns the tables freed."""
        before, span = len(self.tables), range(first, first + PAGES[level + 1])
        self.leafs = {k: v for k, v in self.leafs.items() if k[1] not in span or k[0] > level}
        self.tables = {t for t in self.tables if t[1] not in span or t[0] > level}
        self.nx_marks = {t: mark for t, mark in self.nx_marks.items() if t in self.tables}
        self.mmio = {g: v for g, v in self.mmio.items() if g not in span}
        return before - len(self.tables)

    def flush(self, why, requests=1):
        if self.does(why):
            self.flushes += requests
            for v in self.vcpus:
                v.tlb.clear()

    def frame(self, at, leaf):
        slot = self.slot_of(at)
        return "zero" if leaf.zero else (slot.host.first, slot.hpage(at))

    def stale(self):
        """Translations in TLBs that neither tables nor host give any more (T1); R, W and X that aging took without a flush may stay."""
        return {(v, at) for v, vcpu in enumerate(self.vcpus) for at, cached in vcpu.tlb.items() if self.is_stale(at, cached)}

    def is_stale(self, at, cached):
        level, leaf = self.find(at) or (0, None)
        if leaf is None or (leaf.parked and not cached.aged) or level > cached.level or cached.frame != self.frame(at, leaf):
            return True  # a smaller leaf is a split, which keeps the translation (T2)
        slot = self.slot_of(at)
        host = slot.host.pte.get(slot.host.at(slot.hpage(at)))
        if host is None or leaf.zero != (host == "zero") or (cached.w and (host != "own" or not (leaf.w or cached.aged))):
            return True
        return self.kind.ad and cached.d and not leaf.d and not self.d_may_lag(at)

    def d_may_lag(self, at):
        """The TDP MMU remakes a writable leaf without D and does not flush: no harm before a page is clean in a log again."""
        slot = self.slot_of(at)
        return slot.dirty is None or at % SPAN - slot.base in slot.dirty

    # -- notifiers

    def unmap(self, ranges_by_host):
        """One notifier pass over [(host, first page, pages)]."""
        gone = freed = 0
        for host, first, count in ranges_by_host:
            for slot in self.slots_on(host):
                for table in self.covered(slot.gfns_of(first, count)):
                    freed += self.drop_table(*table)
                    gone += 1
                for gfn in slot.gfns_of(first, count):
                    for key in self.each("unmap: aliases", self.places(gfn)):
                        del self.leafs[key]
                        gone += 1
        if gone:
            self.flush("unmap", 1 + freed)

    def covered(self, gfns):
        """Tables, larger ones first, that map gfns of a range alone, where a notifier drops those."""
        for level, first in sorted(self.tables, reverse=True) if self.tdp and self.rules.unmaps_tables else ():
            if (level, first) in self.tables and gfns.start <= first and first + PAGES[level + 1] <= gfns.stop:
                yield level, first

    def slots_on(self, host):
        return [s for s in self.slots.values() if s.host is host and not s.as_id]

    def age(self, host, page):
        """One page was asked whether it was used; its next use is to be seen."""
        young = 0
        for slot in self.slots_on(host):
            for gfn in slot.gfns_of(page, 1):
                for key in self.places(gfn):
                    leaf = self.leafs[key]
                    if leaf.a if self.has_accessed else not leaf.parked:
                        young += 1
                        leaf.a = False
                        leaf.d &= not (self.tdp and self.rules.ages_dirty)
                        if not self.kind.ad:
                            leaf.parked, leaf.w = True, False
        if young and self.rules.aging_flushes:
            self.flush("age")
        elif young:
            for v in self.vcpus:
                v.tlb = {at: cached._replace(aged=cached.aged or self.is_parked(at)) for at, cached in v.tlb.items()}

    def is_parked(self, at):
        _, leaf = self.find(at) or (0, None)
        return leaf is not None and leaf.parked
