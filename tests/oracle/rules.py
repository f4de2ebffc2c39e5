"""What each kernel version decides, as the oracle knows it: from notes, commits and recordings, not from `spte`."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rules:
    layout: str = "6.12"  # the version whose bits an entry has
    rings: bool = True
    eager: bool = True  # default of eager_page_split
    fast: bool = True  # the TDP MMU has fast page faults
    fast_huge: bool = True  # they mend huge leaves too
    prefault: bool = True
    prefault_remakes: bool = True  # it makes a present leaf anew
    lazy_split: bool = True  # a fault on a huge leaf above the goal splits it; before, it is zapped
    prefetch_tail: bool = True  # prefetch fills the run that ends the group of 8
    nx_marks_all: bool = True
    nx_any_table: bool = False  # under the NX mitigation every table keeps its gfns small, whatever linked it
    protects_huge_at_enable: bool = False  # initially-set: at enable; else at CLEAR
    heeds_start_level: bool = True
    pml_has_own_protect: bool = False
    flush_if_changed: bool = False  # enable: one flush for each routine that changed
    rewrites: bool = False  # the TDP MMU writes again what needs no change, which counts as changed
    collapse: str = "table"  # zap leaves (one flush), zap the links to tables (a flush each), or recover (one flush)
    by_page: str = ""  # the collapse looks at the struct page alone: "thp", one that is mapped huge, or "compound", part of one
    clamped: bool = True  # the host's level counts only up to what slot and CPU allow
    disable_sets_dirty: bool = False
    pml_always: bool = False
    oldest_first: bool = False  # order in which a PML buffer is drained
    remake_sets_dirty: bool = False
    software_ad: bool = False
    aging_flushes: bool = True
    ages_dirty: bool = False  # aging takes D with A, in the TDP MMU
    unmaps_tables: bool = False  # a notifier drops tables that it covers, in the TDP MMU
    table_flush: bool = False  # each table that the TDP MMU frees flushes


V6_12 = Rules()
V6_13 = replace(
    V6_12, collapse="recover", remake_sets_dirty=True, software_ad=True, aging_flushes=False, prefault_remakes=False,
)  # fmt: skip
V7_2 = replace(V6_13, layout="7.2", oldest_first=True)
V6_1 = replace(V6_12, layout="6.1", prefault=False, lazy_split=False, nx_marks_all=False, nx_any_table=True)
V5_12 = replace(
    V6_1, layout="5.10", eager=False, fast=False, fast_huge=False, prefetch_tail=False, protects_huge_at_enable=True, flush_if_changed=True,
    collapse="leaf", clamped=False, heeds_start_level=False, remake_sets_dirty=True, ages_dirty=True, unmaps_tables=True, table_flush=True,
)  # fmt: skip
SERIES = replace(V5_12, heeds_start_level=True, rewrites=True)
V5_11 = replace(SERIES, heeds_start_level=False, pml_has_own_protect=True, by_page="thp", disable_sets_dirty=True, pml_always=True)
V5_10 = replace(V5_11, by_page="compound", rings=False)  # a stable kernel, with patch 1
RULES = {
    "5.10": V5_10, "5.11": V5_11, "series": SERIES, "5.12": V5_12, "6.1": V6_1, "6.12": V6_12, "6.13": V6_13, "7.2": V7_2,
}  # fmt: skip
