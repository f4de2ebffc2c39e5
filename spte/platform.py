"""Platforms: what the CPU and the module parameters give, as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spte._arguments import flag, instance, integer, spell
from spte.errors import PlatformError

EPT, NPT, SHADOW = "ept", "npt", "shadow"
PAGE_SIZE = 4096  # bytes of the smallest page


@dataclass(frozen=True, slots=True)
class Platform:
    """What the CPU and KVM's module parameters give.

    Parameters
    ----------
    name : str
        Preset name.
    paging : str
        ``"ept"``, ``"npt"``, or ``"shadow"``: neither, KVM shadows the guest's page tables.
    ad_bits : bool
        The CPU sets accessed and dirty bits in SPTEs (always with NPT).
    pml : bool
        Page-modification logging: 512 entries a vCPU.
    gpa_bits : int
        Guest-physical address width, bits. Slots end below ``2**gpa_bits``.
    max_level : int
        Largest leaf: 3 = 1 GiB, 2 = 2 MiB.
    exec_only : bool
        EPT entries may be executable and not readable; then R is not part of every present entry.
    l1tf : int
        Physical address width, bits, of a CPU with the L1TF bug, whose MMIO SPTEs carry the top five address bits set; 0: no bug.
    tdp_mmu : bool
        Direct roots belong to the TDP MMU; else (``tdp_mmu=N``) to the shadow MMU, which finds leaves by rmap.
    """

    name: str
    paging: str
    ad_bits: bool
    pml: bool
    gpa_bits: int
    max_level: int = 3
    exec_only: bool = True
    l1tf: int = 0
    tdp_mmu: bool = True

    def __post_init__(self) -> None:
        instance(self.name, "name", str, "a name")
        for name in ("ad_bits", "pml", "exec_only", "tdp_mmu"):
            flag(getattr(self, name), name)
        for name in ("gpa_bits", "max_level", "l1tf"):
            integer(getattr(self, name), name, PlatformError)
        if instance(self.paging, "paging", str, "a name") not in (EPT, NPT, SHADOW):
            raise PlatformError(f"paging={spell(self.paging)} is not known; take {EPT!r}, {NPT!r} or {SHADOW!r}")
        if self.paging == SHADOW and (self.pml or self.tdp_mmu):
            raise PlatformError("shadow paging has neither PML nor the TDP MMU; pass pml=False, tdp_mmu=False")
        if self.pml and not self.ad_bits:
            raise PlatformError("pml=True needs ad_bits=True: PML logs the setting of a dirty bit")
        if self.paging != EPT and not self.ad_bits:
            raise PlatformError("ad_bits=False is not possible with NPT or shadow paging; take paging='ept'")
        most = 52 if self.paging == SHADOW else 48  # four-level tables reach 48 bits
        if not 32 <= self.gpa_bits <= most:
            raise PlatformError(f"gpa_bits={self.gpa_bits} is outside 32..{most}")
        if self.l1tf and not 32 <= self.l1tf <= 52:
            raise PlatformError(f"l1tf={self.l1tf} is no physical address width; take 32..52, or 0")
        if self.max_level not in (1, 2, 3):
            raise PlatformError(f"max_level={self.max_level} is not 1 (4 KiB), 2 (2 MiB) or 3 (1 GiB)")

    @property
    def reach_bits(self) -> int:
        """Guest-physical width that a guest can address: 32 with shadow paging, where its own paging is off."""
        return 32 if self.paging == SHADOW else self.gpa_bits

    @property
    def cpu_dirty_log_size(self) -> int:
        """Entries of the CPU's dirty log: 512 with PML, else 0."""
        return 512 if self.pml else 0


# gpa_bits: 46 on Intel servers of the series' time, 48 on AMD; four-level tables end at 48.
_DIRECT = (
    Platform("ept-pml", EPT, ad_bits=True, pml=True, gpa_bits=46),
    Platform("ept-nopml", EPT, ad_bits=True, pml=False, gpa_bits=46),
    Platform("ept-noad", EPT, ad_bits=False, pml=False, gpa_bits=46),
    Platform("npt", NPT, ad_bits=True, pml=False, gpa_bits=48),
    Platform("npt-pml", NPT, ad_bits=True, pml=True, gpa_bits=48),
)
_SHADOW = Platform("shadow", SHADOW, ad_bits=True, pml=False, gpa_bits=52, tdp_mmu=False)


def without_tdp_mmu(platform: Platform) -> Platform:
    """Return `platform` with ``tdp_mmu=N``: direct roots of the shadow MMU."""
    return replace(platform, name=platform.name + "-rmap", tdp_mmu=False)


_PRESETS = {p.name: p for p in (*_DIRECT, *map(without_tdp_mmu, _DIRECT), _SHADOW)}
NAMES = tuple(_PRESETS)


def named(name: str) -> Platform:
    """Return the preset `name`; PlatformError (EINVAL) lists the known ones."""
    if instance(name, "platform", str, "a name") in _PRESETS:
        return _PRESETS[name]
    raise PlatformError(f"platform {spell(name)} is not known; take one of {', '.join(NAMES)}")
