"""`from_bitmaps`, `from_gfns` and the figures of a trace, against what a set says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spte.trace import Trace, TraceError, collect, from_bitmaps, from_gfns, load, save
from spte.trace.summary import previous_epoch, summarize, working_set
from tests.conftest import bitmap_of
from tests.convert.reading import epochs

pages_by_epoch = st.lists(st.sets(st.integers(0, 1023), max_size=30), min_size=1, max_size=12)


def trace_of(sets, interval_ns=10**8):
    sizes = [len(pages) for pages in sets]
    return Trace(np.arange(len(sets) + 1) * interval_ns, np.cumsum([0, *sizes]), np.array(sum(map(sorted, sets), []), np.uint32), 1024)  # noqa: RUF017


@given(pages_by_epoch, st.sampled_from(["<u8", "<i8", "|u1", "|b1"]))
@settings(max_examples=40)
def test_from_bitmaps(sets, dtype):
    rows = np.stack([bitmap_of(pages, 1024) for pages in sets])
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    rows = bits.astype(np.bool_) if dtype == "|b1" else rows.view(dtype)
    got = from_bitmaps(rows)
    assert epochs(got) == [sorted(pages) for pages in sets]
    assert (got.npages, got.duration_ns) == (1024, len(sets) * 10**8)
    assert epochs(from_bitmaps(iter(rows), npages=2000, interval_ns=1)) == epochs(got)


@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 2**30)), min_size=1, max_size=60))
@settings(max_examples=60)
def test_from_gfns_in_any_order(writes):
    start = min(t for t, _ in writes)
    ref = {}
    for t, page in writes:
        ref.setdefault((t - start) // 10**9, set()).add(page)
    got = from_gfns([t for t, _ in writes], [page for _, page in writes], interval_ns=10**9)
    assert epochs(got) == [sorted(ref.get(e, ())) for e in range(max(ref) + 1)]
    assert got.npages % 512 == 0
    assert got.npages > max(page for _, page in writes) >= got.npages - 512


@given(st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=30), max_size=12), st.integers(0, 50))
@settings(max_examples=40)
def test_the_collector_merges_whenever_it_likes(parts, wait):
    ref = {pair for part in parts for pair in part}
    old, collect._WAIT = collect._WAIT, wait
    try:
        collected = collect.Collector()
        for part in parts:
            collected.add(np.array([e for e, _ in part], np.int64), np.array([p for _, p in part], np.uint64))
        if not ref:
            with pytest.raises(TraceError, match="no write"):
                collected.trace(1)
            return
        got = collected.trace(1)
    finally:
        collect._WAIT = old
    low = min(e for e, _ in ref)
    assert {(e + low, p) for e, pages in enumerate(epochs(got)) for p in pages} == ref


def test_what_is_saved_can_be_loaded(tmp_path):
    got = from_gfns([0, 1], [7, 2**36], squeeze=True, meta={"command": "mine"})
    save(got, tmp_path / "t.npz")
    back = load(tmp_path / "t.npz")
    assert back.meta == got.meta
    assert got.meta["runs"] == [[0, 512], [2**36, 512]]
    assert back.command == "mine"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_gfns([0], [2**36]), "squeeze out"),
        (lambda: from_gfns([0], [2**40]), "is it an address"),
        (lambda: from_gfns([0], [-1]), "gfn[0] is -1"),
        (lambda: from_gfns([0, 1], [1]), "2 times and gfn 1"),
        (lambda: from_gfns([], []), "needs a write"),
        (lambda: from_gfns([0.5], [1]), "t_ns is float64"),
        (lambda: from_gfns([[0]], [[1]]), "shape (1, 1)"),
        (lambda: from_gfns([2**63], [1]), "within"),
        (lambda: from_gfns([0, 2**61], [1, 1]), "longer interval"),
        (lambda: from_gfns([0], [600], npages=600), "below npages = 600"),
        (lambda: from_gfns([0], [1], interval_ns=0), "interval_ns is 0"),
        (lambda: from_bitmaps([]), "no write"),
        (lambda: from_bitmaps([np.zeros(3)]), "bitmap 0 is float64"),
        (lambda: from_bitmaps([np.zeros((2, 2), np.uint64)]), "bitmap 0 is uint64 of shape (2, 2)"),
        (lambda: from_bitmaps([np.full(2, 1 << 63, np.uint64)], npages=100), "below npages = 100"),
    ],
)
def test_a_refusal_holds_the_value(make, said):
    with pytest.raises(TraceError) as error:
        make()
    assert said in str(error.value)


def test_more_writes_than_a_file_holds_are_refused(monkeypatch):
    monkeypatch.setattr(collect, "MAX_WRITES", 10)
    with pytest.raises(TraceError, match="more than 10 page writes"):
        from_gfns([0] * 11, range(11))


@given(pages_by_epoch, st.integers(1, 14))
@settings(max_examples=60)
def test_figures_are_those_of_sets(sets, window):
    trace = trace_of(sets)
    before = previous_epoch(trace)
    ref = [next((e for e in reversed(range(i)) if page in sets[e]), -1) for i, pages in enumerate(sets) for page in sorted(pages)]
    assert before.tolist() == ref
    windows = [set().union(*sets[max(0, e - window + 1) : e + 1]) for e in range(len(sets))]
    assert working_set(trace, before, window).tolist() == [len(pages) for pages in windows]
    got = summarize(trace)
    assert (got.touched, got.writes) == (len(set().union(*sets)), sum(map(len, sets)))
    assert (got.peak_pages, got.idle_epochs) == (max(map(len, sets)), sum(not pages for pages in sets))
    assert got.regions == len({page >> 9 for pages in sets for page in pages})
    for interval in got.intervals:
        n = interval.epochs
        whole = [set().union(*sets[i : i + n]) for i in range(0, len(sets) - n + 1, n)]
        assert interval.pages == pytest.approx(sum(map(len, whole)) / len(whole))
        assert interval.seconds == pytest.approx(n / 10)
    assert got.intervals[-1].epochs == len(sets)
