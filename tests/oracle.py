"""A naive model of KVM's dirty logging for direct roots: dicts, one page at a time, obvious and slow.

Beside the page tables it keeps what the fast model leaves out: the contents of guest pages, a userspace copy that
follows the dirty log, and a TLB per vCPU that may hold W and D until a flush. A write that the final copy misses is a
lost write. `mutants` names flushes to be left out, or an order to be turned round, so that tests can see such a loss.
"""

import errno

from oracle_memory import KINDS, LOG, PAGES, READ, RO, WRITE, Leaf, Slot, Vcpu, align


class Oracle:
    def __init__(self, platform="ept-pml", policy="6.12", vcpus=1, manual=0, ring=0, mutants=()):
        self.kind, self.old = KINDS[platform], policy == "6.1"
        self.cdls = 512 if self.kind.pml else 0
        self.manual, self.eager, self.mutants = manual, True, mutants
        self.soft = ring - 64 - self.cdls if ring else None
        self.vcpus = [Vcpu() for _ in range(vcpus)]
        self.slots, self.gen, self.flushes, self.pml_entries, self.pml_full = {}, 0, 0, 0, 0
        self.leafs, self.tables, self.mmio = {}, set(), {}
        self.clock, self.memory, self.copy, self.tracked = 0, {}, {}, set()
        self.meanwhile = lambda: None  # what other vCPUs do at the unlocked points of a harvest

    # -- memslots

    def slot_of(self, gfn):
        return next((s for s in self.slots.values() if s.base <= gfn < s.end), None)

    def set_region(self, sid, base=0, npages=0, host=None, off=0, flags=0):
        old = self.slots.get(sid)
        if npages == 0:
            if old is None:
                return errno.EINVAL
            del self.slots[sid]
            self.tracked.discard(sid)
            return self.zap_all()
        if old and ((host, off, npages) != (old.host, old.off, old.npages) or (flags ^ old.flags) & RO):
            return errno.EINVAL
        if old and (base, flags) == (old.base, old.flags):
            return 0
        if any(s.id != sid and base < s.end and s.base < base + npages for s in self.slots.values()):
            return errno.EEXIST
        new = Slot(sid, base, npages, host, off, flags)
        if flags & LOG and self.soft is None:
            kept = old.dirty if old else None
            new.dirty = kept if kept is not None else set(range(npages) if self.manual == 3 else ())
        self.slots[sid] = new
        if old is None:
            self.gen += 2
        elif old.base != base:
            self.zap_all()
        else:
            self.gen += 2
            if not flags & RO:
                (self.enable if flags & LOG else self.collapse)(new)
        if not flags & LOG:
            self.tracked.discard(sid)
        elif sid not in self.tracked:
            self.tracked.add(sid)
            self.read_pages(new, range(npages))
        return 0

    def zap_all(self):
        self.gen += 4
        self.leafs, self.tables, self.mmio = {}, set(), {}
        for v in self.vcpus:
            v.tlb.clear()
        return 0

    def enable(self, slot):
        if self.manual == 3:
            return
        if self.eager:
            self.split_range(slot.base, slot.end)
        for (level, gfn), leaf in self.leafs.items():
            if slot.base <= gfn < slot.end:
                self.protect(leaf)
                if level > 1:
                    leaf.w = False
        self.flush("enable")

    def collapse(self, slot):
        for level, gfn in sorted(self.tables, key=lambda t: (t[1], -t[0])):
            inside = slot.base <= gfn < slot.end and (level, gfn) in self.tables
            if inside and level + 1 <= slot.max_level(gfn):
                self.drop_table(level, gfn)
                self.flush("collapse")

    def drop_table(self, level, first):
        """Unlink the table of `level` at gfn `first`, with all below it."""
        span = range(first, first + PAGES[level + 1])
        self.leafs = {k: v for k, v in self.leafs.items() if k[1] not in span or k[0] > level}
        self.tables = {t for t in self.tables if t[1] not in span or t[0] > level}
        self.mmio = {g: v for g, v in self.mmio.items() if g not in span}

    # -- leaves

    def find(self, gfn):
        return next(((lv, self.leafs[lv, align(gfn, lv)]) for lv in (1, 2, 3) if (lv, align(gfn, lv)) in self.leafs), None)

    def protect(self, leaf):
        if self.cdls:
            leaf.d = False
        else:
            leaf.w = False

    def split(self, level, gfn):
        """Replace the huge leaf at (`level`, `gfn`) by a table of 512 smaller ones."""
        parent = self.leafs.pop((level, gfn))
        self.tables.add((level - 1, gfn))
        step = PAGES[level - 1]
        self.leafs |= {(level - 1, gfn + i * step): Leaf(**vars(parent)) for i in range(512)}

    def split_range(self, start, end):
        for level in (3, 2):
            for gfn in [g for lv, g in self.leafs if lv == level and g < end and start < g + PAGES[level]]:
                self.split(level, gfn)

    def flush(self, why):
        if why not in self.mutants:
            self.flushes += 1
            for v in self.vcpus:
                v.tlb.clear()

    # -- the guest

    def run(self, v, gfns, kinds):
        """Do the accesses in order; returns None or (reason, index) of the one that did not finish."""
        vcpu, entering = self.vcpus[v], True
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
                elif self.fault(vcpu, gfn, kind) == "mmio":
                    return "mmio", i
                entering = True
        self.drain(vcpu)
        return None

    def through_tlb(self, v, gfn):
        """Write through a cached translation if it holds W and D: no walk, no log, no fault."""
        if not all(self.vcpus[v].tlb.get(gfn, (False,))):
            return False
        self.store(gfn)
        return True

    def hardware(self, vcpu, gfn, kind):
        _, leaf = self.find(gfn) or (0, None)
        if leaf is None or (kind == WRITE and not leaf.w):
            return "fault"
        if self.kind.ad and kind == WRITE and not leaf.d:
            if self.kind.pml and any(s.flags & LOG for s in self.slots.values()):
                if len(vcpu.pml) == 512:
                    return "pml full"
                vcpu.pml.append(gfn)
                self.pml_entries += 1
            leaf.d = True
        vcpu.tlb[gfn] = (leaf.w, leaf.d or not self.kind.ad)
        if kind == WRITE:
            self.store(gfn)
        return "ok"

    def store(self, gfn):
        slot, self.clock = self.slot_of(gfn), self.clock + 1
        self.memory[slot.id, gfn - slot.base] = self.clock

    def drain(self, vcpu):
        while vcpu.pml:
            self.mark(vcpu, vcpu.pml.pop())

    def mark(self, vcpu, gfn):
        slot = self.slot_of(gfn)
        if slot and slot.flags & LOG:
            if self.soft is not None:
                vcpu.ring.append([slot.id, gfn - slot.base, False])
            else:
                slot.dirty.add(gfn - slot.base)

    def fast_fault(self, vcpu, gfn, kind):
        level, leaf = self.find(gfn) or (0, None)
        slot = self.slot_of(gfn)
        if kind != WRITE or leaf is None or not leaf.mw or (level > 1 and slot.flags & LOG):
            return False
        self.mark(vcpu, gfn)
        leaf.w = True
        return True

    def fault(self, vcpu, gfn, kind):
        slot, stats = self.slot_of(gfn), vcpu.stats
        stale = gfn in self.mmio
        if self.mmio.get(gfn) == self.gen:
            return "mmio"
        if stale and self.kind.ept:
            kind = READ  # a misconfiguration does not say what the access was
        stats["pf_taken"] += 1
        if slot is None:
            for level in (3, 2, 1):
                self.tables.add((level, align(gfn, level + 1)))
            self.mmio[gfn] = self.gen
            stats["pf_emulate"] += 1
            stats["pf_mmio_spte_created"] += 1
            return "mmio"
        if not stale and self.fast_fault(vcpu, gfn, kind):
            stats["pf_fast"] += 1
            stats["pf_fixed"] += 1
            return "fixed"
        if slot.flags & RO and kind == WRITE:
            stats["pf_emulate"] += 1
            return "mmio"
        writable, copied = slot.host.touch(slot.hpage(gfn), kind == WRITE)
        if copied and self.unmap(slot.host, slot.hpage(gfn)):
            return "retry"
        self.map(vcpu, slot, gfn, writable and not slot.flags & RO)
        stats["pf_fixed"] += 1
        return "fixed"

    def unmap(self, host, page):
        hits = [s.base + page - s.off for s in self.slots.values() if s.host is host and 0 <= page - s.off < s.npages]
        gone = [self.leafs.pop((1, g)) for g in hits if (1, g) in self.leafs]
        if gone:
            self.flush("unmap")
        return bool(gone)

    def map(self, vcpu, slot, gfn, writable):
        goal = 1 if slot.flags & LOG else slot.max_level(gfn)
        self.tables.add((3, align(gfn, 4)))
        for level in range(3, goal, -1):
            first = align(gfn, level)
            if (level, first) in self.leafs:
                if self.old:
                    del self.leafs[level, first]
                    self.flush("lazy zap")
                else:
                    self.split(level, first)
            self.tables.add((level - 1, first))
        first = align(gfn, goal)
        old = self.leafs.get((goal, first))
        bit1 = (old is not None and old.w) or self.mmio.pop(gfn, None) is not None
        if (goal - 1, first) in self.tables:
            self.drop_table(goal - 1, first)
            self.flush("link replaced")
            bit1 = True
        self.leafs[goal, first] = Leaf(writable, writable, writable, writable and self.kind.ad and not bit1)
        if writable:
            self.mark(vcpu, gfn)

    # -- harvest

    def get(self, sid):
        """KVM_GET_DIRTY_LOG: the set of reported pages, or an errno."""
        if (bad := self.no_log(sid)) is not None:
            return bad
        slot = self.slots[sid]
        if self.manual:
            return set(slot.dirty)
        return self.harvest(slot, set(slot.dirty))

    def clear(self, sid, first, num, wanted):
        """KVM_CLEAR_DIRTY_LOG of the pages `wanted`, numbered from the slot's base: 0 or an errno."""
        if self.soft is not None:
            return errno.ENXIO
        if first % 64:
            return errno.EINVAL
        if (bad := self.no_log(sid)) is not None:
            return bad
        rest = self.slots[sid].npages - first
        if num > rest or (num < rest and num % 64):
            return errno.EINVAL
        words = range(first, first + num)
        self.harvest(self.slots[sid], {p for p in wanted & self.slots[sid].dirty if p in words})
        return 0

    def no_log(self, sid):
        if self.soft is not None:
            return errno.ENXIO
        slot = self.slots.get(sid)
        return errno.ENOENT if slot is None or slot.dirty is None else None

    def harvest(self, slot, pages):
        """Take bits, re-arm, flush, in this order; then userspace reads the pages."""
        for vcpu in self.vcpus:
            self.drain(vcpu)
        if "bit last" not in self.mutants:
            slot.dirty -= pages
        self.meanwhile()
        for word in sorted({p // 64 for p in pages}):
            self.rearm(slot, sorted(slot.base + p for p in pages if p // 64 == word))
        self.meanwhile()
        if "bit last" in self.mutants:
            slot.dirty -= pages
        if "read early" in self.mutants:
            self.read_pages(slot, pages)
        self.meanwhile()
        if pages:
            self.flush("harvest")
        if "read early" not in self.mutants:
            self.read_pages(slot, pages)
        return pages

    def rearm(self, slot, gfns):
        if self.manual == 3:
            if self.eager:
                self.split_range(gfns[0], gfns[-1] + 1)
            for gfn in (gfns[0], gfns[-1]):
                level, leaf = self.find(gfn) or (0, None)
                if level > 1:
                    leaf.w = leaf.mw = False
        for gfn in gfns:
            if (1, gfn) in self.leafs:
                self.protect(self.leafs[1, gfn])

    def collect(self, v, limit):
        """Userspace takes up to `limit` entries of a ring."""
        taken = [e for e in self.vcpus[v].ring if not e[2]][:limit]
        for entry in taken:
            entry[2] = True
        return [(e[0], e[1]) for e in taken]

    def reset_rings(self):
        """KVM_RESET_DIRTY_RINGS; then userspace reads the pages."""
        done = []
        for vcpu in self.vcpus:
            while vcpu.ring and vcpu.ring[0][2]:
                sid, offset, _ = vcpu.ring.pop(0)
                if sid in self.slots and offset < self.slots[sid].npages:
                    self.rearm(self.slots[sid], [self.slots[sid].base + offset])
                    done.append((self.slots[sid], offset))
                else:
                    done.append(None)
        self.meanwhile()
        if done:
            self.flush("reset")
        for slot, offset in filter(None, done):
            self.read_pages(slot, [offset])
        return len(done)

    def read_pages(self, slot, pages):
        for page in pages:
            self.copy[slot.id, page] = self.memory.get((slot.id, page))

    def concurrent_write(self, v, gfn):
        """What a vCPU can do while mmu_lock is held: stale TLB, hardware, fast fault; a slow fault waits."""
        vcpu = self.vcpus[v]
        if self.through_tlb(v, gfn) or self.hardware(vcpu, gfn, WRITE) != "fault":
            return
        if self.fast_fault(vcpu, gfn, WRITE):
            self.hardware(vcpu, gfn, WRITE)

    def lost(self):
        """Pages of logging slots whose last write neither the copy nor the pending log knows."""
        pending = {(s.id, p) for s in self.slots.values() for p in s.dirty or ()}
        pending |= {(sid, off) for v in self.vcpus for sid, off, _ in v.ring}
        in_flight = [(s.id, g - s.base) for v in self.vcpus for g in v.pml if (s := self.slot_of(g))]
        known = pending | set(in_flight)
        return {k for k, v in self.memory.items() if k[0] in self.tracked and k not in known and self.copy.get(k) != v}
