"""The steps that random programs are made of: guest accesses, harvests, changes of slots, modes and host memory, on both models."""

import dataclasses

from oracle.host import COLD, DONTNEED, FREE, PAGEOUT
from oracle.memory import EXEC, LOG, READ, RO, WRITE
from oracle.rules import RULES

from programs.both import Both

ALIAS, SMM = 2, 1 << 16  # another view of slot 0's memory, and of slot 1's in address space 1, where no vCPU ever runs
OWN_SLOTS, SLOTS, VCPUS = (0, 1), (0, 0, 1, 1, ALIAS, SMM), (0, 1)
HOME = {0: 0, 1: 1, ALIAS: 2, SMM: 0}
SPACING = 8192  # gfns between the homes of two slots
OFFSETS = (*range(0, 1500, 13), 11, 12, 63, 64, 511, 512, 514)
HOST_RANGES = {"sid": OWN_SLOTS, "first": (*OFFSETS[::9], 11, 511, *(0, 512) * 5, 1024), "count": (1, 3, 64, 512, 512, 700, 1024)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a slot of a program looks: small, odd, misaligned in gpa or in host memory."""

    kind: str
    npages: int
    shift: int  # first gfn modulo 2 MiB
    off: int  # first page of the backing that the slot maps
    populate: bool

    def backing_pages(self):
        return -(-(self.npages + self.off) // 512) * 512 if self.kind == "hugetlb2m" else self.npages + self.off


SHAPES = [
    Shape(kind, npages, shift, shift if fits else 448 - shift, populate)
    for kind in ("thp", "thp", "hugetlb2m", "4k", "shm")
    for npages in (1088, 1500, 1024, 600, 515, 65, 1)
    for shift in (0, 0, 1, 448)
    for fits in ((True, True, True, False) if kind in ("thp", "hugetlb2m") else (True,))
    for populate in (True, False)
]
START = {
    "shape0": SHAPES, "shape1": SHAPES, "manual": (0, 0, 1, 3), "eager": (True, False), "flags": (0, 0, 0, LOG, RO),
    "touch": (None, READ, WRITE, WRITE), "alias": (0, 1, 448),
}  # fmt: skip
STEPS = {
    "access": {
        "v": VCPUS, "sid": SLOTS, "first": OFFSETS, "count": range(1, 49), "stride": (1, 1, 7, 64, 512),
        "kind": (WRITE, WRITE, READ, EXEC), "wrap": (True, True, True, True, False),
    },
    "sweep": {"v": VCPUS, "sid": SLOTS, "kind": (WRITE, WRITE, READ, EXEC), "step": (1, 1, -1, 3)},
    "stale": {"v": VCPUS, "sid": SLOTS, "first": OFFSETS},
    "get": {"sid": SLOTS},
    "clear": {
        "sid": SLOTS, "word": range(25), "words": range(1, 25), "tail": (True, True, False), "mask": (1, 2, 3, 64, 511),
        "only_seen": (True, False),
    },
    "get_and_clear": {"sid": SLOTS},
    "toggle_logging": {"sid": SLOTS},
    "rearrange": {"sid": SLOTS, "place": (0, 1, 1, 2, None), "flags": (0, LOG, LOG, RO, RO | LOG)},
    "tune": {"eager": (True, False), "bits": (None, 0, 1, 3), "nx": (None, None, None, True, False), "mmu_pages": (63, 64, 1000)},
    "madvise": {**HOST_RANGES, "advice": (DONTNEED, DONTNEED, FREE, COLD, PAGEOUT), "ages": (True, False)},
    "mprotect": {**HOST_RANGES, "protect": (True, False, False)},
    "balloon": {"v": VCPUS, "sid": OWN_SLOTS, "kind": (READ, WRITE)},
    "write_protect_host": {"fork": (True, False)},
    "host_write": {"sid": OWN_SLOTS, "first": OFFSETS, "count": (1, 2, 9)},
    "kernel_write": {"v": VCPUS, "sid": SLOTS, "first": OFFSETS, "count": (1, 2, 9)},
    "collect": {"v": VCPUS, "limit": (1, 5, 100, 4096)},
    "reset": {},
    "prefault": {"v": VCPUS, "sid": SLOTS, "first": OFFSETS, "count": (1, 9, 600), "shift": (0, 0, 0, 2000)},
}  # fmt: skip
WEIGHTS = {"access": 4, "sweep": 2, "get": 2, "clear": 2, "get_and_clear": 2, "toggle_logging": 2}
WITHOUT_RINGS, WITH_RINGS = {"clear", "get_and_clear"}, {"collect", "reset"}


def steps_of(policy, rings):
    """Names of the steps that such a VM has."""
    absent = (WITHOUT_RINGS if rings else WITH_RINGS) | (set() if RULES[policy].prefault else {"prefault"})
    return [name for name in STEPS if name not in absent]


class Program:
    """Two slots, two further views of their memory, two vCPUs, and the steps of `STEPS`."""

    def __init__(self, platform, policy, rings):
        self.platform, self.policy, self.rings = platform, policy, rings

    def start(self, shape0, shape1, manual, eager, flags, touch, alias):
        ring = (1024 if "-pml" in self.platform else 256) if self.rings else 0
        self.both = Both(self.platform, self.policy, vcpus=2, manual=manual, ring=ring)
        self.both.set_eager(eager)
        other = dataclasses.replace(shape0, shift=alias)
        self.shapes = {0: shape0, 1: shape1, ALIAS: other, SMM: dataclasses.replace(shape1, shift=alias)}
        for sid, shape in ((0, shape0), (1, shape1)):
            self.both.backing(sid, shape.kind, shape.backing_pages(), shape.populate)
            assert self.create(sid, 0, flags) == 0
            if touch is not None:
                self.sweep(0, sid, touch, 1)
        self.both.backings |= {ALIAS: self.both.backings[0], SMM: self.both.backings[1]}

    def create(self, sid, place, flags):
        """Create, move or change the slot; `place` 0 and 1 are its own, 2 lies across its neighbour."""
        shape = self.shapes[sid]
        base = HOME[sid] * SPACING + place * SPACING // 2 + shape.shift if place < 2 else (1 - min(sid, 1)) * SPACING
        return self.both.set_region(sid, base, shape.npages, shape.off, flags)

    def base(self, sid):
        slot = self.both.ref.slots.get(sid)
        return slot.base if slot else HOME[sid] * SPACING + self.shapes[sid].shift

    def host_range(self, sid, first, count):
        """Bring a range of host pages inside the backing; of hugetlb most of them whole huge pages."""
        npages = self.shapes[sid].backing_pages()
        if self.shapes[sid].kind == "hugetlb2m" and count != 3:
            return first // 512 * 512 % npages, 512
        first %= npages
        return first, min(count, npages - first)

    def want_logging(self, sid):
        """Most programs are about a slot that logs."""
        slot = self.both.ref.slots.get(sid)
        if slot is None or not slot.flags & LOG:
            self.toggle_logging(sid)

    def access(self, v, sid, first, count, stride, kind, wrap):
        """Some accesses; without `wrap` they may leave the slot."""
        size = self.shapes[sid].npages if wrap else 1 << 20
        gfns = [self.base(sid) + (first + i * stride) % size for i in range(count)]
        self.both.run(v, gfns, [kind] * count)

    def sweep(self, v, sid, kind, step):
        gfns = range(self.base(sid), self.base(sid) + self.shapes[sid].npages)[::step]
        self.both.run(v, gfns, [kind] * len(gfns))

    def stale(self, v, sid, first):
        """Write through a stale translation, which only the oracle has; else a plain write on both."""
        gfn = self.base(sid) + first % self.shapes[sid].npages
        if not self.both.ref.through_tlb(v, gfn):
            self.both.write([gfn], v)

    def get(self, sid):
        self.both.get(sid)
        self.want_logging(sid)

    def clear(self, sid, word, words, tail, mask, only_seen):
        """Clear each `mask`-th page of some words, or of all up to the slot's end."""
        first, npages = word * 64, self.shapes[sid].npages
        num = npages - first if tail and first <= npages else words * 64
        seen = self.both.get(sid) if only_seen else None
        pages = set(range(first, first + num, mask))
        self.both.clear(sid, first, num, pages & seen if isinstance(seen, set) else pages)
        self.want_logging(sid)

    def get_and_clear(self, sid):
        seen = self.both.get(sid)
        if isinstance(seen, set):
            self.both.clear(sid, 0, self.shapes[sid].npages, seen)
        self.want_logging(sid)

    def toggle_logging(self, sid):
        slot = self.both.ref.slots.get(sid)
        flags = slot.flags ^ LOG if slot else LOG
        self.both.set_region(sid, self.base(sid), self.shapes[sid].npages, self.shapes[sid].off, flags)

    def rearrange(self, sid, place, flags):
        """Move the slot or create it; `place` None deletes it if it is there."""
        if place is None and sid in self.both.ref.slots:
            self.both.set_region(sid)
        else:
            self.create(sid, place or 0, flags)

    def tune(self, eager, bits, nx, mmu_pages):
        self.both.set_eager(eager)
        self.both.set_nr_mmu_pages(mmu_pages)
        if bits is not None:
            self.both.set_manual(bits)
        if nx is not None:
            self.both.set_nx(nx)

    def madvise(self, sid, first, count, advice, ages):
        self.both.madvise(sid, *self.host_range(sid, first, count), advice, ages and advice == PAGEOUT)

    def balloon(self, v, sid, kind):
        """Take all memory from the guest, end logging, and let the guest come back."""
        self.both.madvise(sid, 0, self.shapes[sid].backing_pages(), DONTNEED)
        slot = self.both.ref.slots.get(sid)
        if slot is not None and slot.flags & LOG:
            self.toggle_logging(sid)
        self.access(v, sid, 0, 20, 64, kind, True)

    def mprotect(self, sid, first, count, protect):
        self.both.mprotect(sid, *self.host_range(sid, first, count), protect)

    def write_protect_host(self, fork):
        self.both.fork() if fork else self.both.clear_refs()

    def host_write(self, sid, first, count):
        self.both.host_write(sid, *self.host_range(sid, first, count))

    def kernel_write(self, v, sid, first, count):
        """A ring that is all but full must not overflow: KVM only warns."""
        for i in range(count):
            if not self.rings or len(self.both.ref.vcpus[v].ring) < self.both.ring - 1:
                self.both.kernel_write(self.base(sid) + (first + i) % self.shapes[sid].npages, v)

    def prefault(self, v, sid, first, count, shift):
        room = self.both.ring - len(self.both.ref.vcpus[v].ring) - 1 if self.rings else count
        if room > 0:
            self.both.prefault(self.base(sid) + first % self.shapes[sid].npages + shift, min(count, room), v)

    def collect(self, v, limit):
        self.both.collect(v, limit)

    def reset(self):
        self.both.reset()
