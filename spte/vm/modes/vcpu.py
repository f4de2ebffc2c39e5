"""What a guest turns on and leaves again, as methods of a vCPU: its paging, a guest of its own, system management mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from spte._arguments import flag, index, integer, spell
from spte.errors import NestedError, SmmError
from spte.vm.kvm import Kvm, KvmVcpu
from spte.vm.modes import nested, smm

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V", bound="GuestModes")
SMBASE = 0x30000  # where SMRAM lies after a reset, bytes


class VcpuLoad:
    """Keep other threads from the vCPU: vcpu_load.

    Parameters
    ----------
    vcpu : KvmVcpu
        The vCPU.
    """

    __slots__ = ("_vcpu",)

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu

    def __enter__(self) -> None:
        vcpu = self._vcpu
        while not (vcpu.mutex.acquire(blocking=False) or vcpu.mutex.acquire(blocking=not vcpu.exclusive.is_mine)):
            vcpu.exclusive.let_in()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._vcpu.mutex.release()


def ioctl_of_vcpu(call: Callable[Concatenate[V, P], R]) -> Callable[Concatenate[V, P], R]:
    """Let `call` have the vCPU, and the VM's lock."""

    @functools.wraps(call)
    def alone(vcpu: V, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with VcpuLoad(vcpu), vcpu.exclusive:
            result = call(vcpu, *args, **kwargs)
        vcpu._kvm.give_warnings(stacklevel=2)
        return result

    return alone


def _address(name: str, gpa: int | None) -> int | None:
    return None if gpa is None else integer(gpa, name, NestedError)


class GuestModes(KvmVcpu):
    """The modes of one vCPU.

    Parameters
    ----------
    kvm : Kvm
        Its VM.
    index : int
        Its number, in the order of creation.
    vcpu_id : int
        Its id.
    """

    def __init__(self, kvm: Kvm, index: int, vcpu_id: int) -> None:
        super().__init__(kvm, index)
        self._kvm, self.vcpu_id = kvm, vcpu_id

    # -- guest tables and L2 ----------------------------------------------------------------------------------------------

    @property
    def l1_pml_index(self) -> int:
        """Index of L1's own PML buffer: 511 when empty, counting down, 65535 when full. L1 may set it."""
        return int(self.arrays.vcpu[0].l1_pml_index)

    @l1_pml_index.setter
    def l1_pml_index(self, value: int) -> None:
        if not 0 <= index(value, "l1_pml_index") <= 0xFFFF:
            raise NestedError(f"l1_pml_index={spell(value)} is not a 16-bit index; an empty buffer has 511")
        with self.exclusive:
            self.arrays.vcpu[0].l1_pml_index = value

    @ioctl_of_vcpu
    def load_cr3(self, gpa: int | None) -> None:
        """Turn the guest's 64-bit paging on with the root table at `gpa`, or off.

        It matters under shadow paging, where KVM shadows those tables; with EPT or NPT the hardware walks them by itself.

        Parameters
        ----------
        gpa : int or None
            Guest-physical address, bytes, of a page that `Backing.table` filled; None: paging off.

        Raises
        ------
        NestedError
            EINVAL: the vCPU runs L2; the address is not of a page, or of one in no memslot where KVM shadows the tables.
        """
        nested.load_cr3(self._kvm, self, _address("gpa", gpa))

    @ioctl_of_vcpu
    def enter_l2(self, ept: int | None = None, *, ad: bool = True, pml: int | None = None, vmcb: int | None = None) -> None:
        """Let L1 run its own guest, L2, on this vCPU until `leave_l2` or an exit that L1 sees: VMLAUNCH, VMRESUME, VMRUN.

        Accesses of the vCPU are L2's from then on.

        Parameters
        ----------
        ept : int, optional
            Address of L1's root EPT or NPT table for L2 (bytes, in L1's memory); None: L2's addresses are L1's.
        ad : bool
            L1 turns A/D bits on in its EPT pointer; it can not where the platform has none. NPT always has them.
        pml : int, optional
            Address of the page where L1 wants L2's writes logged (EPT with A/D only); see `l1_pml_index`.
        vmcb : int, optional
            Address of L1's VMCB (AMD), which KVM writes at VMRUN and #VMEXIT.

        Raises
        ------
        NestedError
            EINVAL: the vCPU runs L2 already; an address that is not of a page; `ept` in no memslot, or under shadow paging; there without
            `load_cr3`; `pml` without EPT and its A/D bits; `vmcb` on Intel.
        """
        ept, pml, vmcb = _address("ept", ept), _address("pml", pml), _address("vmcb", vmcb)
        nested.enter_l2(self._kvm, self, ept, pml, vmcb, ad=flag(ad, "ad"))

    @ioctl_of_vcpu
    def leave_l2(self) -> None:
        """Go back to L1: VMCALL, VMMCALL; NestedError (EINVAL) if the vCPU does not run L2."""
        nested.leave_l2(self._kvm, self)

    @ioctl_of_vcpu
    def invept(self, ept: int | None = None) -> None:
        """Let L1 flush what its EPT translates: INVEPT. KVM frees its roots for it and finds the guest's changes at the next entry.

        Parameters
        ----------
        ept : int, optional
            Address of the root table (single context); None: all of them (global).
        """
        nested.invept(self._kvm, self, _address("ept", ept))

    # -- system management mode -------------------------------------------------------------------------------------------

    @property
    def in_smm(self) -> bool:
        """The vCPU runs in system management mode: is_smm."""
        return self.smm is not None

    @ioctl_of_vcpu
    def enter_smm(self, smbase: int = SMBASE) -> None:
        """Take an SMI: accesses are to the memslots of address space 1 until `leave_smm`, the guest's paging is off.

        KVM saves the vCPU's state to the page at ``smbase + 0xf000`` before, which dirties it in its slot of address space 1.

        Parameters
        ----------
        smbase : int
            Guest-physical address of SMRAM, bytes, a multiple of 4096 below 4 GiB.

        Raises
        ------
        SmmError
            EINVAL: the vCPU is in it already, or runs L2; no page that KVM may write holds the state. KVM ends the VM then; here nothing is
            changed.
        """
        smm.enter_smm(self._kvm, self, integer(smbase, "smbase", SmmError, 0, 1 << 32))

    @ioctl_of_vcpu
    def leave_smm(self) -> None:
        """Go back to address space 0 and the guest's own paging: RSM; SmmError (EINVAL) if the vCPU is not in system management mode."""
        smm.leave_smm(self._kvm, self)
