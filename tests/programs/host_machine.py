"""A slot over one backing, for tests that look at single pages of host memory."""

from collections import Counter

from conftest import PAGE, pages_of

import spte

BASE = 1024
RO = 2
KINDS = ("4k", "thp", "hugetlb2m", "shm")


class Machine:
    """A slot at gfn 1024 over one backing, on NPT, whose leaves read as in the recordings: e67, 825, ee7, ..."""

    def __init__(self, kind="4k", npages=1024, populate=True, policy="6.12", flags=0, platform="npt"):
        self.vm, self.npages = spte.VM(platform, policy), npages
        self.memory = spte.Backing(kind, npages * PAGE, populate=populate)
        self.set_flags(flags)

    def set_flags(self, flags, slot=0, base=BASE):
        self.vm.set_memory_region(slot, base * PAGE, self.npages * PAGE, self.memory, flags=flags)

    def access(self, kind, *pages):
        """Access pages one by one; returns how the fault counters moved, without zeros."""
        before = Counter(self.vm.stats()["vcpu0"])
        for page in pages:
            if kind == "prefault":
                self.vm.vcpus[0].prefault((BASE + page) * PAGE, PAGE)
            else:
                getattr(self.vm.vcpus[0], kind)([BASE + page])
        return {k: n for k, n in (Counter(self.vm.stats()["vcpu0"]) - before).items() if k.startswith("pf_")}

    def read(self, *pages):
        return self.access("read", *pages)

    def write(self, *pages):
        return self.access("write", *pages)

    def prefault(self, *pages):
        return self.access("prefault", *pages)

    def leafs(self):
        """{first page: leaf} by slot page."""
        step = {1: 1, 2: 512, 3: 512**2}
        return {g + i * step[lv] - BASE: flags for lv, g, n, flags in self.vm.leafs() for i in range(n)}

    def dirty(self):
        return pages_of(self.vm.get_dirty_log(0))

    def flushes(self):
        return self.vm.stats()["vm"]["remote_tlb_flush_requests"]

    def flushes_of(self, change, *args, **kwargs):
        before = self.flushes()
        change(*args, **kwargs)
        return self.flushes() - before


ONE_FAULT = {"pf_taken": 1, "pf_fixed": 1}
