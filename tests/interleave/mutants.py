"""Steps of the order that keeps writes from being lost, each left out or turned round in the source of one function."""

import contextlib
import inspect
import sys
import textwrap

from spte._numba import atomics
from spte.cpu import run_shared, walk_ahead
from spte.kernels import _bitmap
from spte.mmu import mark_dirty, page_fault
from spte.mmu.dirty_log import harvest
from spte.vm import dirty_log

_TAKE = "        take_words(s.words, live, out, first, end, is_shared(t))\n"
_ARM = "        some, got = _rearm(t, s, m, roots, k, s.slots[k].base_gfn, out, first, end)\n"
_PEEK = "        for w in range(first, end):\n            out[w] = load(s.words, live + U64(w))\n"
_CHANGE = "        if not replace_spte(t, f.row, f.i, old, new):\n            return True  # the access is tried again\n"
_MARK = "        if (new & ~old & WRITABLE) != ZERO:\n            mark_dirty(t, s, v, f.slot, f.gfn)\n"
_CAS = "    with one_at_a_time:\n        old = flat[index]\n        if old == expected:\n            flat[index] = value\n"
_STORE = "    old = flat[index]\n    flat[index] = value\n    old = expected\n"
_STAMP = "    if writes and v.memory.shape[0] > 0:\n"
_CONFIRM = "    v.requests[CONFIRMED] = v.requests[REQUEST]\n"

# What is wrong: module, function, text, and what stands there instead.
MUTANTS = {
    "bit after protect": (harvest, "get_dirty_log", _TAKE + _ARM, _PEEK + _ARM + _TAKE),
    "return before flush": (dirty_log, "_flush", "        kvm.kick_and_wait()\n", "        pass\n"),
    "kick left out": (run_shared, "request_exit", "fetch_add(requests, REQUEST, 1) + 1", "load(requests, REQUEST)"),
    "plain store for compare-and-exchange": (atomics, "compare_exchange", _CAS, _STORE),
    "bitmap read, then zeroed": (
        _bitmap, "take_words", "out[w] = swap(words, np.int64(start + w), ZERO)", "out[w] = words[start + w]; words[start + w] = ZERO",
    ),
    "bit set by a plain store": (mark_dirty, "_set_bit", "fetch_or(words, w, bit)", "words[w] |= bit"),
    "page marked before its SPTE": (page_fault, "fast_page_fault", _CHANGE + _MARK, _MARK + _CHANGE),
    "confirmed between look and store": (walk_ahead, "_let_through_shared", _STAMP, _CONFIRM + _STAMP),
    "entry not announced": (run_shared, "run_shared", "swap(v.requests, IN_GUEST, 1)", "pass"),
}  # fmt: skip


@contextlib.contextmanager
def mutated(name):
    """Let every module use the mutant `name` meanwhile."""
    module, function, text, instead = MUTANTS[name]
    old = getattr(module, function)
    source = textwrap.dedent(inspect.getsource(old))
    assert source.count(text) == 1, f"{name}: {function} has another source"
    body = source[source.index("def ") :].replace(text, instead)
    made = {}
    exec(f"from __future__ import annotations\n{body}", vars(module), made)
    users = [m for m in list(sys.modules.values()) if m and getattr(m, "__name__", "").startswith("spte") and vars(m).get(function) is old]
    for user in users:
        setattr(user, function, made[function])
    try:
        yield
    finally:
        for user in users:
            setattr(user, function, old)
