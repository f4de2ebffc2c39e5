"""A trace in a vCPU's own time: evenly spread, in any steps, again and again or once."""

import numpy as np
import pytest

from spte.migrate.playback import TICKS, Playback, Writes
from spte.profile.workload import TraceWorkload
from spte.trace import Trace


@pytest.fixture
def work():
    """Two epochs of 100 and 300 ns, an empty one between them of no time."""
    trace = Trace(np.array([50, 150, 150, 450]), np.array([0, 2, 2, 5]), np.array([1, 600, 2, 3, 4], np.uint32), 1024)
    return TraceWorkload(trace, vcpus=2)


def played(work, vcpu, until, *, repeat=True):
    playback = Playback(Writes(work), vcpu, repeat=repeat)
    parts = [playback.until(int(t)) for t in until]
    return [(int(t), int(g)) for times, gfns in parts for t, g in zip(times, gfns, strict=True)]


def test_writes_are_spread_evenly_over_their_epoch(work):
    assert played(work, 0, [400 * TICKS]) == [(50 * TICKS, 1), (150 * TICKS, 2), (250 * TICKS, 3), (350 * TICKS, 4)]
    assert played(work, 1, [400 * TICKS]) == [(50 * TICKS, 600)]


def test_a_write_at_the_very_instant_has_not_happened_yet(work):
    assert played(work, 0, [50 * TICKS]) == []
    assert played(work, 0, [50 * TICKS + 1]) == [(50 * TICKS, 1)]


def test_after_its_end_the_trace_repeats_or_is_over(work):
    end = 1000 * TICKS
    once = played(work, 0, [end], repeat=False)
    assert [gfn for _, gfn in once] == [1, 2, 3, 4]
    again = played(work, 0, [end])
    assert again == [(t + n * 400 * TICKS, g) for n in range(3) for t, g in once if t + n * 400 * TICKS < end]


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_matter_in_which_steps_time_passes(work, seed):
    steps = np.sort(np.random.default_rng(seed).integers(0, 1500 * TICKS, 40))
    for vcpu in range(2):
        for repeat in (True, False):
            assert played(work, vcpu, steps, repeat=repeat) == played(work, vcpu, steps[-1:], repeat=repeat)


def test_a_long_epoch_of_many_writes_does_not_overflow():
    trace = Trace(np.array([0, 10**15]), np.array([0, 1 << 18]), np.arange(1 << 18, dtype=np.uint32), 1 << 18)
    times, gfns = Writes(TraceWorkload(trace)).epoch(0)[0]
    assert len(gfns) == 1 << 18
    assert (np.diff(times) > 0).all()
    assert times[-1] == 10**15 * TICKS * ((2 << 18) - 1) // (2 << 18)
