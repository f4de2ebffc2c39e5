"""KVM's tracepoints: every print form of Linux 5.x to 7.x, in the lines of each tool."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert.reading import SLOTS, epochs, naive, read, refusal

TOOLS = {
    "ftrace": "       CPU 0/KVM-1234    [001] d..1.  {s}.{us:06}: {event}: {payload}\n",
    "ftrace of 5.x": "     qemu-kvm-1234  [001] ....  {s}.{us:06}: {event}: {payload}\n",
    "trace-cmd": "       CPU 0/KVM-1234  [001]  {s}.{us:06}: {event:<20} {payload}\n",
    "trace-cmd -t": "       CPU 0/KVM-1234  [001]  {s}.{us:06}000: {event:<20} {payload}\n",
    "perf": "       CPU 0/KVM  1234 [001]  {s}.{us:06}: {system:>20}:{event}: {payload}\n",
    "perf, other column": " CPU 0/KVM  1234/1235  [001] {s}.{us:06}:   {system}:{event}:   {payload}\n",
}
SYSTEM = {"kvm_page_fault": "kvm", "kvm_dirty_ring_push": "kvm"}
WRITABLE, READ_ONLY = 0x8600000012345B77, 0x8600000012345B75


def line(event, payload, t_us=1_500_000_000, tool="ftrace"):
    s, us = divmod(t_us, 10**6)
    name = event + ":" if tool.startswith("trace-cmd") else event
    return TOOLS[tool].format(s=s, us=us, event=name, payload=payload, system=SYSTEM.get(event, "kvmmmu")).encode()


def fault(form, gpa, write):
    code = 2 * write
    return {
        "5.x": f"address {gpa:x} error_code {code:x}",
        "6.2": f"vcpu 0 rip 0xffffffff81000000 address 0x{gpa:x} error_code {code:x}",
        "6.3": f"vcpu 0 rip 0xffffffff81000000 address 0x{gpa:016x} error_code 0x{0x1_0000_0000 | code:x}",
    }[form]


def fast(gpa, write):
    flags = "P|W|U" if write else "P|U"
    return f"vcpu 1 gva {gpa:x} error_code {flags} sptep 000000000a1b2c3d old {READ_ONLY:#x} new {WRITABLE:x} spurious 0 fixed 1"


def set_spte(gfn, spte, level=1):
    return f"gfn {gfn:x} spte {spte:x} (rwxu) level {level} at 10a3f8c00"


def changed(gfn, old, new, level=1):
    return f"as id 0 gfn {gfn:x} level {level} old_spte {old:x} new_spte {new:x}"


def push(slot, offset):
    return f"ring 0: dirty 0x1 reset 0x0 slot {slot} offset 0x{offset:x} (used 1)"


FORMS = {
    "kvm_page_fault 5.x": ("kvm_page_fault", lambda page, write: fault("5.x", page << 12 | 0x123, write)),
    "kvm_page_fault 6.2": ("kvm_page_fault", lambda page, write: fault("6.2", page << 12 | 0x123, write)),
    "kvm_page_fault 6.3": ("kvm_page_fault", lambda page, write: fault("6.3", page << 12 | 0x123, write)),
    "fast_page_fault": ("fast_page_fault", lambda page, write: fast(page << 12 | 0xFFF, write)),
    "kvm_mmu_set_spte": ("kvm_mmu_set_spte", lambda page, write: set_spte(page, WRITABLE if write else READ_ONLY)),
    "kvm_tdp_mmu_spte_changed": (
        "kvm_tdp_mmu_spte_changed",
        lambda page, write: changed(page, READ_ONLY, WRITABLE if write else 1 << 63),
    ),
}


def text_of(events):
    """Lines for (tool, form, us since the start, page, whether it is a write)."""
    return b"".join(line(FORMS[form][0], FORMS[form][1](page, write), 1_500_000_000 + t, tool) for tool, form, t, page, write in events)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_tool(tool, form):
    events = [(tool, form, 7, 0x1234, True), (tool, form, 99_999, 0x99, False), (tool, form, 100_007, 0, True)]
    assert epochs(read(text_of(events)).trace) == [[0x1234], [0]]


@given(
    st.lists(
        st.tuples(st.sampled_from([*TOOLS]), st.sampled_from([*FORMS]), st.integers(0, 10**6), st.integers(0, 2**19), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=40)
def test_forms_in_any_mixture(events):
    events.sort(key=lambda event: event[2])
    writes = [(t * 1000, page) for _, _, t, page, write in events if write]
    if writes:
        assert epochs(read(text_of(events), interval_ns=10**8).trace) == naive(writes, 10**8)
    else:
        assert "no write" in refusal(text_of(events))


@pytest.mark.parametrize(
    ("spte", "is_write"),
    [
        (0xE67, True),  # NPT and shadow, 6.1
        (0xE65, False),
        (0xC67, True),  # NPT, 5.10
        (0xF77, True),  # EPT, 5.10
        (0xD75, False),
        (0x8600000000000B77, True),  # EPT with A/D, 6.12
        (0x8610000000000B77, True),  # EPT without A/D
        (0x80A0000000000F77, True),  # EPT, 7.2
        (0x90A0000000000F77, True),
        (0xD0F0000000000A70, False),  # access-tracked, 7.2
        (0x8000000000000000, False),  # non-present
        (0x80000000000005A0, False),  # frozen
        (0x80000000000001A0, False),
        (0x380000003FF027, False),  # MMIO, AMD 5.10
        (0x380000003FFC27, False),  # MMIO, AMD 5.10, bit 11 of the generation set
        (0x8008000000000006, False),  # MMIO, EPT
    ],
)
def test_a_write_is_an_spte_that_became_writable(spte, is_write):
    mark = line("kvm_page_fault", fault("6.3", 0x5000, True))
    for text in (
        line("kvm_tdp_mmu_spte_changed", changed(0x77, 0x8000000000000000, spte)),
        line("kvm_mmu_set_spte", set_spte(0x77, spte)),
    ):
        assert epochs(read(mark + text).trace) == [[5, 0x77] if is_write else [5]]


def test_clearing_the_dirty_bit_of_a_writable_spte_is_no_write():
    text = line("kvm_tdp_mmu_spte_changed", changed(3, 0x8600000000000F77, 0x8600000000000D77))
    assert "no write" in refusal(text)


def test_writable_large_pages_are_told_and_are_no_page_writes():
    text = line("kvm_page_fault", fault("6.3", 0x5000, True))
    text += line("kvm_mmu_set_spte", set_spte(512, 0xEE7, level=2)) + line("kvm_tdp_mmu_spte_changed", changed(1024, 0, 0xEE7, level=3))
    got = read(text)
    assert epochs(got.trace) == [[5]]
    assert got.notes == ["2 writable mappings of 2 MiB or more are no writes of a page; trace while dirty logging is on"]


def test_mmio_outside_the_slots_is_left_out_and_told():
    text = line("kvm_page_fault", fault("6.3", 0xC1000, True)) + line("kvm_page_fault", fault("6.3", 0xFEE00000, True))
    got = read(text, slots=SLOTS)
    assert epochs(got.trace) == [[193]]
    assert got.notes == ["1 writes lie in no slot (MMIO, or a slot that was not given) and are left out"]


def test_lost_events_are_told():
    text = line("kvm_page_fault", fault("6.3", 0x5000, True)) + b"CPU:1 [LOST 213 EVENTS]\n"
    assert read(text).notes == ["in: 1 lines tell of lost events; the trace has fewer writes than there were"]


def test_other_lines_do_not_matter():
    text = b"cpus=2\n# tracer: nop\n\n" + line("kvm_exit", "reason EPT_VIOLATION rip 0x1 info 81 0", tool="trace-cmd")
    text += line("kvm_page_fault", fault("5.x", 0x5000, True), tool="trace-cmd") + b"\tffffffff81 kvm_mmu_page_fault+0x1\n"
    text += line("handle_mmio_page_fault", "addr:fee00000 gfn fee00 access 2")
    assert epochs(read(text).trace) == [[5]]


def test_ring_pushes_name_slots():
    text = line("kvm_dirty_ring_push", push(0, 5)) + line("kvm_dirty_ring_push", push(1, 2))
    assert epochs(read(text, slots=SLOTS).trace) == [[5, 194]]
    assert "line 2" in (why := refusal(text))
    assert "--slot" in why
    assert "slot 2, which was not given" in refusal(text + line("kvm_dirty_ring_push", push(2, 0)), slots=SLOTS)
    assert "has 0x40" in refusal(text + line("kvm_dirty_ring_push", push(1, 64)), slots=SLOTS)
    assert "names pages by slot" in refusal(line("kvm_dirty_ring_push", push(0, 5)) + line("kvm_page_fault", fault("5.x", 1, True)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"  a-1 [001] 12.000001: kvm_page_fault: [FAILED TO PARSE] vcpu_id=0 fault_address=1\n", "no 'address'"),
        (b"  a-1 [001] 12.000001: kvm_page_fault: address 0xzz error_code 2\n", "no 'address'"),
        (b"  a-1 [001] 12.000001: kvm_page_fault: address 0x1000\n", "no 'error_code'"),
        (b"  a-1 [001] 12.000001: kvm_page_fault: address 11112222333344445 error_code 2\n", "no 'address'"),
        (b"  a-1 [001] 12.000001: kvm_page_fault: address fff1222233334444 error_code 2\n", "beyond 52 bits"),
        (b"  a-1 [001] 123456789: kvm_page_fault: address 1000 error_code 2\n", "trace_clock"),
        (b"  a-1 [001] 12.000001: (+3) kvm_page_fault: address 1000 error_code 2\n", "--ts-diff"),
        (b"kvm_page_fault: address 1000 error_code 2\n", "no time"),
        (b" kvm_page_fault: address 1000 error_code 2\n", "no time"),
        (b"  a-1 [001] 12.000001: fast_page_fault: vcpu 0 gva 1000 error_code W\n", "no 'error_code'"),
        (b"  a-1 [001] 12.000001: kvm_page_fault: address 1000 error_code 2", "no newline"),
    ],
)
def test_what_can_not_be_read_is_named_by_its_line(text, said):
    why = refusal(b"cpus=1\n" + text if text.startswith(b"  ") else text)
    assert said in why
    assert "line" in why
