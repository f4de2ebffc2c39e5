"""The oracle's dirty log: GET, CLEAR, rings, and the copy that userspace keeps of the guest's pages."""

import errno

from oracle.host import align


class DirtyLog:
    def get(self, sid):
        """KVM_GET_DIRTY_LOG: the set of reported pages, or an errno."""
        if (bad := self.no_log(sid)) is not None:
            return bad
        slot = self.slots[sid]
        if self.manual:
            return set(slot.dirty)
        return self.harvest(slot, set(slot.dirty), "re-arm: GET", "GET")

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
        self.harvest(self.slots[sid], {p for p in wanted & self.slots[sid].dirty if p in words}, "re-arm: CLEAR", "CLEAR")
        return 0

    def no_log(self, sid):
        if self.soft is not None:
            return errno.ENXIO
        slot = self.slots.get(sid)
        return errno.ENOENT if slot is None or slot.dirty is None else None

    def harvest(self, slot, pages, rearm, flush):
        """Take bits, re-arm, flush, in this order; then userspace reads the pages."""
        for vcpu in self.vcpus:
            self.drain(vcpu)
        if self.does("bit first"):
            slot.dirty -= pages
        self.meanwhile()
        for word in sorted({p // 64 for p in pages}):
            self.rearm(slot, sorted(slot.base + p for p in pages if p // 64 == word), rearm)
        self.meanwhile()
        if not self.does("bit first"):
            slot.dirty -= pages
        if not self.does("read last"):
            self.read_pages(slot, pages)
        self.meanwhile()
        if pages:
            self.flush(flush)
        if self.does("read last"):
            self.read_pages(slot, pages)
        return pages

    def rearm(self, slot, gfns, why):
        """Make the next write to each of `gfns` visible in every leaf that maps it."""
        if slot.as_id:
            return
        if self.manual == 3 and not self.rules.protects_huge_at_enable:
            if self.splits_eagerly() and self.does("split: re-arm"):
                self.split_range(gfns[0], gfns[-1] + 1)
            if self.does("re-arm: huge leaf at the first gfn"):
                self.protect_huge(gfns[0])
            if align(gfns[0], 2) != align(gfns[-1], 2) and self.does("re-arm: huge leaf at the last gfn"):
                self.protect_huge(gfns[-1])
        for gfn in gfns if self.does(why) else ():
            for key in self.each("re-arm: aliases", self.places(gfn, levels=(1,))):
                self.protect(self.leafs[key])

    def protect_huge(self, gfn):
        for key in self.each("re-arm: aliases of huge leaves", self.places(gfn, levels=(2, 3))):
            self.leafs[key].w = self.leafs[key].mw = False

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
                    self.rearm(self.slots[sid], [self.slots[sid].base + offset], "re-arm: RESET")
                    done.append((self.slots[sid], offset))
                else:
                    done.append(None)
        self.meanwhile()
        if done:
            self.flush("RESET")
        for slot, offset in filter(None, done):
            self.read_pages(slot, [offset])
        return len(done)

    def read_pages(self, slot, pages):
        for page in pages:
            self.copy[slot.id, page] = self.memory.get((slot.id, page))

    def lost(self):
        """Pages of logging slots whose last write neither the copy nor the pending log knows.

        Slots that began initially-set and whose huge leaves nobody arms any more are left out: there KVM itself loses writes.
        """
        pending = {(s.id, p) for s in self.slots.values() for p in s.dirty or ()}
        pending |= {(sid, off) for v in self.vcpus for sid, off, _ in v.ring}
        in_flight = [(s.id, g - s.base) for v in self.vcpus for g in v.pml if (s := self.slot_of(g))]
        known = pending | set(in_flight)
        tracked = {sid for sid in self.tracked if not self.slots[sid].unarmed}
        return {k for k, v in self.memory.items() if k[0] in tracked and k not in known and self.copy.get(k) != v}
