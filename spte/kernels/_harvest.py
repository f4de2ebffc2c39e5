"""Harvest and re-arm: exchange each word of a dirty bitmap with 0 and make the next write to its pages visible again.

Order is bit -> protect -> flush -> return: a write through a stale TLB entry before the flush is covered, because the page is
reported already and read after the return. The caller must be exclusive on the tables and flushes if a word was not 0.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import ctz, helper, kernel, popcount, prefetch
from spte.arrays.records import U64s
from spte.arrays.tables import HARVEST_WORDS
from spte.bits import INDEX_MASK, ONE, U64, W_SHIFT, ZERO
from spte.kernels._bitmap import WORD_SHIFT, count_bits, first_block, list_pages, next_word, take_words
from spte.kernels._check import changed, separate
from spte.kernels._entries import clear_entry
from spte.kernels._layout import AnyPlatform, resolve

SWEPT = 4  # set bits of a word from which sweeping its 64 entries is quicker than counting zeros
WINDOW, LAST_WINDOW = U64(64), U64(512 - 64)  # entries; last place in a table from which a full window fits
DENSE = 5  # set bits a word from which sweeping its 64 entries is quicker than a list
IN_FLIGHT = U64(16)  # entries prefetched at once; of a full block's some get lost


@helper
def rearm_window(sptes, first, mask, shift, typed_shift, shared):
    """Re-arm ``sptes[first + b]``, all of one table, for each bit b of `mask`: KVM's clear_dirty_pt_masked. Returns SPTEs changed.

    `shared`: beside vCPUs, as for `clear_entry`.
    """
    done = ZERO
    first = U64(first)
    if first & INDEX_MASK <= LAST_WINDOW and first + WINDOW <= U64(sptes.shape[0]) and popcount(mask) >= SWEPT:
        for b in range(WINDOW):
            done += clear_entry(sptes, first + b, shift, typed_shift, mask >> b, shared)
        return np.int64(done)
    while mask != ZERO:
        done += clear_entry(sptes, first + U64(ctz(mask)), shift, typed_shift, ONE, shared)
        mask &= mask - ONE
    return np.int64(done)


@helper
def rearm_places(sptes, places, count, shift, typed_shift, shared):
    """Re-arm the entries ``sptes[places[:count]]`` and prefetch ahead; returns SPTEs changed."""
    done = ZERO
    for c in range(U64(count)):
        prefetch(sptes, np.int64(places[min(c + IN_FLIGHT, U64(count) - ONE)]))
        done += clear_entry(sptes, places[c], shift, typed_shift, ONE, shared)
    return np.int64(done)


@kernel
def _harvest(sptes, bitmap, out, places, shift):
    done, count = np.int64(0), bitmap.shape[0]
    first = first_block(bitmap, ZERO, np.int64(0), count)
    while first < count:
        end = min(first + HARVEST_WORDS, count)
        take_words(bitmap, ZERO, out, first, end, False)
        found, pages = count_bits(out, first, end)
        if pages >= found * U64(DENSE):
            w = next_word(out, U64(first), U64(end))
            while w < U64(end):
                done += rearm_window(sptes, w << WORD_SHIFT, out[w], shift, W_SHIFT, False)
                w = next_word(out, w + ONE, U64(end))
        else:
            done += rearm_places(sptes, places, list_pages(out, first, end, pages, places), shift, W_SHIFT, False)
        first = first_block(bitmap, ZERO, end, count)
    return done


def harvest(sptes: U64s, bitmap: U64s, *, out: U64s | None = None, platform: AnyPlatform = "ept-pml") -> tuple[U64s, int]:
    """Move the log out of `bitmap` and re-arm the entries of its set bits: KVM's kvm_get_dirty_log_protect (KVM_GET_DIRTY_LOG).

    The caller must flush TLBs if the log is not all 0. Where PML logs the setting of D and the A/D type (bits 53:52) is 0, re-arming
    clears D: bit 9 with EPT, bit 6 with NPT. Elsewhere only a fault shows the next write, so it clears W (bit 1). This is why, on a
    platform without PML, W is cleared here and D in `clear_dirty`, which KVM uses with PML only.

    Parameters
    ----------
    sptes : ndarray of uint64[npages], any shape, C-contiguous
        Level-1 entries of a slot in the order of its pages; mutated: D or W is cleared in present entries whose bit is set.
    bitmap : ndarray of uint64[ceil(npages / 64)], C-contiguous
        Dirty bitmap, bit 0 of word 0 = first page; mutated: all 0 afterwards.
    out : ndarray of uint64[ceil(npages / 64)], C-contiguous, optional
        Receives the log; mutated. Default: a new array.
    platform : str, Platform or KernelLayout
        Says where D lies and whether PML logs it; what `spte.kernels.layout` returns saves the look-up.

    Returns
    -------
    log : ndarray of uint64[ceil(npages / 64)]
        What `bitmap` held: `out` if given.
    changed : int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        An array is not uint64, not C-contiguous, read-only, of a size that does not fit the others, or shares memory with another;
        `bitmap` has bits beyond the last page; `platform` is no platform. Nothing is changed.
    PlatformError
        The platform is not known.
    """
    shift = resolve(platform).rearm_shift
    flat = changed(sptes, "sptes").reshape(-1)
    words = (len(flat) + 63) // 64
    dirty = _words(bitmap, "bitmap", words, len(flat))
    tail = len(flat) % 64
    if tail and int(dirty[-1]) >> tail:
        raise ValueError(f"bitmap has bits set beyond page {len(flat) - 1}: its last word is {int(dirty[-1]):#x}; clear them")
    if out is None:
        separate(sptes=flat, bitmap=dirty)
        log = np.zeros(words, np.uint64)
    else:
        log = _words(out, "out", words, len(flat))
        separate(sptes=flat, bitmap=dirty, out=log)
        log.fill(0)
    places = np.empty(DENSE * min(words, HARVEST_WORDS) + 1, np.uint64)
    done = int(_harvest(flat, dirty, log, places, shift))
    return log if out is None else out, done


def _words(array: U64s, name: str, words: int, npages: int) -> U64s:
    plain = changed(array, name)
    if plain.shape != (words,):
        raise ValueError(f"{name} has shape {plain.shape}; {npages} pages need ({words},)")
    return plain
