"""Policies: what a kernel version does, one field a decision, as one immutable value.

Nothing else in the package asks for a version. The presets say what each version decides; `SOURCES` says where each
decision comes from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from spte.errors import PlatformError


def _decision(default: Any, doc: str, source: str, choices: tuple[Any, ...] = (False, True)) -> Any:
    return field(default=default, metadata={"doc": doc, "source": source, "choices": choices})


COLLAPSE_PAGES = ("thp", "thp-or-device", "compound-or-device")


@dataclass(frozen=True, slots=True)
class Policy:
    """What one kernel version decides, a field a decision; `decisions` and ``spte policies`` say what each means and where it is from.

    Replace single fields with `dataclasses.replace` or `parse`. `name` is the preset's name and no decision.
    """

    name: str
    era: str = _decision("6.12", "where software bits lie in an SPTE; 6.12: non-present is bit 63", "6.10", ("6.1", "6.12"))
    eager_page_split: bool = _decision(True, "split huge leaves when logging starts, or at CLEAR with initially-set", "a3fe5dbda0a4, 5.18")
    nx_huge_pages: bool = _decision(False, "no huge leaf is executable; an exec fault splits it", "b8e8c8303ff2, 5.4")
    nx_marks: str = _decision(
        "linked", "tables an exec fault links that count as held down: all, or with EPT and NPT those in a huge page's place",
        "recordings b8_nx_huge_pages",
        ("possible", "linked"),
    )  # fmt: skip
    nx_any_table: bool = _decision(
        False, "with nx_huge_pages any table keeps a fault small, marked or not", "recordings 6.1/amd-legacy/b8_nx_huge_pages"
    )
    fault_split: str = _decision(
        "in-place", "a write fault on a huge leaf of a logging slot drops it or splits it", "Nov 2022 series, 6.3", ("zap", "in-place")
    )
    fast_page_fault: bool = _decision(True, "write-protected leaves of the TDP MMU are mended without mmu_lock", "5.15")
    initially_set_enable: str = _decision(
        "nothing", "SPTEs that enabling with initially-set write-protects", "3ad93562093d, 8921291980db, 5.14", ("huge", "nothing")
    )
    tdp_start_level: bool = _decision(True, "the TDP MMU heeds the start level of a write-protect", "patch 2; dbb6964e4c38, 5.13")
    one_write_protect: bool = _decision(True, "PML hardware uses the generic write-protect", "patch 13; a1419f8b5bab, 5.12")
    enable_flush: str = _decision(
        "always", "enabling flushes once in any case, or after each routine that changed", "6.1; recordings", ("each-routine", "always")
    )
    collapse: str = _decision(
        "zap-table", "disabling drops leaves that may be larger, links to their tables, or recovers the huge leaf in place",
        "9eba50f8d7fc; 5.19; 13e2e4f62a4b, 6.13", ("zap-leaf", "zap-table", "recover"),
    )  # fmt: skip
    collapse_precise: bool = _decision(True, "collapse asks for the level at which a gfn may be mapped", "patch 5; 9eba50f8d7fc, 5.12")
    collapse_pages: str = _decision(
        "compound-or-device", "pages that an imprecise collapse takes", "patch 1; c060c72ffeb4, 5.12", COLLAPSE_PAGES
    )
    mapping_level_clamped: bool = _decision(True, "the host's level counts up to what slot and CPU allow", "6.0 (patch 3: raw)")
    collapse_flush: str = _decision("each", "flushes of a collapse: each entry, or once", "35ef80eb29ab, 6.13 (once)", ("each", "once"))
    disable_sets_dirty: bool = _decision(False, "disabling on PML hardware sets D everywhere in the slot", "patch 12; b6e16ae5d99f, 5.12")
    pml_control: str = _decision(
        "logging-slots", "vCPUs run with PML always, or while a slot logs", "patch 11; a85863c2ec55, 5.12", ("always", "logging-slots")
    )
    pml_in_l2: bool = _decision(False, "PML stays on while L2 runs, and logs L2's addresses", "patch 6; c3bb9a20834f, 5.12 (off)")
    l2_root_write_protect: bool = _decision(
        True, "leaves of the root that L2 shares with L1's memory are write-protected on PML hardware", "2673dfb591a3, 6.9"
    )
    sync_kicks_without_pml: bool = _decision(
        False, "GET and CLEAR kick every vCPU on hardware without PML too", "patch 9; a018eba53870, 5.12 (6.12: not)"
    )
    pml_order: str = _decision(
        "newest-first", "order in which a PML drain marks", "37c3ddfe5238, 6.14", ("newest-first", "oldest-first")
    )
    dirty_on_remake: bool = _decision(False, "a writable leaf made over an entry with bit 1 set gets D", "cc7ed3358e41, 6.13")
    software_ad: bool = _decision(False, "A and D bits are kept by software where the CPU has none", "53510b912518, 7971801b5618, 6.13")
    aging_flush: bool = _decision(True, "a notifier that finds a leaf accessed flushes", "b9883ee40d7e, 6.13 (none)")
    pageout: str = _decision("nothing", "MADV_PAGEOUT without swap ages SPTEs or not", "recordings h4_cold_free", ("age", "nothing"))
    locked_readonly_retry: bool = _decision(
        False, "a locked instruction on a READONLY page faults twice before it is emulated", "recordings g4_readonly"
    )
    prefault: bool = _decision(True, "KVM_PRE_FAULT_MEMORY exists", "6.11; recordings k1_prefault")
    warn_on_destroy: bool = _decision(False, "closing a VM while a slot logs warns", "proposed in the series' cover letter, not merged")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.metadata and getattr(self, f.name) not in f.metadata["choices"]:
                raise PlatformError(f"policy field {f.name}={getattr(self, f.name)!r}; take one of {_spell_all(f.metadata['choices'])}")

    @staticmethod
    def named(name: str) -> Policy:
        """Return the preset `name`; PlatformError (EINVAL) lists the known ones."""
        if name not in PRESETS:
            raise PlatformError(f"policy {name!r} is not known; take one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def describe(self) -> list[tuple[str, str, str, str]]:
        """Return one ``(field, value, meaning, source)`` row a decision."""
        return [(f.name, spell(getattr(self, f.name)), f.metadata["doc"], f.metadata["source"]) for f in decisions()]


def decisions() -> list[dataclasses.Field[Any]]:
    """Return the fields of `Policy` that are decisions, in order."""
    return [f for f in dataclasses.fields(Policy) if f.metadata]


def spell(value: Any) -> str:
    """Return `value` as the command line spells it: Y and N for booleans."""
    return {True: "Y", False: "N"}.get(value, str(value))


def _spell_all(choices: tuple[Any, ...]) -> str:
    return ", ".join(spell(c) for c in choices)


_6_1 = Policy(
    "6.1", era="6.1", nx_marks="possible", nx_any_table=True, fault_split="zap", pageout="age", locked_readonly_retry=True, prefault=False,
    l2_root_write_protect=False,
)  # fmt: skip
_SERIES = dataclasses.replace(
    _6_1, name="series", eager_page_split=False, fast_page_fault=False, initially_set_enable="huge", enable_flush="each-routine",
    collapse="zap-leaf", mapping_level_clamped=False, collapse_flush="once", sync_kicks_without_pml=True,
)  # fmt: skip
PRESETS = {
    "5.11": dataclasses.replace(
        _SERIES, name="5.11", tdp_start_level=False, one_write_protect=False, collapse_precise=False, collapse_pages="thp",
        disable_sets_dirty=True, pml_control="always", pml_in_l2=True, sync_kicks_without_pml=False,
    ),
    "series": _SERIES,
    "5.12": dataclasses.replace(_SERIES, name="5.12", tdp_start_level=False),
    "6.1": _6_1,
    "6.12": Policy("6.12"),
    "6.13": Policy("6.13", collapse="recover", collapse_flush="once", dirty_on_remake=True, software_ad=True, aging_flush=False),
}  # fmt: skip
NAMES = tuple(PRESETS)


def parse(text: str) -> Policy:
    """Return the policy that `text` spells: ``NAME[,FIELD=VALUE]...``, e.g. ``6.12,eager_page_split=N``.

    Raises
    ------
    PlatformError
        EINVAL: unknown preset, field or value; the text lists what there is.
    """
    name, *changes = text.split(",")
    policy = Policy.named(name.strip())
    known = {f.name: f for f in decisions()}
    new: dict[str, Any] = {}
    for change in changes:
        key, equals, value = (part.strip() for part in change.partition("="))
        if not equals or key not in known:
            raise PlatformError(f"policy {text!r}: {change!r} is not FIELD=VALUE; the fields are {', '.join(known)}")
        choices = known[key].metadata["choices"]
        match = [c for c in choices if spell(c) == value]
        if not match:
            raise PlatformError(f"policy {text!r}: {key}={value!r}; take one of {_spell_all(choices)}")
        new[key] = match[0]
    return dataclasses.replace(policy, name=text.strip(), **new) if new else policy
