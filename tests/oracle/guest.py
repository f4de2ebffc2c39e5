"""The oracle's guest: accesses, what hardware does, and KVM's fault path."""

import errno

from oracle.host import PAGES, align
from oracle.memory import EXEC, LOG, READ, RO, SPAN, WRITE, Cached, Leaf


class Guest:
    def run(self, v, gfns, kinds):
        """Do the accesses in order; returns None or (reason, index) of the one that did not finish."""
        vcpu, entering = self.vcpus[v], True
        self.enter(vcpu)
        for i, (gfn, kind) in enumerate(zip(gfns, kinds, strict=True)):
            while True:
                if entering and self.soft is not None and len(vcpu.ring) >= self.soft:
                    return "dirty_ring_full", i
                entering = False
                done = self.hardware(vcpu, gfn, kind)
                if done == "ok":
                    break
                self.drain(vcpu)
                if done == "pml full":
                    self.pml_full += 1
                elif (stop := self.fault(vcpu, gfn, kind)) in ("mmio", "efault"):
                    return stop, i
                entering = True
        self.drain(vcpu)
        return None

    def through_tlb(self, v, gfn):
        """Write through a cached translation if it holds W and D: no walk, no log, no fault."""
        cached = self.vcpus[v].tlb.get(gfn)
        if cached is None or not (cached.w and cached.d):
            return False
        self.store(gfn)
        return True

    def enter(self, vcpu):
        """A vCPU of the TDP MMU finds its root without ado."""

    def hardware(self, vcpu, gfn, kind):
        level, leaf = self.find(gfn) or (0, None)
        if leaf is None or leaf.parked or (kind == WRITE and not leaf.w) or (kind == EXEC and not leaf.x):
            return "fault"
        if self.kind.ad:
            sets_d = kind == WRITE and not leaf.d
            if (sets_d or not leaf.a) and self.pml_on() and gfn < SPAN:
                if len(vcpu.pml) == 512:
                    return "pml full"
                if sets_d:
                    vcpu.pml.append(gfn)
                    self.pml_entries += 1
            leaf.a, leaf.d = True, leaf.d or sets_d
        vcpu.tlb[gfn] = Cached(leaf.w, leaf.d or not self.kind.ad, level, self.frame(gfn, leaf))
        if kind == WRITE:
            self.store(gfn)
        return "ok"

    def pml_on(self):
        return self.kind.pml and (self.rules.pml_always or any(s.flags & LOG for s in self.slots.values()))

    def store(self, gfn):
        slot, self.clock = self.slot_of(gfn), self.clock + 1
        self.memory[slot.id, gfn % SPAN - slot.base] = self.clock

    def drain(self, vcpu):
        while vcpu.pml:
            self.mark(vcpu, vcpu.pml.pop(0 if self.rules.oldest_first else -1))

    def mark(self, vcpu, gfn):
        slot = self.slot_of(gfn)
        if slot and slot.flags & LOG:
            if self.soft is not None:
                vcpu.ring.append([slot.id, gfn % SPAN - slot.base, False])
            else:
                slot.dirty.add(gfn % SPAN - slot.base)

    def fast_fault(self, vcpu, gfn, kind):
        """Mend a leaf in place: give W back, unpark R and X."""
        level, leaf = self.find(gfn) or (0, None)
        if leaf is None:
            return False
        mends_w = kind == WRITE and leaf.mw and not leaf.w
        if mends_w and level > 1 and (self.slot_of(gfn).flags & LOG or not self.rules.fast_huge):
            return False
        enough = {READ: True, WRITE: leaf.mw, EXEC: leaf.x}[kind]
        if not enough or not (mends_w or leaf.parked):
            return False
        if mends_w:
            self.mark(vcpu, gfn)
            leaf.w = True
        if leaf.parked:
            leaf.parked, leaf.a = False, self.has_accessed
        return True

    def fault(self, vcpu, gfn, kind):
        slot, stats = self.slot_of(gfn), vcpu.stats
        generation = self.seen_mmio(gfn)
        if generation == self.gen:
            return "mmio"
        if generation is not None and self.kind.ept:
            kind = READ  # a misconfiguration does not say what the access was
        stats["pf_taken"] += 1
        if slot is None:
            self.map_mmio(vcpu, gfn, kind)
            stats["pf_emulate"] += 1
            return "mmio"
        _, leaf = self.find(gfn) or (0, None)
        present = leaf is not None and not leaf.parked
        may_be_fast = self.has_fast_faults(gfn) and ((present and kind == WRITE) or (not self.kind.ad and not present))
        if may_be_fast and self.fast_fault(vcpu, gfn, kind):
            stats["pf_fast"] += 1
            stats["pf_fixed"] += 1
            return "fixed"
        if slot.flags & RO and kind == WRITE:
            stats["pf_emulate"] += 1
            return "mmio"
        page = slot.host.touch(slot.hpage(gfn), kind == WRITE)
        if page is None:
            return "efault"
        writable, zero, copied = page
        if copied:
            self.unmap([(slot.host, slot.hpage(gfn), 1)])
            return "retry"
        fixed = self.map(vcpu, slot, gfn, kind, writable and not slot.flags & RO, zero)
        stats["pf_fixed" if fixed else "pf_spurious"] += 1
        return "fixed"

    def has_fast_faults(self, at):
        """Only direct roots have them."""
        return self.rules.fast and at < SPAN

    def map_mmio(self, vcpu, gfn, kind):
        self.walk(gfn, 1, 1, self.nx and kind == EXEC)
        self.mmio[gfn] = self.gen
        vcpu.stats["pf_mmio_spte_created"] += 1

    def walk(self, gfn, goal, fits, no_huge):
        """Go down to `goal`, linking what is missing; returns the level reached: lower under a table that NX holds down."""
        for level in (4, 3, 2, 1):
            first = align(gfn, level)
            table = (level - 1, first)
            if level == goal and not (level > 1 and self.nx_holds(table)):
                return level
            goal = min(goal, level - 1)
            if table in self.tables:
                continue
            if (level, first) in self.leafs and self.rules.lazy_split:
                self.split(level, first)
            else:
                if self.leafs.pop((level, first), None):
                    self.flush("lazy zap")
                self.tables.add(table)
            if no_huge and (level <= fits or self.rules.nx_marks_all):
                self.nx_marks[table] = 2 if level <= fits else 1
        raise AssertionError("a walk ends at its goal")

    def nx_holds(self, table):
        """Whether the NX mitigation keeps `table` from giving way to a huge leaf."""
        return self.nx and (table in self.nx_marks or (self.rules.nx_any_table and table in self.tables))

    def map(self, vcpu, slot, gfn, kind, writable, zero, prefetch=False):
        """Install a leaf; tells whether anything changed."""
        fits = 1 if slot.flags & LOG else slot.max_level(gfn)
        no_huge = self.nx and kind == EXEC
        level = self.walk(gfn, 1 if no_huge else fits, fits, no_huge)
        first = align(gfn, level)
        old = self.leafs.get((level, first))
        over_table = (level - 1, first) in self.tables
        bit1 = over_table or (old is not None and old.w) or (level == 1 and gfn in self.mmio)
        if prefetch and old is not None and not self.rules.prefault_remakes:
            return False
        new = self.new_leaf(level, gfn, writable, zero, prefetch, bit1)
        if new.w:
            self.mark(vcpu, gfn)
        if new == old:
            return False
        if over_table:
            freed = self.drop_table(level - 1, first)
            self.flush("link replaced", freed if self.rules.table_flush else 1)
        self.mmio.pop(gfn, None)
        self.leafs[level, first] = new
        return True

    def new_leaf(self, level, at, writable, zero, prefetch, bit1):
        """`bit1`: bit 1 of the entry was set, whatever it was, and up to 6.12 the builder then leaves D out."""
        parked = prefetch and not self.kind.ad
        return Leaf(
            hw=writable, mw=writable, w=writable and not parked, zero=zero, parked=parked, x=not (self.nx and level > 1),
            d=writable and self.has_dirty and (self.rules.remake_sets_dirty or not bit1), a=self.has_accessed and not prefetch,
            by_w=bool(self.cdls) and at >= SPAN,
        )  # fmt: skip

    def prefault(self, v, gfn, npages):
        """KVM_PRE_FAULT_MEMORY: the pages that are left, or an errno."""
        vcpu, at, end = self.vcpus[v], gfn, gfn + npages
        self.enter(vcpu)
        while at < end:
            slot = self.slot_of(at)
            if slot is None:
                self.map_mmio(vcpu, at, READ)
                if at == gfn:
                    return errno.ENOENT
                break
            level, leaf = self.find(at) or (0, None)
            if leaf is not None and not self.kind.ad:
                self.fast_fault(vcpu, at, READ)
                vcpu.stats["pf_fast"] += 1  # without A/D bits a fault on a non-present entry may be fast: what allows it is left alone
            else:
                writable, zero, _ = slot.host.touch(slot.hpage(at), write=False)
                self.map(vcpu, slot, at, READ, writable and not slot.flags & RO, zero, prefetch=True)
                level, _ = self.find(at)
            at = align(at, level) + PAGES[level]
        return end - min(at, end)

    def kernel_write(self, v, gfn):
        """KVM stores into a page by itself: its log knows, no SPTE is asked."""
        slot = self.slot_of(gfn)
        if slot is None or slot.flags & RO:
            return
        page = slot.host.touch(slot.hpage(gfn), write=True)
        if page is None:
            return
        if page[2]:
            self.unmap([(slot.host, slot.hpage(gfn), 1)])
        self.store(gfn)
        self.mark(self.vcpus[v], gfn)

    def concurrent_write(self, v, gfn):
        """What a vCPU can do while mmu_lock is held: stale TLB, hardware, fast fault; a slow fault waits."""
        vcpu = self.vcpus[v]
        if self.through_tlb(v, gfn) or self.hardware(vcpu, gfn, WRITE) != "fault":
            return
        if self.has_fast_faults(gfn) and self.fast_fault(vcpu, gfn, WRITE):
            self.hardware(vcpu, gfn, WRITE)
