"""One vCPU as its user sees it: runs of guest accesses, prefault, dirty ring, L2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spte._arguments import flag, integer, spell
from spte.arrays.records import I64s
from spte.arrays.vcpu import EXEC, READ, WRITE
from spte.errors import PrefaultError, SlotAlignmentError
from spte.exits import Exit
from spte.host.guest_memory import contents
from spte.vm.modes import nested
from spte.vm.modes.vcpu import GuestModes, VcpuLoad, ioctl_of_vcpu
from spte.vm.pre_fault_memory import pre_fault_memory
from spte.vm.vcpu_run import (
    GOES_ON,
    ONE_KIND,
    Kinds,
    check_reach,
    enter_guest,
    frames,
    integers,
    run_beside,
    vcpu_run,
    written_page,
)

DIRTY_GFN = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])  # struct kvm_dirty_gfn


class VirtualCpu(GuestModes):
    """A vCPU of a VM; made by `VM.create_vcpu`.

    Parameters
    ----------
    kvm : Kvm
        Its VM.
    index : int
        Its number, in the order of creation.
    vcpu_id : int
        Its id, which the VMM chose.
    """

    # -- accesses ---------------------------------------------------------------------------------------------------------

    def read(self, gfns: npt.ArrayLike) -> Exit | None:
        """Read each page of `gfns` in order.

        Parameters
        ----------
        gfns : array_like of any integer dtype, shape (n,)
            Guest frame numbers; not changed.

        Returns
        -------
        Exit or None
            None if every access was done, else what stopped the batch.

        Raises
        ------
        TypeError
            `gfns` is not one-dimensional of an integer dtype.
        SlotRangeError
            EINVAL: a gfn beyond the guest-physical width; nothing was accessed.
        OutOfTablesError
            ENOMEM: the arena is full; earlier accesses were done.
        """
        return self._run(gfns, ONE_KIND[READ])

    def write(self, gfns: npt.ArrayLike) -> Exit | None:
        """Write each page of `gfns` in order; parameters and errors as `read`."""
        return self._run(gfns, ONE_KIND[WRITE])

    def exec(self, gfns: npt.ArrayLike) -> Exit | None:
        """Fetch an instruction from each page of `gfns` in order; parameters and errors as `read`."""
        return self._run(gfns, ONE_KIND[EXEC])

    def run(self, gfns: npt.ArrayLike, kinds: npt.ArrayLike, *, leave: bool = True) -> Exit | None:
        """Access each page of `gfns` in order as `kinds` says, without leaving the guest between; errors as `read`.

        Parameters
        ----------
        gfns : array_like of any integer dtype, shape (n,)
            Guest frame numbers; not changed.
        kinds : array_like of uint8, shape (n,)
            `spte.READ`, `spte.WRITE` or `spte.EXEC` for each access; not changed.
        leave : bool
            False: the guest is not left after the last access; the next call goes on without a guest entry, if no ioctl of the VM kicked
            the vCPU out.

        Returns
        -------
        Exit or None
            None if every access was done, else what stopped the batch.
        """
        asked, batch = integers(kinds, "kinds"), integers(gfns, "gfns")
        if asked.shape != batch.shape:
            raise TypeError(f"kinds has shape {asked.shape}, gfns {batch.shape}; pass one kind for each gfn")
        wrong = asked[~((asked == READ) | (asked == WRITE) | (asked == EXEC))]
        if len(wrong):
            raise TypeError(f"kinds holds {spell(int(wrong[0]))}; pass READ (1), WRITE (2) or EXEC (4) for each gfn")
        each = np.array(asked, np.uint8)
        return self._run(batch, each if len(each) != 1 else ONE_KIND[int(each[0])], leave=flag(leave, "leave"))

    def _run(self, gfns: npt.ArrayLike, kinds: Kinds, *, leave: bool = True) -> Exit | None:
        array, low, high = frames(gfns)
        with VcpuLoad(self):
            at, shares = 0, leave and not self.exclusive.is_mine
            while True:
                if shares and self.exclusive.met:
                    check_reach(self._kvm, self, low, high)
                    done, stop = run_beside(self._kvm, self, array[at:], kinds[at:] if len(kinds) > 1 else kinds)
                    if stop is not None or 0 < done == len(array) - at:
                        break
                    at += done
                with self.exclusive:
                    stop = self._access(array[at:], low, high, kinds[at:] if len(kinds) > 1 else kinds, leave, yields=shares)
                if stop is None or stop.reason != GOES_ON:
                    break
                at += stop.index
            return stop if stop is None or not at else replace(stop, index=stop.index + at)

    def _access(self, gfns: I64s, low: int, high: int, kinds: Kinds, leave: bool, *, yields: bool = False) -> Exit | None:
        check_reach(self._kvm, self, low, high)
        stop = vcpu_run(self._kvm, self, gfns, kinds, leave=leave, yields=yields)
        return None if stop is None else nested.reflect(self._kvm, self, stop)

    @ioctl_of_vcpu
    def store(self, gpa: int, value: int, *, leave: bool = True) -> Exit | None:
        """Write 8 bytes of guest memory: how a guest changes page tables that KVM shadows. One access, as `write` does it.

        Parameters
        ----------
        gpa : int
            Address that the running guest gives, bytes, a multiple of 8.
        value : int
            64 bits, unsigned.
        leave : bool
            False: the guest is not left after it, as for `run`.

        Returns
        -------
        Exit or None
            None if it was done.

        Raises
        ------
        SlotAlignmentError
            EINVAL: `gpa` is not a multiple of 8, or `value` has more than 64 bits; errors as `read` else.
        """
        gpa, value = integer(gpa, "gpa", SlotAlignmentError), integer(value, "value", SlotAlignmentError)
        leave = flag(leave, "leave")
        if gpa % 8 or value < 0:
            raise SlotAlignmentError(f"store of {value:#x} at {gpa:#x}: take a multiple of 8 and 64 bits")
        reg = self.arrays.vcpu[0]
        reg.store_offset = gpa & 0xFFF
        try:
            stop = self._access(*frames([gpa >> 12]), ONE_KIND[WRITE], leave)
        finally:
            reg.store_offset = 0
        if stop is None:
            contents(written_page(self._kvm, self, gpa >> 12))[(gpa & 0xFFF) // 8] = value
        return stop

    @ioctl_of_vcpu
    def prefault(self, gpa: int, size: int, flags: int = 0) -> tuple[int, int]:
        """Map ``[gpa, gpa + size)`` before the guest asks for it: KVM_PRE_FAULT_MEMORY. Leaves are not accessed yet.

        Parameters
        ----------
        gpa, size : int
            Bytes, multiples of 4096, `size` not 0.
        flags : int
            0.

        Returns
        -------
        tuple of int
            Address and bytes that are left: 0 bytes if all is mapped, more if a later page could not be.

        Raises
        ------
        PrefaultError
            EINVAL: malformed, or a policy without prefault; EOPNOTSUPP: shadow paging, or L2 on tables of L1; ENOENT: the first page is
            in no memslot (its MMIO SPTE is made first, as KVM does); EFAULT: the host does not give it.
        """
        gpa, size, flags = (integer(n, name, PrefaultError) for n, name in ((gpa, "gpa"), (size, "size"), (flags, "flags")))
        return pre_fault_memory(self._kvm, self, gpa, size, flags)

    @ioctl_of_vcpu
    def enter_guest(self) -> None:
        """Do what comes before a guest entry, without an access: take over the PML control, load a valid root."""
        enter_guest(self._kvm, self)

    @property
    def ring(self) -> npt.NDArray[Any]:
        """View of the dirty ring: structured array of ``flags``, ``slot`` (uint32) and ``offset`` (uint64, pages); empty without one.

        Userspace sets bit 1 of ``flags`` of the entries that it has taken; `VM.reset_dirty_rings` frees those.
        """
        return self.arrays.ring.reshape(-1).view(DIRTY_GFN)
