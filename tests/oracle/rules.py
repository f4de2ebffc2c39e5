"""What each kernel version decides, as the oracle knows it: from the notes on the series and on later changes, not from `spte`."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rules:
    suppress_ve: bool = True  # bit 63 of EPT entries, present or not
    eager: bool = True  # default of eager_page_split
    fast: bool = True  # the TDP MMU has fast page faults
    prefault: bool = True
    lazy_split: bool = True  # a fault on a huge leaf above the goal splits it; before, it is zapped
    nx_marks_all: bool = True
    nx_any_table: bool = False  # under the NX mitigation every table keeps its gfns small, whatever linked it
    protects_huge_at_enable: bool = False  # initially-set: at enable; else at CLEAR
    heeds_start_level: bool = True
    pml_has_own_protect: bool = False
    flush_if_changed: bool = False  # enable: one flush for each routine that changed
    collapse: str = "table"  # zap leaves (one flush), zap the links to tables (a flush each), or recover (one flush)
    by_page: bool = False  # the collapse looks at the struct page alone
    clamped: bool = True  # the host's level counts only up to what slot and CPU allow
    disable_sets_dirty: bool = False
    pml_always: bool = False
    remake_sets_dirty: bool = False
    software_ad: bool = False
    aging_flushes: bool = True


V6_12 = Rules()
V6_13 = replace(
    V6_12, collapse="recover", remake_sets_dirty=True, software_ad=True, aging_flushes=False
)  # fmt: skip
V6_1 = replace(V6_12, suppress_ve=False, prefault=False, lazy_split=False, nx_marks_all=False, nx_any_table=True)
SERIES = replace(
    V6_1, eager=False, fast=False, protects_huge_at_enable=True, flush_if_changed=True, collapse="leaf", clamped=False,
)  # fmt: skip
V5_12 = replace(SERIES, heeds_start_level=False)
V5_11 = replace(V5_12, pml_has_own_protect=True, by_page=True, disable_sets_dirty=True, pml_always=True)
RULES = {"5.11": V5_11, "series": SERIES, "5.12": V5_12, "6.1": V6_1, "6.12": V6_12, "6.13": V6_13}
