"""Numbers and layouts of KVM's userspace interface on x86-64 (linux/kvm.h, asm/kvm.h), as `struct` formats."""

from __future__ import annotations

import struct

_TYPE = 0xAE  # KVMIO
_WRITE, _READ = 1, 2  # directions of an ioctl's argument, as userspace sees them


def _request(number: int, size: int = 0, direction: int = 0) -> int:
    return direction << 30 | size << 16 | _TYPE << 8 | number


# Structures that travel as bytes.
REGION = struct.Struct("<IIQQQ")  # kvm_userspace_memory_region
DIRTY_LOG = struct.Struct("<IIQ")  # kvm_dirty_log: slot, padding, pointer
CLEAR_LOG = struct.Struct("<IIQQ")  # kvm_clear_dirty_log: slot, num_pages, first_page, pointer
ENABLE_CAP = struct.Struct("<II4Q64x")  # kvm_enable_cap
PRE_FAULT = struct.Struct("<QQQ40x")  # kvm_pre_fault_memory: gpa, size, flags
MSRS = struct.Struct("<IIIIQ")  # kvm_msrs of one entry: nmsrs, padding, index, reserved, data
REGS = struct.Struct("<16Q2Q")  # kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8..r15, rip rflags
SEGMENT = struct.Struct("<QIH10B")  # kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
SREGS_BYTES = 312  # kvm_sregs: cs ds es fs gs ss tr ldt, gdt idt, then
CONTROL = struct.Struct("<6Q")  # cr0 cr2 cr3 cr4 cr8 efer
CONTROL_OFFSET = 8 * SEGMENT.size + 2 * 16

GET_API_VERSION, CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE = (_request(n) for n in (0x00, 0x01, 0x03, 0x04))
CREATE_VCPU, SET_NR_MMU_PAGES, SET_TSS_ADDR, RUN, RESET_DIRTY_RINGS = (_request(n) for n in (0x41, 0x44, 0x47, 0x80, 0xC7))
GET_DIRTY_LOG = _request(0x42, DIRTY_LOG.size, _WRITE)
SET_USER_MEMORY_REGION = _request(0x46, REGION.size, _WRITE)
CLEAR_DIRTY_LOG = _request(0xC0, CLEAR_LOG.size, _WRITE | _READ)
ENABLE_CAPABILITY = _request(0xA3, ENABLE_CAP.size, _WRITE)
PRE_FAULT_MEMORY = _request(0xD5, PRE_FAULT.size, _WRITE | _READ)
SET_REGS = _request(0x82, REGS.size, _WRITE)
GET_SREGS, SET_SREGS = _request(0x83, SREGS_BYTES, _READ), _request(0x84, SREGS_BYTES, _WRITE)
SET_MSRS = _request(0x89, 8, _WRITE)  # the size is that of its head
API_VERSION = 12

CAP_MEMSLOTS, CAP_ADDRESS_SPACES, CAP_MANUAL_PROTECT, CAP_RING, CAP_RING_ACQ_REL = 10, 118, 168, 192, 223
CAP_RING_WITH_BITMAP, CAP_PRE_FAULT = 225, 236
DIRTY_LOG_PAGE_OFFSET = 64  # pages, in the mapping of a vCPU

# struct kvm_run
EXIT_REASON = struct.Struct("<8xI")
EXIT_OFFSET = 32
IO = struct.Struct("<BBHIQ")  # direction, size, port, count, offset of the data
MMIO = struct.Struct("<Q8sIB")  # gpa, data, length, is a write
EXIT_IO, EXIT_HLT, EXIT_MMIO, EXIT_DIRTY_RING_FULL = 2, 5, 6, 31
EXIT_NAMES = {0: "unknown", 1: "exception", 3: "hypercall", 8: "shutdown", 9: "fail_entry", 17: "internal_error", 39: "memory_fault"}
