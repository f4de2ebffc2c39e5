"""Which policy and platform stand for this host's KVM: its kernel's version, and the parameters of its modules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from spte import policy as policies
from spte.devkvm.device import NoKvmError

MODULES = Path("/sys/module")
SOFTWARE = "shadow"  # the machine that stands for a backend that is not known


class Host(NamedTuple):
    """What stands for a host in the model.

    Parameters
    ----------
    kernel : str
        Release of its kernel.
    config : str
        Machine, as recordings name it.
    params : dict
        Parameters of the kvm module, ``"Y"`` or ``"N"``.
    why : str
        What the machine was chosen by.
    thp : bool
        Memory that asks for transparent huge pages gets them.
    """

    kernel: str
    config: str
    params: dict[str, str]
    why: str
    thp: bool

    @property
    def version(self) -> str | None:
        """The mainline version of its kernel, which names the policy; None if there is none."""
        return policies.running(self.kernel)

    @property
    def user_mode(self) -> bool:
        """Guests run natively in user mode alone: neither VMX nor SVM is known to be behind this KVM."""
        return self.config == SOFTWARE

    @property
    def header(self) -> dict[str, Any]:
        """The first line that a recording of this host has, as far as the model asks for it."""
        return {"kernel": self.kernel, "config": self.config, "params": self.params}


def _parameters(module: Path) -> dict[str, str]:
    """Return the readable parameters of a module, booleans as Y and N; empty if it is not loaded."""
    found = {}
    for path in sorted((module / "parameters").glob("*")):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        found[path.name] = {"1": "Y", "0": "N"}.get(text, text)
    return found


def host(release: str | None = None, modules: Path = MODULES) -> Host:
    """Return what stands for this host.

    Parameters
    ----------
    release : str, optional
        Release of the kernel, by default the running one's.
    modules : Path
        Where sysfs shows the modules.

    Raises
    ------
    NoKvmError
        The kernel's version has no policy.
    """
    release = os.uname().release if release is None else release
    if policies.running(release) is None:
        versions = f"{policies.VERSIONS[0]} to {policies.VERSIONS[-1]}"
        raise NoKvmError(f"the host runs Linux {release}, of which there is no policy; there are {versions}")
    kvm = _parameters(modules / "kvm")
    config, why = _config(modules, direct="" if kvm.get("tdp_mmu", "N") == "Y" else "-legacy")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return Host(release, config, kvm, why, thp.exists() and "[never]" not in thp.read_text())


def _config(modules: Path, *, direct: str) -> tuple[str, str]:
    intel, amd = _parameters(modules / "kvm_intel"), _parameters(modules / "kvm_amd")
    if intel:
        if intel.get("ept") != "Y":
            return "intel-shadow", "kvm_intel, ept=N"
        if intel.get("eptad") != "Y":
            return f"intel-noad{direct}", "kvm_intel, ept=Y, eptad=N"
        pml = "pml" if intel.get("pml") == "Y" else "nopml"
        return f"intel-{pml}{direct}", f"kvm_intel, ept=Y, {'pml=Y' if pml == 'pml' else 'pml=N'}"
    if amd:
        if amd.get("npt") != "Y":
            return "amd-shadow", "kvm_amd, npt=N"
        return f"amd-{direct[1:] or 'tdp'}", "kvm_amd, npt=Y"
    return SOFTWARE, "neither kvm_intel nor kvm_amd shows its parameters: taken for shadow paging"
