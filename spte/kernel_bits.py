"""SPTEs and roles as a kernel version has them: translated from the one layout that the arena holds, and back.

The arena holds every entry as 6.1 lays it out (from 6.10 on: with bit 63 in what is not present, as 6.12), whatever the policy. Kernels
so have constants where they would have to load a mask. What is shown - leaves, tables, other entries, tracepoints, recordings - is
translated. Sources: recordings 5.10, 6.1, 6.12, 6.18, 7.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.bits import (
    FROZEN_LOW,
    MMU_PRESENT,
    ROLE_AD_DISABLED,
    ROLE_CR0_WP,
    ROLE_EFER_NX,
    ROLE_GUEST_MODE,
    ROLE_INVALID,
    ROLE_IS_DIRECT,
    layout,
)
from spte.platform import EPT, Platform
from spte.policy import Policy

U64s = npt.NDArray[np.uint64]

_PRESENT, _MMIO_TYPE, _TYPE = int(MMU_PRESENT), 3 << 52, 3 << 52
_LOW_7_2, _FROZEN_LOW = 0x1A0, int(FROZEN_LOW)
# MMIO generation: the arena keeps bits 7:0 at 10:3 and 18:8 at 62:52; 5.10 keeps 8:0 at 11:3 and 17:9 at 62:54.
_GEN_LOW, _GEN_HIGH, _GEN_HIGH_SHIFT = 0xFF << 3, 0x7FF << 52, 52
_GEN_LOW_5_10, _GEN_HIGH_5_10, _GEN_HIGH_SHIFT_5_10 = 0x1FF << 3, 0x1FF << 54, 54
# Moves of bits in a present entry: (mask in the arena, places up; negative: down).
_EPT_5_10 = ((3 << 57, -47),)  # HOST_WRITABLE 10, MMU_WRITABLE 11
_NPT_5_10 = ((3 << 9, 1),)
_EPT_7_2 = ((1 << 57, -4), (1 << 58, -3), (_TYPE, 8), (5 << 54, -2))  # 53, 55, type 61:60, parked R and X at 52 and 54
_X, _XU, _PARKED_X, _PARKED_XU = 1 << 2, 1 << 10, 1 << 54, 1 << 62  # of 7.2: a leaf is executable for supervisor and user, or for neither
_ROLE_BITS_11_TO_13 = ROLE_INVALID | ROLE_EFER_NX | ROLE_CR0_WP
_ROLE_8_BYTES, _ROLE_NOT_WP, _ROLE_ACCESS_READ, _ROLE_SMEP = 1 << 4, 1 << 15, 1 << 11, 1 << 20
_ROLE_SAME_7_2 = 0x7FF | ROLE_AD_DISABLED | ROLE_GUEST_MODE | 0xFF << 24


class KernelBits(NamedTuple):
    """How one kernel version on one platform has its SPTEs and roles; see `kernel_bits`."""

    sptes: str
    roles: str
    ept: bool
    nonpresent: int

    def spte(self, value: int) -> int:
        """Return an entry of the arena, or its bits apart from the frame, as the kernel has it."""
        if self.sptes == "5.10":
            return self._to_5_10(value)
        if self.sptes == "7.2":
            return self._to_7_2(value)
        return value

    def arena(self, value: int) -> int:
        """Return an entry of the kernel as the arena has it: the inverse of `spte`."""
        if self.sptes == "5.10":
            return self._from_5_10(value)
        if self.sptes == "7.2":
            return self._from_7_2(value)
        return value

    def to_kernel(self, sptes: U64s) -> U64s:
        """Return entries of the arena as the kernel has them: a new uint64 array of the same shape."""
        return _each(self.spte, sptes)

    def to_arena(self, sptes: U64s) -> U64s:
        """Return entries of the kernel as the arena has them: a new uint64 array of the same shape."""
        return _each(self.arena, sptes)

    def _to_5_10(self, value: int) -> int:
        if value & _PRESENT:
            return _move(value & ~_PRESENT, _EPT_5_10 if self.ept else _NPT_5_10)
        if value in (self.nonpresent, self.nonpresent | _FROZEN_LOW):
            return value
        generation = (value & _GEN_LOW) >> 3 | ((value & _GEN_HIGH) >> _GEN_HIGH_SHIFT) << 8
        place = (generation << 3) & _GEN_LOW_5_10 | ((generation >> 9) << _GEN_HIGH_SHIFT_5_10) & _GEN_HIGH_5_10
        return value & ~(_GEN_LOW | _GEN_HIGH) | place | _MMIO_TYPE

    def _from_5_10(self, value: int) -> int:
        if value in (0, _FROZEN_LOW):
            return value
        if value & _MMIO_TYPE != _MMIO_TYPE:
            return _move(value, _back(_EPT_5_10 if self.ept else _NPT_5_10)) | _PRESENT
        generation = (value & _GEN_LOW_5_10) >> 3 | ((value & _GEN_HIGH_5_10) >> _GEN_HIGH_SHIFT_5_10) << 9
        place = (generation << 3) & _GEN_LOW | (generation >> 8) << _GEN_HIGH_SHIFT
        return value & ~(_GEN_LOW_5_10 | _GEN_HIGH_5_10 | _MMIO_TYPE) | place

    def _to_7_2(self, value: int) -> int:
        if value == self.nonpresent | _FROZEN_LOW:
            return self.nonpresent | _LOW_7_2
        if not value & _PRESENT or not self.ept:
            return value
        users = (_XU if value & _X else 0) | (_PARKED_XU if value & _PARKED_X else 0)
        return _move(value, _EPT_7_2) | users

    def _from_7_2(self, value: int) -> int:
        if value == self.nonpresent | _LOW_7_2:
            return self.nonpresent | _FROZEN_LOW
        if not value & _PRESENT or not self.ept:
            return value
        return _move(value & ~(_XU | _PARKED_XU), _back(_EPT_7_2))

    def role(self, role: int, *, tdp: bool = False, pae: bool = False, nx: bool = True) -> int:
        """Return a role of the arena as the kernel has it.

        Parameters
        ----------
        role : int
            32 bits.
        tdp : bool
            It is that of a page of the TDP MMU below the root: 5.10 gives it the level of the entry that links to it.
        pae : bool
            It is that of a PAE root.
        nx : bool
            The guest has EFER.NX set, which 5.10 takes over.

        Returns
        -------
        int
            32 bits.
        """
        if self.roles == "5.10":
            if role & ROLE_GUEST_MODE and not role & (ROLE_EFER_NX | ROLE_CR0_WP):  # a shadow of L1's EPT
                return role | _ROLE_8_BYTES | ROLE_CR0_WP | _ROLE_NOT_WP
            role = role & ~ROLE_EFER_NX | ROLE_CR0_WP | (ROLE_EFER_NX if nx else 0)
            return role + tdp if pae else role + tdp | _ROLE_8_BYTES
        if self.roles == "7.2":
            smep = self.ept and role & ROLE_IS_DIRECT and role & ROLE_CR0_WP
            moved = (role & _ROLE_BITS_11_TO_13) << 1
            return role & _ROLE_SAME_7_2 | _ROLE_ACCESS_READ | moved | (_ROLE_SMEP if smep else 0)
        return role

    @property
    def mmio_generations(self) -> int:
        """Generations of memslots that an MMIO SPTE tells apart."""
        return 1 << (18 if self.sptes == "5.10" else 19)

    @property
    def role_invalid(self) -> int:
        """The bit of a role that is set in a root that was zapped."""
        return ROLE_INVALID << 1 if self.roles == "7.2" else ROLE_INVALID


def _move(value: int, moves: tuple[tuple[int, int], ...]) -> int:
    """Return `value` with the bits of each mask moved."""
    moved = 0
    for mask, places in moves:
        moved |= (value & mask) << places if places >= 0 else (value & mask) >> -places
        value &= ~mask
    return value | moved


def _back(moves: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((mask << places if places >= 0 else mask >> -places, -places) for mask, places in moves)


def _each(translate: Callable[[int], int], sptes: U64s) -> U64s:
    values, where = np.unique(np.asarray(sptes, np.uint64), return_inverse=True)
    translated = np.array([translate(value) for value in values.tolist()], np.uint64)
    return translated[where].reshape(np.shape(sptes))


@lru_cache
def kernel_bits(platform: Platform, policy: Policy) -> KernelBits:
    """Return how the kernel of `policy` on `platform` has its SPTEs and roles."""
    nonpresent = int(layout(platform, policy.spte_layout).nonpresent)
    return KernelBits(policy.spte_layout, policy.role_layout, platform.paging == EPT, nonpresent)
