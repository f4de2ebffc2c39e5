"""A program on the VM and on the oracle at once: every answer and every bit of state must be equal."""

import errno

import numpy as np
from oracle.host import PAGES, Host
from oracle.memory import LOG, READ, STATS, WRITE
from oracle.rmap import oracle_of

import spte
from spte import mm

PAGE = 4096
# (A, D, HOST_WRITABLE, MMU_WRITABLE, what every leaf has with R, X, type without A/D, how far up R and X are parked), of EPT and without
OLD_EPT = (1 << 8, 1 << 9, 1 << 10, 1 << 11, 0x70 | 1, 1 << 2, 1 << 52, 54)
EPT = (1 << 8, 1 << 9, 1 << 57, 1 << 58, 1 << 11 | 0x70 | 1, 1 << 2, 1 << 52, 54)
NEW_EPT = (1 << 8, 1 << 9, 1 << 53, 1 << 55, 1 << 11 | 0x70 | 1, 1 << 2 | 1 << 10, 1 << 60, 52)
NPT = (1 << 5, 1 << 6, 1 << 9, 1 << 10, 1 << 11 | 0b101, 0, 0, 0)
OLD_NPT = (1 << 5, 1 << 6, 1 << 10, 1 << 11, 0b101, 0, 0, 0)
LAYOUTS = {"5.10": (OLD_NPT, OLD_EPT), "6.1": (NPT, EPT), "6.12": (NPT, EPT), "7.2": (NPT, NEW_EPT)}  # as the recordings show them
VM_STATS = ("pages_4k", "pages_2m", "pages_1g", "remote_tlb_flush_requests", "nx_lpage_splits")
NX, SUPPRESS_VE, MMIO_TYPE = 1 << 63, 1 << 63, 3 << 52


def leaf_flags(oracle, level, leaf):
    a, d, hw, mw, flags, x, disabled, park = LAYOUTS[oracle.rules.layout][oracle.kind.ept]
    if oracle.kind.ept:
        flags |= x * leaf.x | SUPPRESS_VE * (oracle.rules.layout in ("6.12", "7.2")) | disabled * (not oracle.kind.ad)
    else:
        flags |= NX * (not leaf.x)
    if leaf.parked:
        flags = flags & ~(x | 1) | (flags & (x | 1)) << park
    return f"{flags | a * leaf.a | d * leaf.d | hw * leaf.hw | mw * leaf.mw | leaf.w << 1 | (level > 1) << 7:x}"


def leaf_runs(oracle, leafs):
    """The oracle's leaves that a walk may meet, in the shape of `VM.leafs`."""
    runs = []
    for (level, gfn), leaf in sorted(leafs.items(), key=lambda item: item[0][1]):
        flags = leaf_flags(oracle, level, leaf)
        last = runs[-1] if runs else None
        if last and last[0] == level and last[3] == flags and last[1] + last[2] * PAGES[level] == gfn:
            last[2] += 1
        else:
            runs.append([level, gfn, 1, flags])
    return runs


def mmio_sptes(oracle, mmio):
    fixed = 6 if oracle.kind.ept else 1 << 51 | 7
    if oracle.rules.layout == "5.10":
        return {g: f"{fixed | MMIO_TYPE | g << 12 | (gen & 0x1FF) << 3 | (gen >> 9 & 0x1FF) << 54:x}" for g, gen in mmio.items()}
    return {g: f"{fixed | g << 12 | (gen & 0xFF) << 3 | (gen >> 8 & 0x7FF) << 52:x}" for g, gen in mmio.items()}


def unpack(bitmap):
    return set(np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little")).tolist())


class Both:
    """One program on both models: every call is made on both, and the answers must be equal."""

    def __init__(self, platform, policy, vcpus=1, manual=0, ring=0):
        self.ring = ring
        self.vm = spte.VM(platform, policy, vcpus=vcpus, manual=manual, ring_bytes=ring * 16)
        self.ref = oracle_of(platform, policy, vcpus=vcpus, manual=manual, ring=ring)
        self.backings, self.taken = {}, [0] * vcpus

    def backing(self, sid, kind, npages, populate):
        self.backings[sid] = spte.Backing(kind, npages * PAGE, populate=populate), Host(kind, npages, populate)

    def errno_of(self, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except spte.KvmError as e:
            return e.errno
        return 0

    def set_region(self, sid, base=0, npages=0, off=0, flags=0):
        theirs, ours = self.backings[sid] if npages else (None, None)
        got = self.errno_of(self.vm.set_memory_region, sid, base * PAGE, npages * PAGE, theirs, offset=off * PAGE, flags=flags)
        assert got == self.ref.set_region(sid, base, npages, ours, off, flags)
        return got

    def run(self, v, gfns, kinds):
        gfns, kinds = np.asarray(gfns, np.int64), np.asarray(kinds, np.uint8)
        got = self.vm.vcpus[v].run(gfns, kinds)
        want = self.ref.run(v, gfns.tolist(), kinds.tolist())
        assert (got and (got.reason, got.index)) == want
        if got:
            assert (got.gfn, got.kind) == (gfns[got.index], kinds[got.index])
        return got

    def write(self, gfns, v=0):
        return self.run(v, gfns, [WRITE] * len(gfns))

    def read(self, gfns, v=0):
        return self.run(v, gfns, [READ] * len(gfns))

    def get(self, sid):
        want = self.ref.get(sid)
        try:
            got = unpack(self.vm.get_dirty_log(sid))
        except spte.KvmError as e:
            got = e.errno
        assert got == want
        return got

    def clear(self, sid, first, num, pages):
        """Clear `pages`, numbered from the slot's base."""
        bits = np.zeros(-(-max(num, 1) // 64) * 64, np.uint8)
        bits[[p - first for p in pages if first <= p < first + num]] = 1
        bitmap = np.packbits(bits, bitorder="little").view(np.uint64)
        got = self.errno_of(self.vm.clear_dirty_log, sid, first, num, bitmap)
        assert got == self.ref.clear(sid, first, num, pages)
        return got

    def collect(self, v, limit):
        ring, got = self.vm.vcpus[v].ring, []
        while len(got) < limit:
            at = self.taken[v] % len(ring)
            if ring["flags"][at] != 1:
                break
            got.append((int(ring["slot"][at]), int(ring["offset"][at])))
            ring["flags"][at] = 3
            self.taken[v] += 1
        assert got == self.ref.collect(v, limit)
        return got

    def reset(self):
        got = self.vm.reset_dirty_rings()
        assert got == self.ref.reset_rings()
        return got

    def set_eager(self, eager):
        if self.ref.rules.eager:  # older kernels do not have the parameter
            self.vm.set_param("eager_page_split", eager)
            self.ref.eager = eager

    def set_nx(self, on):
        self.vm.set_param("nx_huge_pages", on)
        self.ref.set_nx(on)

    def set_manual(self, bits):
        self.vm.enable_cap("manual_dirty_log_protect2", bits)
        self.ref.set_manual(bits)

    # -- host memory and KVM's own accesses

    def madvise(self, sid, first, count, advice, ages=False):
        theirs, ours = self.backings[sid]
        got = self.errno_of(mm.madvise, theirs, first, count, advice, ages=ages)
        assert got == self.ref.madvise(ours, first, count, advice, ages)
        return got

    def mprotect(self, sid, first, count, protect):
        theirs, ours = self.backings[sid]
        got = self.errno_of(mm.mprotect, theirs, first, count, mm.PROT_READ if protect else mm.PROT_READ_WRITE)
        assert got == self.ref.mprotect(ours, first, count, protect)
        return got

    def process(self):
        return zip(*dict.fromkeys(self.backings.values()), strict=True)

    def fork(self):
        theirs, ours = self.process()
        mm.fork(theirs)
        self.ref.fork(ours)

    def clear_refs(self):
        theirs, ours = self.process()
        mm.clear_refs(theirs)
        self.ref.clear_refs(ours)

    def host_write(self, sid, first, count):
        theirs, ours = self.backings[sid]
        theirs.write(first, count)
        self.ref.host_write(ours, first, count)

    def kernel_write(self, gfn, v=0):
        self.vm.kernel_write(gfn, v)
        self.ref.kernel_write(v, gfn)

    def prefault(self, gfn, npages, v=0):
        want = self.ref.prefault(v, gfn, npages)
        try:
            at, left = self.vm.vcpus[v].prefault(gfn * PAGE, npages * PAGE)
            assert at == (gfn + npages) * PAGE - left
            got = left // PAGE
        except spte.KvmError as e:
            got = e.errno
        assert got == want

    def set_nr_mmu_pages(self, n):
        assert self.errno_of(self.vm.set_nr_mmu_pages, n) == (errno.EINVAL if n < 64 else 0)

    def compare(self):
        """Leaves, MMIO SPTEs, tables, bitmaps and counters of both; the oracle's guest loses no write, nor does it use what is gone."""
        vm, ref = self.vm, self.ref
        vm.check()
        views, (seen_leafs, seen_tables, seen_mmio) = range(len(vm.vcpus)), ref.seen()
        assert max((vm.leafs(v) for v in views), key=len) == leaf_runs(ref, seen_leafs)
        assert {g: value for v in views for _, g, value in vm.other(v)} == mmio_sptes(ref, seen_mmio)
        tables = {(lv, g + i * PAGES[lv + 1]): nx for v in views for lv, g, n, *_, nx, _ in vm.tables(v) for i in range(n) if lv < 4}
        assert tables == {t: int(t in ref.nx_marks) for t in seen_tables}
        logs = {s["as"] << 16 | s["id"]: s["kbitmap"] for s in vm.slots() if s["kbitmap"] is not None}
        dirty = {sid: {f + i for f, n in runs for i in range(n)} for sid, runs in logs.items()}
        assert dirty == {s.id: s.dirty for s in ref.slots.values() if s.dirty is not None}
        stats, levels = vm.stats(), [lv for lv, _ in ref.leafs]
        nx_splits = list(ref.nx_marks.values()).count(2)
        want = dict(zip(VM_STATS, (*(levels.count(lv) for lv in (1, 2, 3)), ref.flushes, nx_splits), strict=True))
        assert {key: stats["vm"][key] for key in VM_STATS} == want
        for v, vcpu in enumerate(ref.vcpus):
            assert {key: stats[f"vcpu{v}"][key] for key in STATS} == vcpu.stats
        counters = vm.counters()
        assert (counters["pml_entries"], counters["pml_full"]) == (ref.pml_entries, ref.pml_full)
        huge = {id(ours): 4096 * sum(PAGES[ours.huge] for _ in ours.blocks) for _, ours in self.backings.values()}
        assert {id(ours): theirs.huge_bytes for theirs, ours in self.backings.values()} == huge
        assert ref.lost() == set()
        assert ref.stale() == set()

    def close(self):
        assert self.vm.close() == sum(s.flags & LOG for s in self.ref.slots.values())
