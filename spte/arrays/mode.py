"""What kernels need to know of platform, policy, manual protect, and of the root that a vCPU runs on."""

from __future__ import annotations

import numpy as np

from spte.arrays.context import Mode
from spte.bits import GUEST_LONG, SOFT_ACCESSED, SOFT_DIRTY, ZERO, layout
from spte.platform import SHADOW, Platform
from spte.policy import COLLAPSE_PAGES, Policy


def mode_of(platform: Platform, policy: Policy, manual: int) -> Mode:
    """Return the mode of a VM whose vCPUs run L1."""
    i = np.int64
    lay = layout(platform, policy.spte_layout)
    nx_marks = 2 if policy.nx_marks == "linked" else 0 if platform.paging == SHADOW else 1
    if policy.software_ad and not platform.ad_bits:
        lay = lay._replace(accessed=SOFT_ACCESSED, dirty=SOFT_DIRTY)
    return Mode(
        lay=lay, max_level=i(platform.max_level), ad=i(platform.ad_bits),
        dirty_log_size=i(platform.cpu_dirty_log_size), eager=i(policy.eager_page_split and platform.tdp_mmu), nx=i(policy.nx_huge_pages),
        split_in_place=i(policy.fault_split == "in-place"), fast_fault=i(policy.fast_page_fault),
        oldest_first=i(policy.pml_order == "oldest-first"), dirty_on_remake=i(policy.dirty_on_remake != "never"),
        fast_huge_fault=i(policy.fast_huge_fault), prefetch_tail=i(policy.prefetch_tail), freed_table_flush=i(policy.freed_table_flush),
        l2_types=i(platform.pml or policy.l2_type_without_pml), sync_remakes=i(policy.sync_remakes),
        sync_accessed=i(policy.sync_keeps_accessed), dirty_on_sync=i(policy.dirty_on_remake == "always"),
        aging_clears=lay.dirty if policy.aging_clears_dirty else ZERO, prefault_leaves=i(policy.prefault_present == "leaves"),
        flush_each=i(policy.collapse_flush == "each"), recover=i(policy.collapse == "recover"),
        clear_arms_huge=i(manual == 3 and policy.initially_set_enable == "nothing"), shadow=i(not platform.tdp_mmu),
        nx_marks=i(nx_marks), nx_any_table=i(policy.nx_any_table),
        collapse_pages=i(COLLAPSE_PAGES.index(policy.collapse_pages)), collapse_precise=i(policy.collapse_precise),
        level_clamped=i(policy.mapping_level_clamped), hw_ad=i(platform.ad_bits), disabled_ad=i(policy.software_ad),
        tdp=i(platform.paging != SHADOW), l2_root_wp=i(policy.l2_root_write_protect), gpte=GUEST_LONG,
    )  # fmt: skip
