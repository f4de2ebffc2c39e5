"""The oracle's page tables: leaves and tables in dicts, one entry each; splits, zaps, protection, flushes."""

import dataclasses

from oracle_host import PAGES, align


class Tables:
    """`leafs` and `tables` are keyed by (level, first gfn); `mmio` maps a gfn to its generation."""

    def clear_tables(self):
        self.leafs, self.tables, self.mmio = {}, set(), {}
        self.nx_marks = {}  # table -> 1: linked by an exec fault under the NX mitigation, 2: where a huge page would fit
        self.dirty_links = set()  # tables whose link has D set

    def find(self, gfn):
        return next(((lv, self.leafs[lv, align(gfn, lv)]) for lv in (1, 2, 3) if (lv, align(gfn, lv)) in self.leafs), None)

    def leafs_of(self, slot):
        """[(level, first gfn, leaf)] of what the slot maps."""
        if slot.as_id:
            return []  # no vCPU is ever in SMM
        return [(level, gfn, leaf) for (level, gfn), leaf in self.leafs.items() if slot.base <= gfn < slot.end]

    def protect(self, leaf):
        """Make the next write visible; tells whether anything changed."""
        changed = leaf.d if self.cdls else leaf.w
        if self.cdls:
            leaf.d = False
        else:
            leaf.w = False
        return changed

    def split(self, level, gfn):
        """Replace the huge leaf at (`level`, `gfn`) by a table of 512 smaller ones."""
        parent = self.leafs.pop((level, gfn))
        self.tables.add((level - 1, gfn))
        child = dataclasses.replace(parent, x=parent.x or (level == 2 and self.nx))
        step = PAGES[level - 1]
        self.leafs |= {(level - 1, gfn + i * step): dataclasses.replace(child) for i in range(512)}

    def split_range(self, start, end):
        for level in (3, 2):
            for gfn in [g for lv, g in self.leafs if lv == level and g < end and start < g + PAGES[level]]:
                self.split(level, gfn)

    def drop_table(self, level, first):
        """Unlink the table of `level` at gfn `first`, with all below it."""
        span = range(first, first + PAGES[level + 1])
        self.leafs = {k: v for k, v in self.leafs.items() if k[1] not in span or k[0] > level}
        self.tables = {t for t in self.tables if t[1] not in span or t[0] > level}
        self.nx_marks = {t: mark for t, mark in self.nx_marks.items() if t in self.tables}
        self.dirty_links &= self.tables
        self.mmio = {g: v for g, v in self.mmio.items() if g not in span}

    def flush(self, why):
        if why not in self.mutants:
            self.flushes += 1
            for v in self.vcpus:
                v.tlb.clear()

    # -- notifiers

    def unmap(self, ranges_by_host):
        """One notifier pass over [(host, first page, pages)]; tells whether an SPTE was dropped."""
        gone = 0
        for host, first, count in ranges_by_host:
            for slot in self.slots_on(host):
                for gfn in slot.gfns_of(first, count):
                    level, _ = self.find(gfn) or (0, None)
                    if level:
                        del self.leafs[level, align(gfn, level)]
                        gone += 1
        if gone:
            self.flush("unmap")
        return gone > 0

    def slots_on(self, host):
        return [s for s in self.slots.values() if s.host is host and not s.as_id]

    def age(self, host, page):
        """One page was asked whether it was used; its next use is to be seen."""
        young = 0
        for slot in self.slots_on(host):
            for gfn in slot.gfns_of(page, 1):
                _, leaf = self.find(gfn) or (0, None)
                if leaf is None or not (leaf.a if self.has_accessed else not leaf.parked):
                    continue
                young += 1
                leaf.a = False
                if not self.kind.ad:
                    leaf.parked, leaf.w = True, False
        if young and self.rules.aging_flushes:
            self.flush("age")
