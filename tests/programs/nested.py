"""Random programs of guests that run guests, with a naive model: what their tables have said since the last flush, what was written.

A translation may be used from when the tables say it until the vCPU enters again after a flush; what the tables say now may
always be used. So a set of translations a vCPU and address tells what an access may do.
"""

import contextlib
import random

import numpy as np
from conftest import LOG, PAGE, pages_of

import spte
from programs.nest import L2, TABLES_GFN, TABLES_PAGES, Nest, kind_of, violation_of
from spte import mm
from spte.bits import LARGE, MMU_PRESENT, PFN_MASK, SHIFT_PAGE

NPAGES, VIEWS, ROOTS, VCPUS = 1024, 3, 2, 2
PAGES = (0, 1, 7, 8, 511, 512, 600, 1023)
PML_PAGE = TABLES_PAGES - 1
R, W, X = map(int, spte.Access)


class Program(Nest):
    """A nest with two roots of tables, the second view in large pages where that is possible; each step is a method."""

    def __init__(self, platform, seed):
        rng = self.rng = random.Random(f"{platform} {seed}")
        kind, mode = rng.choice(("4k", "thp", "hugetlb2m")), rng.choice(("get", "manual 1", "manual 3", "ring"))
        super().__init__(platform, mode=mode, kind=kind, vcpus=VCPUS, ad=rng.random() < 0.7, npages=NPAGES)
        self.tables.add_root()
        for root in range(ROOTS):
            for view in range(root == 0, VIEWS):
                level = 1 + (view == 1)
                first, count = L2 + view * self.span, NPAGES >> 9 * (level - 1)
                self.tables.map(first, self.base, count, level=level, root=root, dirty=rng.random() < 0.5)
        self.tables.map(TABLES_GFN, TABLES_GFN, TABLES_PAGES, root=1)
        self.pml = platform.startswith("ept") and self.ad and self.vm.platform.ad_bits and rng.random() < 0.3
        if self.pml:
            for vcpu in self.vm.vcpus:
                vcpu.l1_pml_index = 1  # L1's buffer fills with the second write
        self.root = [None] * VCPUS  # whose tables the vCPU runs on
        self.hot = 0, L2  # root and address that most steps are about
        self.plain = set()  # vCPUs in an L2 that has no tables of its own
        self.seen = {(v, root, gfn): {self.says(root, gfn)} for v in range(VCPUS) for root in range(ROOTS) for gfn in self.addresses()}
        self.flushed = [set() for _ in range(VCPUS)]
        self.logs = [False, False]
        self.written = [set(), set()]  # of each slot since its last harvest
        self.got = [set(), set()]  # taken from rings meanwhile
        self.pages = [self.table_memory.table(page) for page in range(TABLES_PAGES)]  # views, in which each step's changes appear
        self.words = self.contents()
        self.links = {}  # entries that were emptied, by their address
        self.reached = set()

    # -- the model

    def addresses(self):
        return [L2 + view * self.span + page for view in range(VIEWS) for page in PAGES]

    def choose(self):
        """Root and address: those of the last step, or others."""
        if self.rng.random() < 0.25:
            self.hot = self.rng.randrange(ROOTS), self.rng.choice(self.addresses())
        return self.hot

    def says(self, root, gfn):
        """What the tables say of an address now: gfn, permissions, D; nothing of an absent one."""
        _, entry, _ = self.tables.entry(gfn, root)
        if not entry:
            return None, 0, False
        if kind_of(self.platform) == "ept":
            return self.tables.translate(gfn, root), entry & 7, bool(entry >> 9 & 1)
        return self.tables.translate(gfn, root), R | entry & W | X * (not entry >> 63), bool(entry >> 6 & 1)

    def hear(self, flushed=None):
        """Add what the tables say now; to a vCPU that has flushed a root, only that."""
        for (v, root, gfn), seen in self.seen.items():
            if (v, root) == flushed:
                seen.clear()
            seen.add(self.says(root, gfn))

    def contents(self):
        return np.stack(self.pages)

    def after(self):
        """What KVM or the guest changed in the tables is written, and may be used from now on."""
        words = self.contents()
        changed = np.flatnonzero((words != self.words).any(axis=1)).tolist()
        if changed:
            self.words = words
            self.wrote(1, changed)
            self.hear()
        self.vm.check()
        self.reached |= {"unsync"} if self.vm.mmu.tables.kvm[0].mmu_unsync else set()
        self.reached |= {"emulated"} if self.stats("pf_emulate") else set()

    def wrote(self, slot, pages):
        if self.logs[slot]:
            self.written[slot].update(pages)

    # -- accesses

    def finish(self, v, access):
        """Run one access to its end; what it comes to but for full rings and full buffers of L1."""
        while True:
            stop = access()
            if stop is None or stop.reason not in ("dirty_ring_full", "pml_full"):
                return stop
            if stop.reason == "dirty_ring_full":
                assert self.mode == "ring"
                self.empty_rings()
            else:
                assert self.pml
                assert self.vm.vcpus[v].l1_pml_index == 0xFFFF
                self.reached.add("L1's buffer full")
                self.vm.vcpus[v].l1_pml_index = self.rng.choice((0, 511))
                self.enter_root(v, self.root[v])

    def access(self):
        v, kind, page = self.rng.randrange(VCPUS), self.rng.choice((R, W, W, W, X)), self.rng.choice(PAGES)
        vcpu, root = self.vm.vcpus[v], self.root[v]
        if root is None:
            assert self.finish(v, lambda: vcpu.run([self.base + page], [kind])) is None
            if kind == spte.WRITE:
                self.wrote(0, [page])
            return
        _, gfn = self.choose()
        stop = self.finish(v, lambda: vcpu.run([gfn], [kind]))
        self.after()
        seen = self.seen[v, root, gfn]
        if stop is not None:
            assert stop.reason == violation_of(self.platform)
            self.reached.add("refused")
            assert any(not perm & kind for _, perm, _ in seen), (stop, seen)
            if kind_of(self.platform) != "long":
                assert not vcpu.in_l2
                self.root[v] = None
            return
        hit, level = self.reaches(gfn, v)
        self.reached |= {"large leaf"} if level > 1 else set()
        assert hit is not None or kind != spte.WRITE
        assert any((hit is None or to == self.base + hit) and perm & kind for to, perm, _ in seen), (hit, seen)
        if kind == spte.WRITE:
            self.wrote(0, [hit])
            assert not self.has_dirty() or any(dirty for _, _, dirty in seen)

    def has_dirty(self):
        """The tables that vCPUs run on have D bits."""
        return kind_of(self.platform) != "ept" or (self.ad and self.vm.platform.ad_bits)

    # -- steps

    def enter_root(self, v, root):
        vcpu, address = self.vm.vcpus[v], self.tables.address(root)
        self.root[v] = root
        if self.platform == "shadow":
            vcpu.load_cr3(address)
            vcpu.read([TABLES_GFN])
        else:
            vcpu.enter_l2(address, ad=self.ad, pml=(TABLES_GFN + PML_PAGE) * PAGE if self.pml else None)
        if root in self.flushed[v] or not self.platform.startswith("ept"):
            self.flushed[v].discard(root)
            self.hear(flushed=(v, root))

    def enter(self):
        v, (root, _) = self.rng.randrange(VCPUS), self.choose()
        if self.root[v] is None and v not in self.plain:
            self.enter_root(v, root)

    def enter_plain(self):
        """An L2 without EPT: on L1's memory, or under shadow paging on the tables that L1 itself runs on."""
        v = self.rng.randrange(VCPUS)
        if v not in self.plain and (self.root[v] is not None) == (self.platform == "shadow"):
            self.vm.vcpus[v].enter_l2()
            self.plain.add(v)
            self.hear(flushed=(v, self.root[v]))

    def leave(self):
        v = self.rng.randrange(VCPUS)
        if v in self.plain:
            self.vm.vcpus[v].leave_l2()
            self.plain.remove(v)
        elif self.root[v] is not None:
            super().leave(v)
            self.root[v] = None

    def flush(self):
        """The guest flushes, at times only what L1 has of one root; a vCPU in L2 leaves it and comes back."""
        v, (hot, _) = self.rng.randrange(VCPUS), self.choose()
        root = self.root[v]
        if v in self.plain or (root is None and self.platform == "shadow"):
            return
        if self.platform != "shadow":
            every = self.rng.random() < 0.5
            if root is not None:
                self.vm.vcpus[v].leave_l2()
            self.vm.vcpus[v].invept(None if every else self.tables.address(hot))
            self.flushed[v] |= set(range(ROOTS)) if every else {hot}
        if root is not None:
            self.enter_root(v, root)

    def store(self):
        """Change an entry on the way to a page: mostly the last one, else a link, which may go and come back."""
        rng, tables = self.rng, self.tables
        v, (root, gfn) = rng.randrange(VCPUS), self.choose()
        address, old, level = tables.entry(gfn, root)
        size = 1 << 9 * (level - 1)
        to = self.base + (rng.choice(PAGES) & -size)
        if rng.random() < 0.15 and old and level < 3:
            address = (tables.walk(gfn, root)[0][-2] << 12) + 8 * (gfn >> 9 * level & 511)
            value = 0
        elif not old and level > 1:
            value = self.links.pop(address, 0)
        elif not old:
            value = self.full | to << 12
        else:
            value = rng.choice((
                tables.permissions(old, R), tables.permissions(old, R | W | X), tables.unused(old, accessed=False),
                tables.unused(old, accessed=True), old & ~int(PFN_MASK) | to << 12, 0,
            ))  # fmt: skip
        if value == 0 and (level > 1 or address != tables.entry(gfn, root)[0]):
            self.links[address] = self.word(address)
        if self.finish(v, lambda: self.vm.vcpus[v].store(address, value)) is None:
            assert self.word(address) == value
            self.wrote(1, [(address >> 12) - TABLES_GFN])

    @property
    def full(self):
        """A leaf that allows everything, A and D set, without its frame."""
        return 0x337 if kind_of(self.platform) == "ept" else 0x67

    def word(self, address):
        return int(self.table_memory.table((address >> 12) - TABLES_GFN)[address % PAGE // 8])

    def toggle(self):
        slot = self.rng.choice((0, 0, 1))
        self.logs[slot] = not self.logs[slot]
        self.written[slot].clear()
        self.got[slot].clear()
        if slot:
            self.log_tables(self.logs[1])
        else:
            self.set_flags(LOG * self.logs[0])

    def empty_rings(self):
        for v, vcpu in enumerate(self.vm.vcpus):
            ring = vcpu.ring
            while ring["flags"][at := self.taken[v] % len(ring)] == 1:
                self.got[ring["slot"][at]].add(int(ring["offset"][at]))
                ring["flags"][at] = 3
                self.taken[v] += 1
        self.vm.reset_dirty_rings()

    def harvest(self):
        if self.mode == "ring":
            self.empty_rings()
        for slot, npages in ((0, NPAGES), (1, TABLES_PAGES)):
            if not self.logs[slot]:
                continue
            if self.mode == "ring":
                got, self.got[slot] = self.got[slot], set()
            else:
                bitmap = self.vm.get_dirty_log(slot)
                got = pages_of(bitmap)
                if self.mode != "get":
                    self.vm.clear_dirty_log(slot, 0, npages, bitmap)
            assert self.written[slot] <= got, (slot, self.written[slot] - got)
            self.written[slot] = set()

    def unmap(self):
        first, count = (512 * self.rng.randrange(2), 512) if self.kind == "hugetlb2m" else (self.rng.choice(PAGES), 1)
        if count == 1 and self.rng.random() < 0.5:
            mm.madvise(self.memory, first, 1, mm.PAGEOUT, ages=True)
            return
        mm.madvise(self.memory, first, count)
        t, hpage = self.vm.mmu.tables, self.memory.hpage + first
        for level in (1, 2):
            sptes = t.sptes[: t.kvm[0].rows][t.pages["level"][: t.kvm[0].rows] == level]
            frames = ((sptes & PFN_MASK) >> SHIFT_PAGE).astype(np.int64)
            leaf = (sptes & MMU_PRESENT != 0) & ((level == 1) | (sptes & LARGE != 0))
            assert not (leaf & (frames >> 9 * (level - 1) == hpage >> 9 * (level - 1))).any()

    def eager(self):
        self.vm.set_param("eager_page_split", self.rng.random() < 0.5)

    def mitigate(self):
        self.vm.set_param("nx_huge_pages", self.rng.random() < 0.5)

    def move(self):
        """Away and back, or deleted and made again: a new log begins."""
        if self.rng.random() < 0.5:
            self.vm.set_memory_region(0, 1 << 40, NPAGES * PAGE, flags=LOG * self.logs[0])
        else:
            self.vm.set_memory_region(0, 0, 0)
            self.written[0].clear()
            self.got[0].clear()
        self.set_flags(LOG * self.logs[0])

    def prefault(self):
        v = self.rng.randrange(VCPUS)
        if self.platform != "shadow" and self.root[v] is None and v not in self.plain:
            self.vm.vcpus[v].prefault((self.base + self.rng.choice(PAGES)) * PAGE, PAGE)

    def kernel_write(self):
        page = self.rng.choice(PAGES)
        self.vm.kernel_write(self.base + page, self.rng.randrange(VCPUS))
        self.wrote(0, [page])


STEPS = {
    "access": 30, "store": 10, "enter": 8, "leave": 2, "flush": 8, "harvest": 6, "toggle": 3, "unmap": 2, "eager": 1, "mitigate": 1,
    "move": 1, "kernel_write": 1, "enter_plain": 3, "prefault": 1,
}  # fmt: skip


def run(platform, seed, length):
    """Run a random program; returns what it came to. A failure shows its steps."""
    program = Program(platform, seed)
    names = program.rng.choices(list(STEPS), list(STEPS.values()), k=length)
    for at, name in enumerate(names):
        try:
            getattr(program, name)()
            program.after()
        except Exception as e:
            e.add_note(f"{platform} seed {seed}, steps: {names[: at + 1]}")
            raise
    with contextlib.suppress(spte.DirtyLoggingLeak):
        program.vm.close()
    return {*names, *program.reached}
