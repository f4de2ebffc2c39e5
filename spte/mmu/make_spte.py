"""The value of a leaf: make it, age it, park its permissions, ask what it allows. KVM's spte.c."""

from __future__ import annotations

from spte import bits as bt
from spte._numba.jit import helper


@helper
def _write_protects_l2(m, role):
    """Tell whether the leaves of `role` are left to write protection, as L2 runs on them and PML logs L1's gfns alone."""
    return m.l2_types and role & bt.ROLE_GUEST_MODE and (m.l2_root_wp or not role & bt.ROLE_CR0_WP)


@helper
def type_of(m, role):
    """Return the A/D type of the entries of a page with `role`."""
    if m.lay.type_root != bt.ZERO or role & bt.ROLE_AD_DISABLED:
        return bt.TYPE_DISABLED
    return bt.TYPE_WRPROT if _write_protects_l2(m, role) else bt.ZERO


@helper
def make_leaf(m, level, pfn, old, prefetch, host_writable, role, access, write):
    """Build a leaf that allows what `access` and `write` say; D as the old value gives it. Marking dirty is the caller's."""
    lay = m.lay
    kind = type_of(m, role)
    spte = bt.MMU_PRESENT | lay.present | kind | lay.memtype | (pfn << bt.SHIFT_PAGE)
    has_ad = kind != bt.TYPE_DISABLED or m.disabled_ad
    if not prefetch and has_ad:
        spte |= lay.accessed
    spte |= lay.x if access & bt.ACC_EXEC else lay.nx
    if access & bt.ACC_USER:
        spte |= lay.user
    if level > 1:
        spte |= bt.LARGE
    if host_writable:
        spte |= lay.host_writable
    if write:
        spte |= lay.mmu_writable | bt.WRITABLE
        # Bit 1 of the raw old value, whatever that value is: up to 6.12 the builder then leaves D out.
        if has_ad and (m.dirty_on_remake or (old & bt.WRITABLE) == bt.ZERO):
            spte |= lay.dirty
    if prefetch and kind == bt.TYPE_DISABLED:
        spte = track_access(spte, lay)
    return spte


@helper
def is_access_tracked(spte):
    """Tell whether R and X of an entry without A/D bits are parked."""
    return (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED and (spte & bt.EPT_RWX) == bt.ZERO


@helper
def track_access(spte, lay):
    """Return an entry without hardware A/D bits with R and X parked, so that its next use faults; W is lost."""
    return (spte | ((spte & bt.EPT_RX) << bt.TRACK_SHIFT)) & ~(bt.EPT_RWX | lay.accessed)


@helper
def is_accessed(m, spte):
    """Tell whether a leaf was used; where no A bit is kept, what is not parked counts as used."""
    if (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED and not m.disabled_ad:
        return not is_access_tracked(spte)
    return (spte & m.lay.accessed) != bt.ZERO


@helper
def make_old(m, spte):
    """Return a leaf whose next use is visible: A clear, or R and X parked where hardware sets no A."""
    return track_access(spte, m.lay) if (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED else spte & ~m.lay.accessed


@helper
def restore_access_tracked(spte, lay):
    """Return `spte` with the parked R and X back in place; W waits for a write fault."""
    saved = (spte >> bt.TRACK_SHIFT) & bt.EPT_RX
    return (spte & ~bt.EPT_RWX & ~(bt.EPT_RX << bt.TRACK_SHIFT)) | saved | lay.accessed


@helper
def set_executable(spte, lay, on):
    """Return a leaf made executable or not, in its parked bits if it is access-tracked."""
    x = lay.x << bt.TRACK_SHIFT if is_access_tracked(spte) else lay.x
    return (spte | x) & ~lay.nx if on else (spte & ~x) | lay.nx
