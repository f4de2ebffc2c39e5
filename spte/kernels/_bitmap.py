"""Loops over the words of a dirty bitmap; bit b of word w is page ``64 w + b``."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import load, swap
from spte._numba.jit import ctz, helper, kernel_noinline, popcount
from spte.arrays.tables import HARVEST_WORDS
from spte.bits import ONE, U64, ZERO

WORD_SHIFT, WORD_MASK = U64(6), U64(63)
LAST_BIT = ONE << WORD_MASK
TWO, THREE, FOUR = U64(2), U64(3), U64(4)


@kernel_noinline
def first_block(words, start, first, count):
    """Return the first of words ``first, first + HARVEST_WORDS, ...`` from `start` on whose block is not all 0, else `count`."""
    while first < count:
        seen = ZERO
        for w in range(U64(first), U64(min(first + HARVEST_WORDS, count))):
            seen |= words[start + w]
        if seen != ZERO:
            return first
        first += HARVEST_WORDS
    return count


@helper
def next_word(words, w, end):
    """Return the first of the words ``w, w + 1, ...`` that is not 0, `end` if there is none before; all `np.uint64`."""
    # By fours: where a hundredth is dirty, in runs, a harvest took 1.25 times as long word by word.
    while w + FOUR <= end and (words[w] | words[w + ONE] | words[w + TWO] | words[w + THREE]) == ZERO:
        w += FOUR
    while w < end and words[w] == ZERO:
        w += ONE
    return w


@helper
def take_words(words, start, out, first, end, shared):
    """Move the words from `start` on to ``out[first:end]``, all 0 before, and leave 0. `shared`: others set bits meanwhile."""
    for w in range(U64(first), U64(end)):
        if shared:
            if load(words, np.int64(start + w)) != ZERO:
                out[w] = swap(words, np.int64(start + w), ZERO)
            continue
        out[w] = words[start + w]
        words[start + w] = ZERO


@helper
def count_bits(masks, first, end):
    """Return ``(words not 0, set bits)`` of ``masks[first:end]``, both `np.uint64`."""
    found = pages = ZERO
    for w in range(U64(first), U64(end)):
        found += U64(masks[w] != ZERO)
        pages += U64(popcount(masks[w]))
    return found, pages


@kernel_noinline
def list_pages(masks, first, end, pages, places):
    """Put the pages of the `pages` set bits of ``masks[first:end]`` into `places`, which has room for one more; returns their number."""
    count = ZERO
    if pages < U64(end - first) >> THREE:  # most words are 0
        w = next_word(masks, U64(first), U64(end))
        while w < U64(end):
            mask = masks[w]
            while mask != ZERO:
                places[count] = (w << WORD_SHIFT) + U64(ctz(mask))
                count += ONE
                mask &= mask - ONE
            w = next_word(masks, w + ONE, U64(end))
        return count
    # Without a branch on the first bit of a word.
    for w in range(U64(first), U64(end)):
        mask = masks[w]
        page = w << WORD_SHIFT
        places[count] = page + U64(ctz(mask | LAST_BIT))
        more = U64(mask != ZERO)
        count += more
        mask &= mask - more
        while mask != ZERO:
            places[count] = page + U64(ctz(mask))
            count += ONE
            mask &= mask - ONE
    return count
