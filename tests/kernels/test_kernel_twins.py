"""The public kernels on random tables: equal to a naive reference, and to their plain-Python twins bit for bit."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from spte import kernels
from spte._numba import jit as _jit

W, LARGE, PRESENT = 1 << 1, 1 << 7, 1 << 11
DIRTY = {"ept-pml": 1 << 9, "ept-nopml": 1 << 9, "npt": 1 << 6, "npt-pml": 1 << 6}
ADDRESS = 0x000F_FFFF_FFFF_F000
SEEDS = range(6)


def random_sptes(rng, count, level=1):
    """Any 64 bits, but half of the entries present, and addresses aligned to the level."""
    sptes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    sptes[rng.random(count) < 0.5] |= np.uint64(PRESENT)
    return sptes & ~np.uint64((1 << 9 * (level - 1) + 12) - (1 << 12)) if level > 1 else sptes


def is_leaf(spte, level):
    return bool(spte & PRESENT) and (level == 1 or bool(spte & LARGE))


def logging_bit(spte, dirty):
    """D, or W where the A/D type (bits 53:52) says that D is not used."""
    return dirty if spte >> 52 & 3 == 0 else W


def as_ints(array):
    return [int(x) for x in array.reshape(-1)]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_write_protect_takes_w_from_leaves_only(seed, level):
    got = random_sptes(np.random.default_rng(seed), 1024 + 7 * seed)
    ref = [s & ~W if is_leaf(s, level) else s for s in as_ints(got)]
    changed = sum(a != b for a, b in zip(ref, as_ints(got), strict=True))
    assert kernels.write_protect(got, level) == changed
    assert as_ints(got) == ref
    assert kernels.write_protect(got, level) == 0


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("platform", DIRTY)
@pytest.mark.parametrize("seed", SEEDS)
def test_clear_dirty_takes_the_bit_that_the_next_write_sets(seed, platform, level):
    got = random_sptes(np.random.default_rng(seed), 1024 + 7 * seed)
    ref = [s & ~logging_bit(s, DIRTY[platform]) if is_leaf(s, level) else s for s in as_ints(got)]
    changed = sum(a != b for a, b in zip(ref, as_ints(got), strict=True))
    assert kernels.clear_dirty(got, level, platform=platform) == changed
    assert as_ints(got) == ref


@pytest.mark.parametrize("platform", DIRTY)
@pytest.mark.parametrize("seed", SEEDS)
def test_harvest_moves_the_bitmap_and_rearms_its_pages(seed, platform):
    rng = np.random.default_rng(seed)
    got = random_sptes(rng, 64 * 9 + 7 * seed)
    bits = rng.random(len(got)) < (0.02, 0.5, 1)[seed % 3]
    bitmap = np.packbits(np.pad(bits, (0, -len(bits) % 64)), bitorder="little").view(np.uint64)
    dirty = DIRTY[platform] if platform.endswith("-pml") else W
    ref = [s & ~logging_bit(s, dirty) if b and s & PRESENT else s for s, b in zip(as_ints(got), bits, strict=True)]
    changed = sum(a != b for a, b in zip(ref, as_ints(got), strict=True))
    before, out = bitmap.copy(), np.empty_like(bitmap)
    log, count = kernels.harvest(got, bitmap, out=out, platform=platform)
    assert log is out
    assert count == changed
    assert as_ints(got) == ref
    assert not bitmap.any()
    assert (out == before).all()


@pytest.mark.parametrize("index", [511, 510, 300, 0, 0xFFFF])
@pytest.mark.parametrize("seed", SEEDS)
def test_pml_flush_marks_the_entries_above_the_index(seed, index):
    rng = np.random.default_rng(seed)
    base, words = 1000, 5
    buffer = rng.integers(base - 20, base + 64 * words + 20, 512, dtype=np.uint64) << np.uint64(12)
    bitmap = rng.integers(0, 1 << 64, words, dtype=np.uint64)
    before = {p for p in range(64 * words) if int(bitmap[p // 64]) >> p % 64 & 1}
    valid = as_ints(buffer)[index + 1 if index < 512 else 0 :]
    logged = {gpa // 4096 - base for gpa in valid} & set(range(64 * words))
    assert kernels.pml_flush(buffer, index, bitmap, base) == len(logged - before)
    assert {p for p in range(64 * words) if int(bitmap[p // 64]) >> p % 64 & 1} == before | logged


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_split_keeps_every_translation_and_permission(seed, level):
    rng = np.random.default_rng(seed)
    got = random_sptes(rng, 20, level)
    before, tables = as_ints(got), np.zeros((4, 512), np.uint64)
    huge = [i for i, s in enumerate(before) if is_leaf(s, level)]
    used = kernels.split(got, tables, level, first_pfn=77)
    assert used == min(4, len(huge))
    for r, i in enumerate(huge[:used]):
        parent, small = before[i], 1 << 12 + 9 * (level - 2)
        flags = parent & ~ADDRESS & ~(LARGE if level == 2 else 0)
        assert as_ints(tables[r]) == [flags | (parent & ADDRESS) + j * small for j in range(512)]
        assert int(got[i]) & ADDRESS == (77 + r) << 12
        assert int(got[i]) & (PRESENT | LARGE) == PRESENT
    assert [int(got[i]) for i in range(20) if i not in huge[:used]] == [before[i] for i in range(20) if i not in huge[:used]]


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_collapse_undoes_a_split(seed, level):
    rng = np.random.default_rng(seed)
    got = random_sptes(rng, 20, level)
    got[got & np.uint64(LARGE) == 0] = 0  # no link to a table that is not ours
    before, tables = got.copy(), np.zeros((20, 512), np.uint64)
    used = kernels.split(got, tables, level, first_pfn=77)
    assert kernels.collapse(got, tables, level, first_pfn=77) == used
    assert (got == before).all()


def digest():
    """One digest over the results of all six kernels on random tables."""
    h = hashlib.sha256()
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        sptes, huge = random_sptes(rng, 640), random_sptes(rng, 8, 2)
        bitmap, tables = rng.integers(0, 1 << 64, 10, dtype=np.uint64), np.zeros((8, 512), np.uint64)
        buffer = rng.integers(0, 700 << 12, 512, dtype=np.uint64)
        counts = [
            kernels.write_protect(sptes[:64]),
            kernels.clear_dirty(sptes[:128], platform="npt"),
            kernels.pml_flush(buffer, 100 * seed, bitmap, 5),
            kernels.harvest(sptes, bitmap)[1],
            kernels.split(huge, tables),
            kernels.collapse(huge, tables),
        ]
        for part in (np.array(counts), sptes, bitmap, huge, tables):
            h.update(part.tobytes())
    return h.hexdigest()


@pytest.mark.skipif(_jit.PLAIN, reason="there is only the plain twin in this lane")
def test_compiled_kernels_equal_their_plain_python_twins():
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import test_kernel_twins; print(test_kernel_twins.digest())"
    plain = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() == digest()
