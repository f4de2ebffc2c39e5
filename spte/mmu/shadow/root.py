"""What Python asks of the shadow MMU's pages: to find or make a root, to bring what hangs below it in step, to link a PAE root."""

from __future__ import annotations

from spte._numba.jit import kernel
from spte.mmu.shadow.page import link_page, unlink_page
from spte.mmu.shadow.sync import get_page, sync_children


@kernel
def alloc_root(t, s, h, v, mode, gfn, level, role):
    """Return the shadow page of `gfn` with `role` as `get_page` does: KVM's mmu_alloc_root."""
    return get_page(t, s, h, v, mode[0], gfn, level, role)


@kernel
def sync_root(t, s, h, v, mode, root):
    """Bring every unsync page below `root` in step, as `sync_children` does: KVM's kvm_mmu_sync_roots."""
    sync_children(t, s, h, v, mode[0], root)


@kernel
def link_root(t, s, mode, row, i, child):
    """Make entry `i` of PAE root `row` point to shadow page `child`."""
    link_page(t, s, mode[0], row, i, child)


@kernel
def unlink_root(t, s, mode, row, i):
    """Make entry `i` of PAE root `row` non-present."""
    unlink_page(t, s, mode[0], row, i)
