"""Policies: what a kernel version does, one field a decision, as one immutable value.

Nothing else in the package asks for a version. A decision carries the versions at which its value changed, each with its source;
`Policy.named` takes each decision as of a version.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from spte._arguments import instance
from spte._arguments import spell as shown
from spte.errors import PlatformError
from spte.policy.versions import VERSIONS, Change, as_of, mainline, unknown

FIRST = VERSIONS[0]
COLLAPSE_PAGES = ("thp", "thp-or-device", "compound-or-device")


def _decision(doc: str, first: Any, source: str, *later: tuple[str, Any, str], choices: tuple[Any, ...] = ()) -> Any:
    """Declare a decision: its value in 5.10 and where that is from, then ``(version, value, source)`` of each change.

    `choices` are all values, by default those it had and both of a flag.
    """
    changes = (Change(FIRST, first, source), *(Change(*change) for change in later))
    values = (False, True) if isinstance(first, bool) else tuple(dict.fromkeys(change.value for change in changes))
    return field(metadata={"doc": doc, "changes": changes, "choices": choices or values})


RECORDED_5_10 = "recordings 5.10"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one kernel version decides, a field a decision; `decisions` and ``spte policies`` say what each means and where it is from.

    Replace single fields with `dataclasses.replace` or `parse`. `name` is the version's name and no decision.
    """

    name: str
    spte_layout: str = _decision(
        "where software bits lie in an SPTE, and what one that is not present holds", "5.10", RECORDED_5_10,
        ("5.13", "6.1", "MMU_PRESENT; recordings 6.1"), ("6.10", "6.12", "non-present is bit 63; recordings 6.12"),
        ("7.2", "7.2", "recordings 7.2; 6.18 has 6.12's"),
    )  # fmt: skip
    role_layout: str = _decision(
        "which bits a page's role has, and where", "5.10", RECORDED_5_10,
        ("5.19", "6.1", "has_4_byte_gpte, root roles apart from the CPU's; recordings 6.1"),
        ("7.2", "7.2", "7e76b4f7fa0a (a fourth access bit); recordings 7.2; 6.18 has 6.1's"),
    )  # fmt: skip
    user_mem_slots: int = _decision(
        "memslots of an address space", 509, "recordings 5.10/g2_create_errors", ("5.12", 32764, "4fc096a99e01; recordings 6.1"),
    )  # fmt: skip
    max_vcpus: int = _decision(
        "vCPUs of a VM: KVM_MAX_VCPUS", 288, "682f732ecf73", ("5.15", 1024, "074c82c8f7cf")
    )
    max_vcpu_ids: int = _decision(
        "ids of vCPUs, what KVM_CAP_MAX_VCPU_ID says", 1023, "af1bae5497b9", ("5.15", 4096, "4ddacd525a2f")
    )
    write_without_vcpu: str = _decision(
        "a write by KVM itself while no vCPU runs is marked in the bitmap, dropped with a warning, or marked with one", "marked",
        "before 2efd61a608b0", ("5.17", "dropped", "2efd61a608b0"), ("6.2", "warned", "86bdf3ebcfe1"),
    )  # fmt: skip
    roots_kept: bool = _decision("the TDP MMU keeps roots that no vCPU holds", False, "02c00b3a2f7e", ("6.4", True, "edbdb43fc96b"))
    dirty_ring: bool = _decision(
        "vCPUs may log to dirty rings", False, "recordings 5.10/f1_ring_basic", ("5.11", True, "fb04a1eddb1a; recordings 6.1")
    )
    dirty_ring_acq_rel: bool = _decision(
        "and they may ask for acquire and release order: KVM_CAP_DIRTY_LOG_RING_ACQ_REL", False, "recordings 5.10/f5_ring_errors",
        ("6.1", True, "17601bfed909; recordings 6.1/f5_ring_errors"),
    )  # fmt: skip
    prefault: bool = _decision(
        "KVM_PRE_FAULT_MEMORY exists", False, "recordings 5.10/k1_prefault", ("6.11", True, "recordings 6.12/k1_prefault")
    )
    prefault_present: str = _decision(
        "prefault of a page that has an SPTE makes it anew, or leaves it alone", "remakes", "recordings 6.12/k1_prefault",
        ("6.13", "leaves", "6385d01eec16; recordings 6.18/k1_prefault"),
    )  # fmt: skip
    binary_stats: bool = _decision(
        "statistics are read through file descriptors", False, "recordings 5.10", ("5.14", True, "ce55c049459c; recordings 6.1")
    )
    eager_page_split: bool = _decision(
        "split huge leaves when logging starts, or at CLEAR with initially-set", False, "recordings 5.10/b1_thp_eager",
        ("5.18", True, "a3fe5dbda0a4; recordings 6.1"),
    )  # fmt: skip
    slot_gpa_limit: bool = _decision(
        "memslots end below the guest-physical width", False, "recordings 5.10/g2_set_region_errors",
        ("5.18", True, "86931ff7207b; recordings 6.1/g2_set_region_errors"),
    )  # fmt: skip
    mprotect_restores: bool = _decision(
        "mprotect to writable makes own pages writable at once; else their next write copies them",
        False, "recordings 5.10/h3_notifier", ("5.19", True, "64fe24a3e05e; recordings 6.1/h3_notifier"),
    )  # fmt: skip
    nx_huge_pages: bool = _decision("no huge leaf is executable; an exec fault splits it", False, "b8e8c8303ff2, 5.4")
    nx_marks: str = _decision(
        "tables an exec fault links that count as held down: all, or with EPT and NPT those in a huge page's place",
        "possible", "recordings 6.1/b8_nx_huge_pages", ("6.2", "linked", "55c510e26ab6; recordings 6.12/b8_nx_huge_pages"),
    )  # fmt: skip
    nx_any_table: bool = _decision(
        "with nx_huge_pages any table keeps a fault small, marked or not", True, "recordings 6.1/amd-legacy/b8_nx_huge_pages",
        ("6.2", False, "b5b0977f4acb; recordings 6.12/b8_nx_huge_pages"),
    )  # fmt: skip
    fault_split: str = _decision(
        "a write fault on a huge leaf of a logging slot drops it or splits it", "zap", "recordings 5.10/b1_thp_eager",
        ("6.3", "in-place", "c4b33d28ea7b; recordings 6.12"),
    )  # fmt: skip
    fast_page_fault: bool = _decision(
        "write-protected leaves of the TDP MMU are mended without mmu_lock", False, "recordings 5.10/b1_thp_eager",
        ("5.15", True, "6e8eb2060cc7; recordings 6.1"),
    )  # fmt: skip
    fast_huge_fault: bool = _decision(
        "so are huge ones, of a slot that does not log", False, "recordings 5.10/amd-legacy/b4_thp_two_vcpus",
        ("5.17", True, "\"Use fast PF path for access tracking of huge pages\", version from memory; recordings 6.1"),
    )  # fmt: skip
    prefetch_tail: bool = _decision(
        "prefetch fills the run of empty entries that ends its group of 8, too", False, "recordings 5.10/amd-legacy/d3_small_slots",
        ("5.15", True, "c6cecc4b9324; recordings 6.1"),
    )  # fmt: skip
    initially_set_enable: str = _decision(
        "SPTEs that enabling with initially-set write-protects", "huge", "recordings 5.10/c3_manual3_thp_eagerY",
        ("5.14", "nothing", "3ad93562093d, 8921291980db; recordings 6.1"),
    )  # fmt: skip
    tdp_start_level: bool = _decision(
        "the TDP MMU heeds the start level of a write-protect", False, "recordings 5.10/c2_manual_initially_set",
        ("5.13", True, "patch 2; dbb6964e4c38"),
    )  # fmt: skip
    one_write_protect: bool = _decision(
        "PML hardware uses the generic write-protect", False, "before patch 13", ("5.12", True, "patch 13; a1419f8b5bab")
    )
    tdp_rewrites: bool = _decision(
        "the TDP MMU's slot-wide walks write entries again that need no change", True, "recordings 5.10/y_bitmap_9024",
        ("5.12", False, "\"Skip no-op changes in TDP MMU functions\""),
    )  # fmt: skip
    enable_flush: str = _decision(
        "enabling flushes once in any case, or after each routine that wrote", "each-routine", "recordings 5.10/04-thp",
        ("6.0", "always", "b64d740ea7dd; recordings 6.1"),
    )  # fmt: skip
    collapse: str = _decision(
        "disabling drops leaves that may be larger, links to their tables, or recovers the huge leaf in place",
        "zap-leaf", "recordings 5.10/b1_thp_eager", ("5.19", "zap-table", "5ba7c4c6d1c7; recordings 6.1"),
        ("6.13", "recover", "13e2e4f62a4b; recordings 6.18, 7.2"),
    )  # fmt: skip
    collapse_precise: bool = _decision(
        "collapse asks for the level at which a gfn may be mapped", False, "recordings 5.10/d1_hva_misaligned",
        ("5.12", True, "patch 5; 9eba50f8d7fc"),
    )  # fmt: skip
    collapse_pages: str = _decision(
        "pages that an imprecise collapse takes", "compound-or-device",
        "recordings 5.10/b5_hugetlb2m: 5.10.223 has patch 1 as a stable backport", ("5.11", "thp", "before patch 1"),
        ("5.12", "compound-or-device", "patch 1; c060c72ffeb4"), choices=COLLAPSE_PAGES,
    )  # fmt: skip
    mapping_level_clamped: bool = _decision(
        "the host's level counts up to what slot and CPU allow", False, "patch 3: raw", ("6.0", True, "6.0")
    )
    collapse_flush: str = _decision(
        "flushes of a collapse: once, or each entry", "once", "recordings 5.10/b1_thp_eager",
        ("5.13", "each", "collapse under the read lock; recordings 6.1"), ("6.13", "once", "35ef80eb29ab; recordings 7.2/b1_thp_eager"),
    )  # fmt: skip
    disable_sets_dirty: bool = _decision(
        "disabling on PML hardware sets D everywhere in the slot", True, "recordings 5.10/00-smoke",
        ("5.12", False, "patch 12; b6e16ae5d99f"),
    )  # fmt: skip
    pml_control: str = _decision(
        "vCPUs run with PML always, or while a slot logs", "always", "recordings 5.10: PML on in all",
        ("5.12", "logging-slots", "patch 11; a85863c2ec55; recordings 6.12"),
    )  # fmt: skip
    pml_in_l2: bool = _decision(
        "PML stays on while L2 runs, and logs L2's addresses", True, "recordings 5.10-nested/n60-pml-in-l2",
        ("5.12", False, "patch 6; c3bb9a20834f; recordings 6.12-nested/n60-pml-in-l2"),
    )  # fmt: skip
    l2_root_write_protect: bool = _decision(
        "leaves of the root that L2 shares with L1's memory are write-protected on PML hardware", False,
        "recordings 5.10-nested/n06-700-writes-noept", ("6.9", True, "2673dfb591a3; recordings 6.12-nested"),
    )  # fmt: skip
    l2_type_without_pml: bool = _decision(
        "leaves that shadow L1's EPT are tagged as write-protected without PML hardware, too", True,
        "recordings 5.10-nested/n05-700-writes-ept", ("5.13", False, "version from memory; recordings 6.12-nested"),
    )  # fmt: skip
    sync_remakes: bool = _decision(
        "bringing shadow pages in step makes every leaf anew, not those alone that changed", True, "recordings 5.10-nested/n60-pml-in-l2",
        ("6.4", False, "e6722d9211b2; recordings 6.12-nested/n60-pml-in-l2"),
    )  # fmt: skip
    sync_keeps_accessed: bool = _decision(
        "a leaf made anew by that has A", False, "recordings 5.10-nested/n60-pml-in-l2", ("6.13", True, "4e44ab0a7786")
    )
    sync_kicks_without_pml: bool = _decision(
        "GET and CLEAR kick every vCPU on hardware without PML too", False, "before patch 9", ("5.12", True, "patch 9; a018eba53870"),
        ("6.1", False, "6.12 does not; version not known"),
    )  # fmt: skip
    pml_order: str = _decision(
        "order in which a PML drain marks", "newest-first", "recordings 5.10/00-smoke",
        ("6.14", "oldest-first", "37c3ddfe5238; recordings 7.2/19-ring"),
    )  # fmt: skip
    dirty_on_remake: str = _decision(
        "a writable leaf made over an entry with bit 1 set gets D: in a fault, never, or always", "in-faults",
        "recordings 5.10/b1_thp_eager", ("5.16", "never", "8b8f9d753b84; recordings 6.1"),
        ("6.13", "always", "cc7ed3358e41; recordings 6.18, 7.2"),
    )  # fmt: skip
    software_ad: bool = _decision(
        "A and D bits are kept by software where the CPU has none", False, "recordings 5.10/intel-noad",
        ("6.13", True, "53510b912518, 7971801b5618; recordings 7.2/intel-noad"),
    )  # fmt: skip
    aging_flush: bool = _decision(
        "a notifier that finds a leaf accessed flushes", True, "recordings 5.10/h4_cold_free", ("6.13", False, "b9883ee40d7e")
    )
    aging_clears_dirty: bool = _decision(
        "aging in the TDP MMU takes D with A", True, "recordings 5.10/h4_cold_free",
        ("5.13", False, "\"Remove spurious clearing of dirty bit from TDP MMU SPTE\"; recordings 6.1/h4_cold_free"),
    )  # fmt: skip
    pageout: str = _decision(
        "MADV_PAGEOUT without swap ages SPTEs or not", "age", "recordings 5.10/h4_cold_free",
        ("6.12", "nothing", "recordings 6.12/h4_cold_free; version not known"),
    )  # fmt: skip
    locked_readonly_retry: bool = _decision(
        "a locked instruction on a READONLY page faults twice before it is emulated", True, "recordings 5.10/g4_readonly",
        ("6.12", False, "recordings 6.12/g4_readonly; version not known"),
    )  # fmt: skip
    zap_all: str = _decision(
        "zapping everything empties the TDP MMU's roots, or lets vCPUs make new ones", "in-place", "recordings 5.10/g3_move_delete",
        ("5.13", "new-roots", "b7cccd397f31; recordings 6.1"),
    )  # fmt: skip
    unmap: str = _decision(
        "a notifier range drops tables that it covers, or leaves alone", "tables", "recordings 5.10/h3_notifier",
        ("5.18", "leaves", "f47e5bbbc92f; recordings 6.1/h3_notifier"),
    )  # fmt: skip
    freed_table_flush: bool = _decision(
        "each table of the TDP MMU that is freed flushes", True, "recordings 5.10/b7_hugetlb1g_noeager", ("5.18", False, "bb95dfb9e2df")
    )
    warn_on_destroy: bool = _decision("closing a VM while a slot logs warns", False, "the series' cover letter, not merged")

    def __post_init__(self) -> None:
        instance(self.name, "name", str, "a name")
        for f in decisions():
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if instance(value, f.name, type(choices[0]), f"one of {spell_all(choices)}") not in choices:
                raise PlatformError(f"policy field {f.name}={shown(value)}; take one of {spell_all(choices)}")

    @staticmethod
    def named(name: str) -> Policy:
        """Return the policy of a version.

        Parameters
        ----------
        name : str
            A mainline version, ``6.8``, or a stable release of it, ``6.8.12``; ``series``: the 14 patches on 5.11, as posted.

        Returns
        -------
        Policy
            Each decision as of that version.

        Raises
        ------
        PlatformError
            EINVAL: not known; names the nearest version.
        """
        if instance(name, "policy", str, "a name") == SERIES:
            return dataclasses.replace(_of(SERIES_BASE), name=SERIES, **_SERIES_DECIDES)
        version = mainline(name)
        if version is None:
            raise unknown("policy", name, SERIES)
        return _of(version)

    def describe(self) -> list[tuple[str, str, str, str]]:
        """Return one ``(field, value, meaning, source)`` row a decision; the source has every change of its value."""
        return [(f.name, spell(getattr(self, f.name)), f.metadata["doc"], sources(f.name)) for f in decisions()]


@cache
def decisions() -> list[dataclasses.Field[Any]]:
    """Return the fields of `Policy` that are decisions, in order."""
    return [f for f in dataclasses.fields(Policy) if f.metadata]


def changes(decision: str) -> tuple[Change, ...]:
    """Return the values that `decision` had, oldest first, each from its version on; PlatformError (EINVAL) if there is none."""
    known = {f.name: f for f in decisions()}
    if instance(decision, "decision", str, "a name") not in known:
        raise PlatformError(f"decision {shown(decision)} is not known; take one of {', '.join(known)}")
    found: tuple[Change, ...] = known[decision].metadata["changes"]
    return found


def sources(decision: str) -> str:
    """Return where the values of `decision` are from: ``version: value (source)`` of each change."""
    return "; ".join(f"{change.version}: {spell(change.value)} ({change.source})" for change in changes(decision))


@cache
def _of(version: str) -> Policy:
    return Policy(name=version, **{f.name: as_of(f.metadata["changes"], version).value for f in decisions()})


SERIES, SERIES_BASE = "series", "5.11"
"""The 14 patches as posted, and the version that they were posted on."""
_SERIES_DECIDES: dict[str, Any] = {
    "collapse_pages": "compound-or-device", "tdp_start_level": True, "collapse_precise": True, "pml_in_l2": False,
    "sync_kicks_without_pml": True, "pml_control": "logging-slots", "disable_sets_dirty": False, "one_write_protect": True,
}  # fmt: skip
NAMES = (
    "5.10", SERIES_BASE, SERIES,
    *(v for v in VERSIONS[2:] if v in {change.version for f in decisions() for change in f.metadata["changes"]}),
)  # fmt: skip
"""Names of policies that differ: every other version decides what the one before it does."""


def spell(value: Any) -> str:
    """Return `value` as the command line spells it: Y and N for booleans."""
    if isinstance(value, bool):
        return "Y" if value else "N"
    return value if isinstance(value, str) else shown(value)


def spell_all(choices: tuple[Any, ...]) -> str:
    """Return the values of a decision as messages list them."""
    return ", ".join(spell(c) for c in choices)
