"""Generated traces: each pattern writes what its name says, the same for the same seed."""

import numpy as np
import pytest

from spte import WRITE
from spte.generate import PATTERNS, generate, perf_test
from spte.generate.patterns import AppendLog, FixedRate, GcSweep, HotCold, Sequential, Strided, Uniform, Zipf, scattered, zipf_ranks
from spte.platform import PAGE_SIZE
from spte.profile.perf_test import PerfTest
from spte.trace import TraceError

PAGES = 512
MEMORY = PAGES * PAGE_SIZE
MS = 10**6


def made(pattern, pages_an_epoch=100, epochs=8, seed=0):
    rate = pages_an_epoch * PAGE_SIZE * 10
    trace = generate(pattern, memory=MEMORY, rate=rate, duration_ns=epochs * 100 * MS, seed=seed)
    assert (trace.nepochs, trace.npages) == (epochs, PAGES)
    return [trace.epoch(i).tolist() for i in range(epochs)]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("rate", "memory"), [(1, MEMORY), (10**6, MEMORY), (10**6, 4 * MEMORY), (10**8, MEMORY)])
def test_every_pattern_at_every_size(name, rate, memory):
    got = [generate(PATTERNS[name](), memory=memory, rate=rate, duration_ns=300 * MS, seed=s) for s in (0, 0, 1)]
    assert (got[0].gfn == got[1].gfn).all()
    assert got[0].meta == got[1].meta
    assert got[0].command.startswith(name + " ")
    is_random = name in ("uniform", "zipf", "hot-cold", "fixed-rate")
    # At the least rate there is no write, at the highest one every page may be written in each epoch.
    if rate == 10**6:
        assert (got[0].gfn.tolist() != got[2].gfn.tolist()) == is_random


def test_sequential_goes_round():
    assert made(Sequential()) == [sorted(i % PAGES for i in range(100 * e, 100 * e + 100)) for e in range(8)]
    assert made(Sequential(), 10_000, 2) == [list(range(PAGES))] * 2


def test_fixed_rate_dirties_what_the_rate_says():
    assert [len(pages) for pages in made(FixedRate())] == [100] * 8
    assert [len(pages) for pages in made(FixedRate(), 9999, 2)] == [PAGES] * 2


def test_uniform_writes_what_chance_gives():
    sizes = [len(pages) for pages in made(Uniform(), PAGES, 64)]
    assert np.mean(sizes) == pytest.approx(PAGES * (1 - np.exp(-1)), rel=0.02)


def test_hot_pages_take_most_writes():
    for epoch in made(HotCold(hot=0.1, hot_writes=0.9), 50, 20):
        assert sum(page < PAGES * 0.1 for page in epoch) > len(epoch) / 2
    cold = {page for epoch in made(HotCold(), 200, 40) for page in epoch if page >= PAGES * 0.1}
    assert len(cold) > PAGES / 2


def test_strided_writes_a_column_after_the_other():
    assert made(Strided(stride=8), 64, 9) == [[row * 8 + column % 8 for row in range(64)] for column in range(9)]
    assert made(Strided(stride=1 << 20), 1, 3) == [[0], [1], [2]]


@pytest.mark.parametrize("stride", [3, 300, 511])
def test_a_stride_that_does_not_divide_memory_reaches_every_page(stride):
    one_by_one = [page for epoch in made(Strided(stride=stride), 1, 1024) for page in epoch]
    assert one_by_one[:512] == one_by_one[512:] == [page for column in range(stride) for page in range(column, 512, stride)]


def test_the_log_grows_and_its_head_is_always_written():
    got = made(AppendLog(), 100, 6)
    assert got[0] == list(range(101))
    assert got[1] == [0, *range(100, 201)]
    assert got[5] == [0, *range(1, 90), *range(500, 512)]


def test_a_full_nursery_is_collected():
    got = made(GcSweep(nursery=0.25), 64, 6)
    young = [list(range(64)), list(range(64, 128))]
    old = list(range(128, 512))
    assert got == [young[0], young[1] + old] * 3


@pytest.mark.parametrize("theta", [0.3, 0.99, 1, 1.0001, 2.5])
def test_zipf_ranks_have_zipfs_chances(theta):
    n, draws = 100, 200_000
    got = np.bincount(zipf_ranks(draws, n, theta, np.random.default_rng(5)), minlength=n) / draws
    ref = np.arange(1, n + 1.0) ** -theta
    ref /= ref.sum()
    assert np.abs(got - ref).max() < 5 * np.sqrt(ref.max() / draws)


@pytest.mark.parametrize("npages", [512, 1024, 512 * 3 * 5 * 7, 89_088])
def test_every_rank_has_its_own_page(npages):
    assert sorted(scattered(np.arange(npages), npages).tolist()) == list(range(npages))


def test_zipf_over_the_largest_guest_needs_no_table():
    ranks = zipf_ranks(1000, 2**31, 0.99, np.random.default_rng(0))
    assert 0 <= ranks.min() <= ranks.max() < 2**31


def test_perf_test_is_the_selftests_writes():
    test = PerfTest(vcpus=2, bytes_per_vcpu=MEMORY, iterations=3, write_percent=40)
    got = perf_test(test, interval_ns=50 * MS)
    assert (got.nepochs, got.npages, got.duration_ns) == (3, 2 * PAGES, 150 * MS)
    for i in range(3):
        written = {gfn for access in test.epoch(i) for gfn in access.gfns[access.kinds == WRITE].tolist()}
        assert got.epoch(i).tolist() == sorted(written)
        assert 0 < len(written) < 2 * PAGES
    assert perf_test(PerfTest(bytes_per_vcpu=MEMORY)).writes == 2 * PAGES
    assert perf_test(PerfTest(bytes_per_vcpu=MEMORY, write_percent=0)).writes == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Zipf(0), "theta=0"),
        (lambda: HotCold(hot=1), "hot=1"),
        (lambda: HotCold(hot_writes=0), "hot_writes=0"),
        (lambda: Strided(0), "stride=0"),
        (lambda: GcSweep(1), "nursery=1"),
        (lambda: generate(Uniform(), memory=4096), "memory=4096"),
        (lambda: generate(Uniform(), memory=1 << 50), "memory="),
        (lambda: generate(Uniform(), rate=0), "rate=0"),
        (lambda: generate(Uniform(), rate=10**15), "rate="),
        (lambda: generate(Uniform(), duration_ns=5), "duration_ns=5"),
        (lambda: generate(Uniform(), duration_ns=150 * MS), "take a multiple"),
        (lambda: generate(Uniform(), seed=-1), "seed=-1"),
        (lambda: perf_test(PerfTest(), interval_ns=0), "interval_ns is 0"),
    ],
)
def test_a_refusal_holds_the_value(make, said):
    with pytest.raises(TraceError) as error:
        make()
    assert said in str(error.value)
