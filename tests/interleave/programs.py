"""Small programs: vCPUs that write one or two pages, and a harvest with the copy that a migration makes, on a VM of plain Python."""

from dataclasses import dataclass

import numpy as np

import spte
from interleave.scheduler import Scheduler, watch
from spte._numba import atomics
from spte.arrays.tables import SharedTables
from spte.arrays.vcpu import DONE
from spte.cpu import run_shared as shared_runs
from spte.host import pages as host_pages
from spte.host.pages import the_host
from spte.vm import dirty_log
from spte.vm.vcpu_run import ONE_KIND, enter_guest

PAGE, LOG, BASE, PAGES = 4096, 1, 512, 64
WRITE = ONE_KIND[2]


@dataclass(frozen=True)
class Program:
    """What vCPUs write, page by page, and the state of the pages before they begin."""

    platform: str
    writes: tuple[tuple[int, ...], ...]
    mapped: tuple[int, ...] = (0, 1)  # these are dirty, others absent
    harvested: bool = False  # but they were harvested: clean
    aged: bool = False  # A was taken since
    clear: bool = False  # GET and CLEAR of manual protect, instead of GET


class Guest:
    """The VM of a program, its arrays watched."""

    def __init__(self, program):
        self.program, n = program, len(program.writes)
        self.scheduler = Scheduler(n + 1, self.hidden)
        vm = self.vm = spte.VM(program.platform, vcpus=n, manual=int(program.clear))
        self.kvm, memory = vm.kvm, spte.Backing("4k", PAGES * PAGE)
        self.backing = memory
        vm.set_memory_region(0, BASE * PAGE, PAGES * PAGE, memory)
        self.memory, self.copy = np.zeros(BASE + PAGES, np.uint64), np.zeros(PAGES, np.uint64)
        vm.vcpus[0].write([BASE + PAGES - 1])  # the tables are there
        vm.set_memory_region(0, BASE * PAGE, PAGES * PAGE, memory, flags=LOG)
        for vcpu in vm.vcpus:
            vcpu.arrays = vcpu.arrays._replace(memory=self.memory)
        if program.mapped:
            vm.vcpus[0].write(np.array(program.mapped) + BASE)
        if program.harvested:
            self.harvest(False)
        if program.aged:
            vm.kvm.clear_young(memory.hpage, 2)
        self.take(range(PAGES))
        self._watch()

    def _watch(self):
        s, t = self.scheduler, self.kvm.mmu.tables
        tables = t._replace(sptes=watch(s, "SPTE", t.sptes), flat=watch(s, "SPTE", t.flat))
        self.kvm.mmu.tables, self.kvm.shared_tables = tables, SharedTables(*tables)
        slots = self.kvm.memslots.spaces[0]
        self.kvm.memslots.spaces[0] = slots._replace(words=watch(s, "bitmap", slots.words))
        self.memory = watch(s, "page", self.memory)
        self.host = the_host()._replace(pages_lock=watch(s, "host lock", the_host().pages_lock))
        for v, vcpu in enumerate(self.vm.vcpus):
            requests = watch(s, f"vCPU {v} request", vcpu.arrays.requests)
            vcpu.arrays = vcpu.arrays._replace(requests=requests, memory=self.memory)
            enter_guest(self.kvm, vcpu)
            own = vcpu.beside(self.kvm)[0].kvm
            shared_runs.top_up(t, own, 2)
        atomics.one_at_a_time = s
        shared_runs.relax = host_pages.relax = s.relax
        h, rows = the_host(), int(t.kvm[0].rows)
        owns = [vcpu.beside(self.kvm)[0].kvm for vcpu in self.vm.vcpus]
        vcpus = [a for vcpu in self.vm.vcpus for a in (vcpu.arrays.vcpu, vcpu.arrays.requests, vcpu.arrays.pml)]
        self.block = self.backing.hpage >> 9
        self.states = h.page[int(h.blocks[self.block].row)]
        small = [t.sptes[:rows], t.pages[:rows], t.kvm, slots.words[:8], self.memory, self.copy, *owns, *vcpus, self.states]
        small += [h.pages_lock, h.blocks[self.block : self.block + 1], h.mixed_blocks[int(h.blocks[self.block].row)].reshape(1)]
        self.state = [(np.asarray(a), np.array(a)) for a in small]

    def hidden(self):
        """The states of the host's pages, which a lock keeps together."""
        return bytes(self.states[:PAGES])

    # -- what threads do

    def write(self, v):
        kvm, vcpu = self.kvm, self.vm.vcpus[v]
        gfns = np.array(self.program.writes[v]) + BASE
        t, s = vcpu.beside(kvm)
        at = shared_runs.run_shared(t, s, self.host, vcpu.arrays, vcpu.mmu.mode, gfns, WRITE, 0)
        assert (at, vcpu.arrays.vcpu["exit_reason"][0]) == (len(gfns), DONE)
        kvm.count(t.kvm)

    def take(self, pages):
        for page in pages:
            self.copy[page] = self.memory[BASE + page]

    def harvest(self, beside):
        bitmap = dirty_log.get(self.kvm, 0, None, beside)
        if self.program.clear:
            dirty_log.clear(self.kvm, 0, 0, PAGES, bitmap.view(np.uint8), beside)
        self.take(np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little")))

    # -- for `explore`

    def begin(self):
        for array, before in self.state:
            array[...] = before
        return [*(lambda v=v: self.write(v) for v in range(len(self.vm.vcpus))), lambda: self.harvest(True)]

    def verdict(self):
        self.harvest(False)
        lost = np.flatnonzero(np.asarray(self.memory)[BASE:] != self.copy)
        if len(lost):
            return f"lost write: page {lost.tolist()}"
        return ""

    def name_of(self, thread, key):
        name, place = key
        who = f"vCPU {thread}" if thread < len(self.vm.vcpus) else "harvest"
        words = {0: "", 1: " confirmed", 2: " in guest", 3: " needbreak"}
        what = {"SPTE": f"SPTE {place & 511} of table {place >> 9}", "page": f"page {place - BASE}", "bitmap": "bitmap word"}
        return who, what.get(name, name + (words.get(place, "") if "request" in name else ""))


def told(guest, run):
    """The accesses of a run to words that matter, a line each."""
    lines = []
    for thread, key, how in run.trace:
        who, what = guest.name_of(thread, key)
        lines.append(f"{who:8} {how:7} {what}")
    return "\n".join(lines)


PROGRAMS = {
    "write-protected, dirty": Program("npt", ((0, 1), (0,))),
    "write-protected, clean": Program("npt", ((0, 0), (1,)), harvested=True),
    "write-protected, CLEAR": Program("npt", ((0, 1), (0,)), clear=True),
    "PML, dirty": Program("ept-pml", ((0, 1), (0,))),
    "PML, clean": Program("ept-pml", ((0, 0), (1,)), harvested=True),
    "write-protected, aged": Program("npt", ((0, 1), (0,)), aged=True),
    "absent": Program("npt", ((0, 0), (0,)), mapped=()),
}
