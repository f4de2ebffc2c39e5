"""Host memory of one process: ranges of host addresses are given out once, whoever collects garbage when."""

import gc
import itertools
import random

import spte


def test_live_backings_never_share_host_pages_whenever_the_collector_runs():
    """A VM and its vCPUs are a cycle: its backing dies inside whatever allocation starts the collector, the next backing's too."""
    rng, kept, overlaps = random.Random(1), [], 0
    thresholds = gc.get_threshold()
    try:
        for i in range(3000):
            gc.set_threshold(rng.randrange(1, 400))
            backing = spte.Backing("hugetlb1g", rng.randrange(1, 4) << 30, populate=True)
            vm = spte.VM()
            vm.set_memory_region(0, 0, 2 << 20, backing)
            if i % 7 == 0:
                kept = [*kept[-rng.randrange(1, 30) :], spte.Backing("thp", 2 << 20)]
            ranges = sorted((b.hva, b.hva + b.size) for b in (*kept, backing))
            overlaps += any(end > start for (_, end), (start, _) in itertools.pairwise(ranges))
            del vm, backing
    finally:
        gc.set_threshold(*thresholds)
    assert overlaps == 0
