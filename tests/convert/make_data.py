"""Makes the files in `data/` with the real tools. It needs root, /dev/kvm, tracefs, trace-cmd, perf, valgrind and gcc.

    python make_data.py DIRECTORY

A guest of two slots in real mode writes the pages that `EPOCHS` says. Its dirty log is read as bitmaps, in another run as
rings, and each entry of a ring is traced by ftrace, trace-cmd and perf. The software backend of this host's KVM has no
events of faults and SPTEs: the texts of those in the tests follow the print formats in the kernel's headers.
trace-cmd may not switch tracing on inside a virtual machine, so that it makes its file of the kernel's raw buffers.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
EVENTS = ("kvm:kvm_page_fault", "kvm:kvm_dirty_ring_push", "kvm:kvm_userspace_exit", "kvmmmu:fast_page_fault",
          "kvmmmu:kvm_mmu_set_spte", "kvmmmu:kvm_tdp_mmu_spte_changed")  # fmt: skip
SLOTS = ((0, 512 << 10), (0xC0000, 256 << 10))
"""Address and size; between the two is a hole."""
EPOCHS = ([(0x1000, 0x0000, 4), (0xC000, 0x0000, 2)], [(0x2000, 0x4000, 3)], [],
          [(0x1000, 0x0000, 1), (0x3000, 0xF000, 1), (0xC000, 0x5000, 1)])  # fmt: skip
"""In each epoch: segment, offset, and how many pages are written from there."""
CODE = bytes.fromhex("268905 81c70010 49 75f6 f4")
"""1: mov %ax, %es:(%di); add $0x1000, %di; dec %cx; jnz 1b; hlt"""
CODE_AT = 0x1000
RING = 256
TOY = """
.bss
.balign 4096
page: .skip 64 * 4096
.text
.globl _start
_start:
    lea page(%rip), %rdi
    mov $20, %ecx
1:  movb $1, (%rdi)
    add $3 * 4096, %rdi
    dec %ecx
    jnz 1b
    movq $7, page + 5 * 4096 - 4(%rip)
    incb page + 9(%rip)
    mov $60, %eax
    xor %edi, %edi
    syscall
"""
"""Stores to every third of 64 pages, one that straddles pages 4 and 5, and a modification."""


def ioctl(nr, size=0, direction=0):
    return direction << 30 | size << 16 | 0xAE << 8 | nr


WRITE, READ = 1, 2
CREATE_VM, CREATE_VCPU, MMAP_SIZE, SET_TSS, RUN, RESET_RINGS = map(ioctl, (0x01, 0x41, 0x04, 0x47, 0x80, 0xC7))
SET_REGION, GET_LOG, ENABLE_CAP = ioctl(0x46, 32, WRITE), ioctl(0x42, 16, WRITE), ioctl(0xA3, 104, WRITE)
SET_REGS, GET_SREGS, SET_SREGS = ioctl(0x82, 144, WRITE), ioctl(0x83, 312, READ), ioctl(0x84, 312, WRITE)
CAP_DIRTY_LOG_RING = 192
RING_OFFSET = 64 * mmap.PAGESIZE


def run_guest(out, ring):
    """Let the guest run through all epochs; save its log after each, as a bitmap or (`ring` entries) as a ring."""
    kvm = os.open("/dev/kvm", os.O_RDWR)
    vm = fcntl.ioctl(kvm, CREATE_VM, 0)
    fcntl.ioctl(vm, SET_TSS, 0x7000_0000)
    if ring:
        fcntl.ioctl(vm, ENABLE_CAP, bytearray(struct.pack("<II4Q", CAP_DIRTY_LOG_RING, 0, ring * 16, 0, 0, 0) + bytes(64)))
    memory = mmap.mmap(-1, sum(size for _, size in SLOTS))
    memory[CODE_AT : CODE_AT + len(CODE)] = CODE
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def set_regions(flags):
        offset = 0
        for slot, (gpa, size) in enumerate(SLOTS):
            fcntl.ioctl(vm, SET_REGION, struct.pack("<IIQQQ", slot, flags, gpa, size, hva + offset))
            offset += size

    set_regions(0)
    vcpu = fcntl.ioctl(vm, CREATE_VCPU, 0)
    mapped = mmap.mmap(vcpu, fcntl.ioctl(kvm, MMAP_SIZE, 0))
    reset = bytearray(312)
    fcntl.ioctl(vcpu, GET_SREGS, reset)

    def write_pages(segment, offset, count):
        sregs = bytearray(reset)
        for register in range(6):  # cs, ds, es, fs, gs, ss
            base = segment << 4 if register == 2 else 0
            struct.pack_into("<QIH", sregs, register * 24, base, 0xFFFF, base >> 4)
        fcntl.ioctl(vcpu, SET_SREGS, sregs)
        regs = [0] * 18
        regs[0], regs[2], regs[5], regs[16], regs[17] = 0x55AA, count, offset, CODE_AT, 2
        fcntl.ioctl(vcpu, SET_REGS, struct.pack("<18Q", *regs))
        fcntl.ioctl(vcpu, RUN, 0)
        assert struct.unpack_from("<I", mapped, 8)[0] == 5, "KVM_EXIT_HLT"

    entries = mmap.mmap(vcpu, ring * 16, offset=RING_OFFSET) if ring else None
    set_regions(1)  # KVM_MEM_LOG_DIRTY_PAGES
    collected = 0
    for epoch, plan in enumerate(EPOCHS):
        for writes in plan:
            write_pages(*writes)
        time.sleep(0.1)
        if ring:
            (out / f"ring-{epoch}.bin").write_bytes(entries[:])
            while struct.unpack_from("<I", entries, collected % ring * 16)[0] == 1:
                struct.pack_into("<I", entries, collected % ring * 16, 2)
                collected += 1
            fcntl.ioctl(vm, RESET_RINGS, 0)
        else:
            (out / f"dirty-{epoch}.bin").write_bytes(b"".join(bitmap(vm, slot) for slot in range(len(SLOTS))))


def bitmap(vm, slot):
    bits = bytearray(-(-SLOTS[slot][1] // mmap.PAGESIZE // 64) * 8)
    fcntl.ioctl(vm, GET_LOG, struct.pack("<IIQ", slot, 0, ctypes.addressof(ctypes.c_char.from_buffer(bits))))
    return bytes(bits)


def shell(command, cwd):
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=cwd, check=True)


def main(out):
    out.mkdir(exist_ok=True)
    run_guest(out, 0)
    switches = [TRACING / "events" / event.replace(":", "/") / "enable" for event in EVENTS]
    (TRACING / "trace").write_text("")
    for switch in switches:
        switch.write_text("1")
    run_guest(out, RING)
    for switch in switches:
        switch.write_text("0")
    (out / "ftrace.txt").write_text((TRACING / "trace").read_text())
    cpus = range(os.cpu_count())
    for cpu in cpus:
        shell(f"timeout 1 cat {TRACING}/per_cpu/cpu{cpu}/trace_pipe_raw > cpu{cpu}.raw || true", out)
    raw = " ".join(f"cpu{cpu}.raw" for cpu in cpus)
    shell(f"trace-cmd restore -c -o head.dat; trace-cmd restore -i head.dat -o all.dat {raw}", out)
    shell(f"trace-cmd report all.dat > trace-cmd.txt; rm {raw} head.dat all.dat", out)
    record = " ".join(f"-e {event}" for event in EVENTS)
    again = f"{sys.executable} {Path(__file__).resolve()} . ring"
    shell(f"perf record -q -o perf.data {record} {again}; perf script -i perf.data > perf.txt", out)
    (out / "toy.s").write_text(TOY)
    shell("gcc -nostdlib -static -o toy toy.s; valgrind --tool=lackey --trace-mem=yes --log-file=lackey.txt ./toy", out)
    shell("rm perf.data toy toy.s", out)


if __name__ == "__main__":
    if sys.argv[2:] == ["ring"]:
        run_guest(Path(sys.argv[1]), RING)
    else:
        main(Path(sys.argv[1]))
