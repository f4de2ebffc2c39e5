"""The layout of one 64-bit SPTE per paging kind and kernel era: constants, predicates on a value, overlap checks.

Sources: Intel SDM vol. 3 ch. 29 (EPT), AMD APM vol. 2 ch. 15.25 (NPT); software bits as Linux 6.12 and 6.1 place them;
`spte.kernel_bits` has those of other versions.
Every constant is `np.uint64`: numba turns a mix of signed and unsigned into a signed or a float.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from spte._numba.jit import helper, kernel
from spte.platform import EPT, Platform

U64 = np.uint64
ZERO, ONE = U64(0), U64(1)
ALL_ONES = ~ZERO
SHIFT_PAGE = U64(12)
INDEX_BITS, INDEX_MASK = U64(9), U64(511)  # of an entry in its table

# Bits with one place in every layout.
W_SHIFT, LARGE_SHIFT, PRESENT_SHIFT, TYPE_SHIFT = U64(1), U64(7), U64(11), U64(52)
WRITABLE = ONE << W_SHIFT
LARGE = ONE << LARGE_SHIFT
MMU_PRESENT = ONE << PRESENT_SHIFT
PFN_MASK = U64(0x000F_FFFF_FFFF_F000)
TYPE_MASK = U64(3) << TYPE_SHIFT
TYPE_DISABLED = ONE << TYPE_SHIFT
TYPE_WRPROT = U64(2) << TYPE_SHIFT
EPT_RWX, EPT_RX = U64(0b111), U64(0b101)
TRACK_SHIFT = U64(54)  # R and X of an access-tracked SPTE rest at bits 54 and 56
SUPPRESS_VE = ONE << U64(63)
FROZEN_LOW = U64(0x5A0)
SOFT_ACCESSED, SOFT_DIRTY = ONE << U64(8), ONE << U64(9)  # EPT without A/D bits, where software keeps them

# Role of a page table, 32 bits: level 3:0, direct 7, access 10:8, invalid 11, efer_nx 12, cr0_wp 13, ad_disabled 16, guest_mode 17,
# smm 31:24: the address space.
ROLE_LEVEL = 0xF
ROLE_IS_DIRECT = 1 << 7
ROLE_EFER_NX = 1 << 12
ROLE_CR0_WP = 1 << 13  # of what `root_mmu` runs on; roots that shadow L1's EPT or NPT have it clear
ROLE_ACCESS_SHIFT = 8
ROLE_ACCESS = 7 << ROLE_ACCESS_SHIFT
ROLE_DIRECT = 0x3780  # of a direct root, without its level
ROLE_PAGING_OFF = 0x1780  # direct, cr0_wp clear: what a guest without paging runs on under shadow paging
ROLE_LONG, ROLE_NPT12, ROLE_EPT12 = 0x3700, 0x1700, 0x0700  # roots that shadow 64-bit guest tables, L1's NPT, L1's EPT
ROLE_INVALID = 1 << 11
ROLE_AD_DISABLED = 1 << 16
ROLE_GUEST_MODE = 1 << 17
ROLE_SMM_SHIFT = 24


ACC_EXEC, ACC_WRITE, ACC_USER, ACC_ALL = 1, 2, 4, 7  # what a guest table, or a page that shadows it, allows


class GuestPaging(NamedTuple):
    """Masks of the guest page-table entries that KVM shadows, all `np.uint64`: 64-bit tables, L1's NPT, or L1's EPT."""

    present: np.uint64  # an entry with none of these bits is absent
    user: np.uint64  # readable
    x: np.uint64
    nx: np.uint64
    accessed: np.uint64  # 0: the tables have no A and D bits
    dirty: np.uint64


GUEST_LONG = GuestPaging(ONE, ONE << U64(2), ZERO, ONE << U64(63), ONE << U64(5), ONE << U64(6))  # NPT has the same format
GUEST_EPT = GuestPaging(EPT_RWX, ONE, ONE << U64(2), ZERO, ONE << U64(8), ONE << U64(9))
GUEST_EPT_NO_AD = GUEST_EPT._replace(accessed=ZERO, dirty=ZERO)


class Layout(NamedTuple):
    """Masks of one paging kind and kernel era, all `np.uint64`; travels into kernels."""

    present: np.uint64  # OR-ed into every present entry, with MMU_PRESENT
    user: np.uint64  # readable (EPT R, NPT U)
    readable: np.uint64  # the bit hardware asks for on a read
    x: np.uint64
    nx: np.uint64
    accessed: np.uint64
    dirty: np.uint64
    dirty_shift: np.uint64
    host_writable: np.uint64
    mmu_writable: np.uint64
    memtype: np.uint64
    type_root: np.uint64  # A/D type of the entries of an L1 root
    link: np.uint64  # a non-leaf entry without its address
    nonpresent: np.uint64
    frozen: np.uint64
    mmio: np.uint64  # value of an MMIO SPTE without gfn and generation
    l1tf: np.uint64  # address bits that an MMIO SPTE inverts and keeps five bits further up
    mmio_mask: np.uint64
    mmio_test: np.uint64


def layout(platform: Platform, era: str) -> Layout:
    """Return the layout of `platform` in the arena: 6.1's, or 6.12's, where bit 63 is set in what is not present.

    `spte.kernel_bits` translates to other versions' bits.
    """
    suppress = SUPPRESS_VE if era in ("6.12", "7.2") else ZERO
    l1tf = U64(0x1F) << U64(platform.l1tf - 5) if platform.l1tf else ZERO
    if platform.paging == EPT:
        present = suppress if platform.exec_only else suppress | ONE
        type_root = ZERO if platform.ad_bits else TYPE_DISABLED
        accessed = ONE << U64(8) if platform.ad_bits else ZERO
        return Layout(
            present=present, user=ONE, readable=ONE, x=ONE << U64(2), nx=ZERO,
            accessed=accessed, dirty=ONE << U64(9) if platform.ad_bits else ZERO, dirty_shift=U64(9),
            host_writable=ONE << U64(57), mmu_writable=ONE << U64(58), memtype=U64(0x70), type_root=type_root,
            link=MMU_PRESENT | present | EPT_RWX | accessed | type_root, nonpresent=suppress, frozen=suppress | FROZEN_LOW,
            mmio=l1tf | U64(6), l1tf=l1tf, mmio_mask=SUPPRESS_VE | EPT_RWX, mmio_test=U64(6),
        )  # fmt: skip
    bit51 = ONE << U64(51)
    accessed = ONE << U64(5)
    return Layout(
        present=ONE, user=ONE << U64(2), readable=ONE, x=ZERO, nx=ONE << U64(63),
        accessed=accessed, dirty=ONE << U64(6), dirty_shift=U64(6),
        host_writable=ONE << U64(9), mmu_writable=ONE << U64(10), memtype=ZERO, type_root=ZERO,
        link=MMU_PRESENT | U64(0b111) | accessed, nonpresent=suppress, frozen=suppress | FROZEN_LOW,
        mmio=bit51 | l1tf | U64(7), l1tf=l1tf, mmio_mask=bit51 | ONE, mmio_test=bit51 | ONE,
    )  # fmt: skip


def _check_overlaps() -> None:
    from spte import platform as _p

    for name in _p.NAMES:
        for era in ("6.1", "6.12"):
            lay = layout(_p.named(name), era)
            single = [lay.user | lay.readable, lay.x, lay.nx & ~lay.present, lay.accessed, lay.dirty, lay.host_writable,
                      lay.mmu_writable, lay.memtype, WRITABLE, LARGE, MMU_PRESENT, TYPE_MASK]  # fmt: skip
            seen = ZERO
            for mask in single:
                assert seen & mask == ZERO, f"{name} {era}: mask {mask:#x} overlaps {seen:#x}"
                seen |= mask
            assert (lay.nonpresent | lay.frozen | lay.mmio) & MMU_PRESENT == ZERO
            assert (lay.frozen | lay.nonpresent) & WRITABLE == ZERO


_check_overlaps()


@kernel
def is_link(spte: Any) -> Any:
    """Tell whether an entry of level > 1 links to a table."""
    return (spte & (MMU_PRESENT | LARGE)) == MMU_PRESENT


@helper
def child_of(spte: Any) -> Any:
    """Return the row that a link names."""
    return np.int64((spte & PFN_MASK) >> SHIFT_PAGE)


@kernel
def is_leaf(spte: Any, level: Any) -> Any:
    """Tell whether an entry of `level` is a present leaf."""
    return (spte & MMU_PRESENT) != ZERO and (level == 1 or (spte & LARGE) != ZERO)
