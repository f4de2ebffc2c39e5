"""A naive model of KVM's dirty logging for direct roots: dicts, one page at a time, obvious and slow.

Beside the page tables it keeps what the fast model leaves out: the contents of guest pages, a userspace copy that
follows the dirty log, and a TLB per vCPU that may hold W and D until a flush. A write that the final copy misses is a
lost write. `mutants` names flushes to be left out, or an order to be turned round, so that tests can see such a loss.
"""

import dataclasses
import errno

from oracle.guest import Guest
from oracle.host import PAGES
from oracle.log import DirtyLog
from oracle.memory import LOG, RO, SPAN, Slot, Vcpu, kind_of
from oracle.rules import RULES
from oracle.tables import Tables


class Oracle(Tables, Guest, DirtyLog):
    def __init__(self, platform="ept-pml", policy="6.12", vcpus=1, manual=0, ring=0, mutants=()):
        self.kind, self.rules = kind_of(platform), RULES[policy]
        self.cdls = 512 if self.kind.pml else 0
        self.has_accessed = self.has_dirty = self.kind.ad or self.rules.software_ad
        self.manual, self.eager, self.nx, self.mutants = manual, self.rules.eager, False, mutants
        self.soft = ring - 64 - self.cdls if ring else None
        self.vcpus = [Vcpu() for _ in range(vcpus)]
        self.slots, self.gen, self.flushes, self.pml_entries, self.pml_full = {}, 0, 0, 0, 0
        self.clear_tables()
        self.clock, self.memory, self.copy, self.tracked = 0, {}, {}, set()
        self.meanwhile = lambda: None  # what other vCPUs do at the unlocked points of a harvest

    # -- memslots

    def slot_of(self, gfn):
        """The slot that a vCPU sees at an address: none is ever in SMM, so address space 0."""
        gfn %= SPAN
        for slot in self.slots.values():  # asked for each access and each translation
            if slot.base <= gfn < slot.end and not slot.as_id:
                return slot
        return None

    def set_region(self, sid, base=0, npages=0, host=None, off=0, flags=0):
        old, as_id = self.slots.get(sid), sid >> 16
        if npages == 0:
            if old is None:
                return errno.EINVAL
            del self.slots[sid]
            self.tracked.discard(sid)
            return self.zap_all(as_id)
        if old and ((host, off, npages) != (old.host, old.off, old.npages) or (flags ^ old.flags) & RO):
            return errno.EINVAL
        if old and (base, flags) == (old.base, old.flags):
            return 0
        others = [s for s in self.slots.values() if s.id != sid and s.as_id == as_id]
        if any(base < s.end and s.base < base + npages for s in others):
            return errno.EEXIST
        new = Slot(sid, base, npages, host, off, flags)
        if flags & LOG:
            self.begin_log(new, old)
        self.slots[sid] = new
        if old is not None and old.base != base:
            self.zap_all(as_id)
        else:
            self.gen += 2 * (as_id == 0)
        if old is not None and old.base == base and not flags & RO:
            (self.enable if flags & LOG else self.disable)(new)
        if not flags & LOG:
            self.tracked.discard(sid)
        elif sid not in self.tracked:
            self.tracked.add(sid)
            self.read_pages(new, range(npages))
        return 0

    def begin_log(self, new, old):
        """Give a slot that logs its bitmap, or that which it had before a move."""
        if old and old.flags & LOG:
            new.dirty, new.began_set, new.unarmed = old.dirty, old.began_set, old.unarmed
            return
        new.began_set = self.manual == 3
        new.unarmed = self.manual == 3 and self.soft is not None
        if self.soft is None:
            new.dirty = set(range(new.npages) if self.manual == 3 else ())

    def zap_all(self, as_id=None):
        if as_id == 0:
            self.gen += 4
        freed = len(self.tables) if self.rules.table_flush else 0
        self.clear_tables()
        self.flush("zap-all", requests=freed + (freed > 0))  # vCPUs load new roots, or the old ones are empty
        return 0

    # -- parameters and capabilities

    def set_manual(self, bits):
        self.manual = bits
        for slot in self.slots.values():
            slot.unarmed |= bits != 3 and slot.began_set and bool(slot.flags & LOG)

    def set_nx(self, on):
        if self.nx != on:
            self.nx = on
            self.zap_all()

    # -- logging on and off

    def enable(self, slot):
        all_set, rules = self.manual == 3, self.rules
        if all_set and not rules.protects_huge_at_enable:
            return
        if self.splits_eagerly() and not all_set and not slot.as_id and self.does("split: enable"):
            self.split_range(slot.base, slot.end)
        found = [(lv, leaf) for lv, at, leaf in self.leafs_of(slot) if at < SPAN or self.does("enable: aliases")]
        cleared = []
        if self.cdls and not all_set:
            cleared = [self.protect(leaf) for lv, leaf in found if lv == 1 and self.does("enable: clear dirty")]
            cleared += [self.protect(leaf) for lv, leaf in found if lv > 1 and self.clears_dirty_of_huge]
        level = self.start_level(2 if self.cdls or all_set else 1)
        protected = [leaf for lv, leaf in found if lv >= level and leaf.w]
        protected = [leaf for leaf in protected if self.does("enable: write-protect")]
        rewritten = self.tdp and rules.rewrites and any(lv >= level for lv, _ in found)
        for leaf in protected:
            leaf.w = False
        if not rules.flush_if_changed:
            self.flush("enable")
        if rules.flush_if_changed and any(cleared):
            self.flush("enable: after clear dirty")
        if rules.flush_if_changed and (protected or rewritten):
            self.flush("enable: after write-protect")

    clears_dirty_of_huge = True

    def splits_eagerly(self):
        return self.eager

    def start_level(self, level):
        """Lowest level that enabling write-protects: once the TDP MMU took all, though `level` was enough."""
        return level if self.rules.heeds_start_level or (self.cdls and self.rules.pml_has_own_protect) else 1

    def disable(self, slot):
        if not slot.as_id:
            {"leaf": self.zap_collapsible, "table": self.zap_tables, "recover": self.recover}[self.rules.collapse](slot)
            if self.rules.disable_sets_dirty and self.cdls:
                self.set_dirty(slot)

    def zap_collapsible(self, slot):
        gone = [(level, gfn) for level, gfn, _ in self.leafs_of(slot) if self.may_be_larger(slot, level, gfn)]
        for key in gone:
            del self.leafs[key]
        if gone:
            self.flush("collapse")

    def may_be_larger(self, slot, level, gfn):
        if self.rules.by_page == "compound":
            return slot.host.is_compound(slot.hpage(gfn))
        if self.rules.by_page:
            return slot.host.kind == "thp" and slot.host_level(gfn) > 1
        allowed = slot.allowed_level(gfn)
        if allowed == 1:
            return False
        return level < (slot.max_level(gfn) if self.rules.clamped else slot.host_level(gfn))

    def collapsible(self, slot):
        """Tables, larger ones first, whose gfns may be mapped by one leaf."""
        for level, gfn in sorted(self.tables, key=lambda t: (-t[0], t[1])):
            if (level, gfn) in self.tables and slot.base <= gfn < slot.end and level + 1 <= slot.max_level(gfn):
                yield level, gfn

    def zap_tables(self, slot):
        for level, gfn in self.collapsible(slot):
            self.drop_table(level, gfn)
            self.flush("collapse")

    def recover(self, slot):
        changed = False
        for level, gfn in self.collapsible(slot):
            below = [(g, leaf) for (lv, g), leaf in self.leafs.items() if lv <= level and g in range(gfn, gfn + PAGES[level + 1])]
            if below:
                _, small = min(below, key=lambda found: found[0])
                self.drop_table(level, gfn)
                self.leafs[level + 1, gfn] = dataclasses.replace(small, x=small.x and not self.nx)
                changed = True
        if changed:
            self.flush("collapse")

    def set_dirty(self, slot):
        """Set D in everything present that maps the slot or leads to it: written again in any case."""
        leafs = [leaf for _, _, leaf in self.leafs_of(slot)]
        if self.set_dirty_flushes(slot, leafs):
            self.flush("disable: set dirty")
        for leaf in leafs:
            leaf.d = True

    def set_dirty_flushes(self, slot, leafs):
        return bool(leafs or self.links_of(slot))

    def links_of(self, slot):
        """Tables that lead to what the slot maps."""
        return {(lv, g) for lv, g in self.tables if g < slot.end and slot.base < g + PAGES[lv + 1]}

    # -- host memory

    def notify(self, host, passes):
        """Run the notifier passes of one backing; an errno goes through."""
        if isinstance(passes, int):
            return passes
        for ranges in passes:
            self.unmap([(host, first, count) for first, count in ranges])
        return 0

    def madvise(self, host, first, count, advice, ages=False):
        bad = self.notify(host, host.madvise(first, count, advice))
        for page in range(first, first + count) if ages and not bad else ():
            self.age(host, page)
        return bad

    def mprotect(self, host, first, count, protect):
        return self.notify(host, host.mprotect(first, count, protect))

    def fork(self, hosts):
        for host in hosts:
            self.notify(host, host.fork())

    def clear_refs(self, hosts):
        self.unmap([(host, 0, host.npages) for host in hosts])
        for host in hosts:
            host.clear_refs()

    def host_write(self, host, first, count):
        for page in range(first, first + count):
            found = host.touch(page, write=True)
            if found and found[2]:
                self.unmap([(host, page, 1)])
