"""The groups of arrays that travel into kernels, and memory for them. Python classes own them.

A group is a NamedTuple of plain arrays; its records are structured dtypes after KVM's structs. Kernels name their parameters alike:

| letter | group |
|---|---|
| ``t`` | `tables.Tables`: the arena of page-table pages, and the VM's counters |
| ``s`` | `slots.Slots`: the memslots of one address space |
| ``h`` | `host.Host`: the host's mappings |
| ``v`` | `vcpu.Vcpu`: one vCPU |
| ``m`` | the record in `mode.Modes`: what platform and policy decide; from Python the array comes, as ``mode`` |

``f`` is a `spte.mmu.page_fault.Fault`, ``k`` a memslot's index in its address space, ``row`` a page's in the arena, which is
its frame number, and ``i`` an entry's in its page.
"""
