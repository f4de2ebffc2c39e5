"""KVM_SET_USER_MEMORY_REGION: the checks in KVM's order, which kind of change a call is, and the change itself."""

from __future__ import annotations

from spte._arguments import instance, integer
from spte.arrays.slots import READONLY
from spte.errors import (
    NoSuchSlotError,
    SlotAlignmentError,
    SlotChangeError,
    SlotFlagsError,
    SlotIdError,
    SlotOverlapError,
    SlotRangeError,
)
from spte.host.backing import Backing, backings_at
from spte.platform import PAGE_SIZE
from spte.vm import dirty_log
from spte.vm.kvm import Kvm
from spte.vm.memslots import ADDRESS_SPACES, MAX_PAGES, VALID_FLAGS, Memslot, Memslots, check_slot_number

USER_END = (1 << 47) - PAGE_SIZE
TSS_PAGES = 3
TSS_END = (1 << 32) - TSS_PAGES * PAGE_SIZE  # the last address that KVM_SET_TSS_ADDR takes
CREATE, DELETE, MOVE, FLAGS_ONLY, NOTHING = "create", "delete", "move", "flags-only", "nothing"


def _check_numbers(slot: int, gpa: int, size: int, hva: int, flags: int, user_mem_slots: int) -> None:
    if slot & 0xFFFF >= user_mem_slots:
        check_slot_number(slot, user_mem_slots)
    if flags & ~VALID_FLAGS:
        raise SlotFlagsError(f"flags={flags:#x} has bits beyond LOG_DIRTY_PAGES (1) and READONLY (2)")
    if size % PAGE_SIZE or not 0 <= size < 1 << 64:
        raise SlotAlignmentError(f"size={size:#x} is not a multiple of {PAGE_SIZE} in 64 bits; round up")
    if gpa % PAGE_SIZE or not 0 <= gpa < 1 << 64:
        raise SlotAlignmentError(f"gpa={gpa:#x} is not a multiple of {PAGE_SIZE} in 64 bits; round down")
    if hva % PAGE_SIZE or hva < 0 or hva + size > USER_END:
        raise SlotAlignmentError(f"host range {hva:#x}+{size:#x} is not page aligned below {USER_END:#x}")
    check_slot_number(slot, user_mem_slots)
    if gpa + size >= 1 << 64 and size:
        raise SlotRangeError(f"gpa={gpa:#x} + size={size:#x} wraps; lower one of them")
    if size // PAGE_SIZE > MAX_PAGES:
        raise SlotRangeError(f"size={size:#x} is more than {MAX_PAGES} pages; use several slots")


def typed(
    slot: int, gpa: int, size: int, backing: Backing | None, hva: int | None, offset: int, flags: int
) -> tuple[int, int, int, Backing | None, int | None, int, int]:
    """Return the arguments of a call as ints of 64 bits and a Backing; else TypeError or KvmError."""
    return (
        integer(slot, "slot", SlotIdError), integer(gpa, "gpa", SlotAlignmentError), integer(size, "size", SlotAlignmentError),
        None if backing is None else instance(backing, "backing", Backing, "a Backing"),
        None if hva is None else integer(hva, "hva", SlotAlignmentError), integer(offset, "offset", SlotAlignmentError),
        integer(flags, "flags", SlotFlagsError),
    )  # fmt: skip


def memory_of(
    slot: int, gpa: int, size: int, backing: Backing | None, hva: int | None, offset: int, flags: int
) -> tuple[Backing, ...]:
    """Return the memory that a slot of these arguments maps, as far as they are sound: a VM and those that share it have one lock."""
    start = hva if hva is not None else backing.hva + offset if backing is not None else -1
    return backings_at(start, size) if 0 <= start < USER_END and 0 < size <= USER_END - start else ()


def plan(
    slots: Memslots, gpa_bits: int, slot: int, gpa: int, size: int, backing: Backing | None, hva: int | None, offset: int, flags: int
) -> tuple[str, Memslot | None, Memslot | None]:
    """Check a call in KVM's order and return ``(change, old, new)``; nothing is changed.

    Raises
    ------
    KvmError
        The subclass of the first broken rule, EINVAL but for an overlap (EEXIST).
    """
    old = slots.find(slot)
    if hva is None:
        hva = backing.hva + offset if backing is not None else old.hva if old is not None and size else 0
    _check_numbers(slot, gpa, size, hva, flags, slots.user_mem_slots)
    if size == 0:
        if old is None:
            raise NoSuchSlotError(f"slot={slot:#x} does not exist, so it can not be deleted (size 0)")
        return DELETE, old, None
    new = Memslot(slot, gpa // PAGE_SIZE, size // PAGE_SIZE, flags, hva, backings_at(hva, size))
    if old is None:
        change = CREATE
    else:
        if hva != old.hva or new.npages != old.npages or (flags ^ old.flags) & READONLY:
            raise SlotChangeError(
                f"slot={slot:#x} is {old.npages} pages at hva {old.hva:#x} with flags {old.flags:#x}; size, hva and READONLY "
                f"can not become {new.npages}, {hva:#x}, {flags:#x}: delete and create it"
            )
        if new.base_gfn != old.base_gfn:
            change = MOVE
        elif flags != old.flags:
            change = FLAGS_ONLY
        else:
            return NOTHING, old, None
    if change in (CREATE, MOVE):
        _check_place(slots, gpa_bits, new)
    return change, old, new


def _check_place(slots: Memslots, gpa_bits: int, new: Memslot) -> None:
    other = slots.overlapping(new.as_id, new.base_gfn, new.end_gfn, new.slot)
    if other is not None:
        raise SlotOverlapError(
            f"slot={new.slot:#x} gfns {new.base_gfn:#x}..{new.end_gfn - 1:#x} overlap slot {other.slot:#x} "
            f"({other.base_gfn:#x}..{other.end_gfn - 1:#x}); move or delete that first"
        )
    beyond = new.end_gfn > 1 << (gpa_bits - 12)
    if beyond and (slots.gpa_limit or new.base_gfn < 1 << (gpa_bits - 12)):
        raise SlotRangeError(f"slot={new.slot:#x} ends at gpa {new.end_gfn * PAGE_SIZE:#x}, beyond {gpa_bits} bits of guest-physical width")


def set_memory_region(kvm: Kvm, slot: int, gpa: int, size: int, backing: Backing | None, hva: int | None, offset: int, flags: int) -> None:
    """Create, delete, move or re-flag a memslot; see `VM.set_memory_region`: kvm_set_memory_region."""
    slots = kvm.memslots
    change, old, new = plan(slots, kvm.platform.gpa_bits, slot, gpa, size, backing, hva, offset, flags)
    if change == NOTHING:
        return
    was, now = bool(old and old.logs), bool(new and new.logs)
    if old is not None and change in (DELETE, MOVE):
        kvm.mmu.zap_all()
        slots.remove(old)
    if change == FLAGS_ONLY:
        assert old is not None
        old.flags = flags
        new = old
    if old is not None and was and not now:
        slots.free_bitmap(old)
    if new is not None and new is not old:
        new.bitmap = old.bitmap if old is not None else -1
        _insert(kvm, new)
    if new is not None:
        if now and not was and not kvm.ring_entries:
            slots.allocate_bitmap(new, all_set=kvm.manual == 3)
        slots.update(new)
    kvm.count_logging(now - was)
    kvm.advance_generation(slot >> 16, 4 if change in (DELETE, MOVE) else 2)
    if change == FLAGS_ONLY and new is not None:
        if now:
            dirty_log.arm_slot(kvm, new)
        else:
            dirty_log.collapse(kvm, new)


def _insert(kvm: Kvm, new: Memslot) -> None:
    kvm.memslots.insert(new)
    for backing in new.backings:
        backing.users.add(kvm)


def set_tss_addr(kvm: Kvm, gpa: int) -> None:
    """Map three pages at `gpa` in every address space as an internal memslot: KVM_SET_TSS_ADDR."""
    if gpa % PAGE_SIZE:
        raise SlotAlignmentError(f"gpa={gpa:#x} is not a multiple of {PAGE_SIZE}; round down")
    backing = Backing("4k", TSS_PAGES * PAGE_SIZE)
    tss_slot = kvm.memslots.user_mem_slots  # the first of KVM's internal slots
    new = [Memslot(as_id << 16 | tss_slot, gpa // PAGE_SIZE, TSS_PAGES, 0, backing.hva, (backing,)) for as_id in range(ADDRESS_SPACES)]
    for slot in new:
        if kvm.memslots.find(slot.slot) is not None:
            raise SlotChangeError(f"slot={slot.slot:#x} exists already; an internal slot is made once")
        _check_place(kvm.memslots, kvm.platform.gpa_bits, slot)
    for slot in new:
        _insert(kvm, slot)
        kvm.advance_generation(slot.as_id, 2)
