"""Random programs whose vCPUs go in and out of system management mode and L2: no write is lost in either address space."""

import random

import numpy as np
import pytest
from conftest import LOG, PAGE, PLATFORMS, pages_of
from programs.nest import Nest

import spte
from spte import mm

SMM = 1 << 16
SMRAM = 0x3F
STEPS, NPAGES = 60, 1024


class Program(Nest):
    """The nest, with its data mapped in address space 1 too, and what was written there and in address space 0 since the last harvest."""

    def __init__(self, platform, policy, mode, seed):
        super().__init__(platform, policy, kind="thp", vcpus=2, npages=NPAGES, mode=mode)
        self.rng, self.written = random.Random(seed), {0: set(), SMM: set()}
        smram = spte.Backing("4k", PAGE)
        self.vm.set_memory_region(SMM | 1, SMRAM * PAGE, PAGE, smram)
        self.flags = {0: 0, SMM: 0}
        for as_id in (0, SMM):
            self.set_logging(as_id, LOG)

    def set_logging(self, as_id, flags):
        self.vm.set_memory_region(as_id, self.base * PAGE, NPAGES * PAGE, self.memory, flags=flags)
        self.flags[as_id] = flags
        self.written[as_id].clear()

    def step(self):
        v = self.rng.randrange(2)
        vcpu = self.vm.vcpus[v]
        paged = vcpu.in_l2 or vcpu.cr3 is not None
        moves = ["write_some", "write_some", "harvest_all", "drop", "toggle", "store"]
        moves += ["leave_smm"] if vcpu.in_smm else ["leave"] if paged else ["enter", "enter_smm"]
        if paged and self.platform == "shadow":
            moves.append("enter_smm")  # an SMI interrupts a guest with its paging on
        getattr(self, self.rng.choice(moves))(v)
        self.vm.check()

    def enter_smm(self, v):
        self.vm.vcpus[v].enter_smm()

    def leave_smm(self, v):
        self.vm.vcpus[v].leave_smm()

    def write_some(self, v):
        vcpu = self.vm.vcpus[v]
        chosen = self.rng.sample(range(NPAGES), 8) + list(range(first := self.rng.randrange(NPAGES - 8), first + 8))
        paged = vcpu.in_l2 or vcpu.cr3 is not None
        gfns = self.at(chosen) if paged else np.array(chosen) + self.base
        assert vcpu.write(gfns) is None
        as_id = SMM if vcpu.in_smm else 0
        if self.flags[as_id]:
            self.written[as_id] |= set(chosen)

    def harvest_all(self, v):
        for as_id, written in self.written.items():
            if self.flags[as_id]:
                bitmap = self.vm.get_dirty_log(as_id)
                if self.mode != "get":
                    self.vm.clear_dirty_log(as_id, 0, NPAGES, bitmap)
                assert written <= pages_of(bitmap)
                written.clear()

    def drop(self, v):
        mm.madvise(self.memory, self.rng.randrange(NPAGES - 64), 64)

    def toggle(self, v):
        as_id = self.rng.choice((0, SMM))
        self.set_logging(as_id, LOG - self.flags[as_id])

    def store(self, v):
        """L1 changes an entry of its tables, which are shadowed while another vCPU may be in system management mode."""
        vcpu = self.vm.vcpus[v]
        if not (vcpu.in_l2 or vcpu.in_smm):
            address, entry, _ = self.entry(self.rng.randrange(NPAGES))
            assert vcpu.store(address, self.tables.unused(entry, accessed=False)) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["get", "manual 1", "manual 3"])
@pytest.mark.parametrize("policy", ["5.10", "6.1", "6.12", "7.2"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_write_is_lost_in_either_address_space(platform, policy, mode, seed):
    program = Program(platform, policy, mode, f"{platform} {policy} {mode} {seed}")
    for _ in range(STEPS):
        program.step()
    program.harvest_all(0)
