"""Files that the real tools made: whichever tool recorded the guest, the same pages come out."""

import pytest

from spte.convert import convert
from tests.convert.reading import DATA, SLOTS, epochs

EPOCHS = [[16, 17, 18, 19, 192, 193], [36, 37, 38], [], [16, 63, 197]]
"""What `make_data.EPOCHS` writes: slot 0 is pages 0 to 127, slot 1 begins at 192 as it does in the guest."""


def files(*names):
    return [DATA / name for name in names]


@pytest.mark.parametrize(
    ("names", "options", "kind"),
    [
        ([f"dirty-{i}.bin" for i in range(4)], {}, "bitmap"),
        ([f"ring-{i}.bin" for i in range(4)], {"format": "ring"}, "ring"),
        (["ftrace.txt"], {}, "ftrace"),
        (["trace-cmd.txt"], {}, "ftrace"),
        (["perf.txt"], {}, "ftrace"),
    ],
)
def test_every_tool_saw_the_same_writes(names, options, kind):
    got = convert(files(*names), slots=SLOTS, **options)
    assert (epochs(got.trace), got.format, got.notes) == (EPOCHS, kind, [])
    assert got.trace.npages == 512
    assert [(slot["gpa"], slot["page"]) for slot in got.trace.meta["slots"]] == [(0, 0), (0xC0000, 192)]


def test_lackey_of_a_program_whose_stores_are_known():
    got = convert(files("lackey.txt"), interval_ns=10**9)
    # Every third of 64 pages from the third of the program on, a store of 8 bytes across pages 6 and 7, and `incb` of the first.
    assert set(got.trace.epoch(0).tolist()) == {*range(2, 62, 3), 6, 7}
    assert got.trace.meta["runs"] == [[0x400, 512]]
    assert got.trace.command == "./toy"
    assert got.notes == []


def test_lackeys_clock_is_its_instructions():
    text = (DATA / "lackey.txt").read_text()
    instructions = sum(line.startswith("I ") for line in text.splitlines())
    assert f"guest instrs:  {instructions}" in text
    got = convert(files("lackey.txt"), interval_ns=1)
    # The first store is the third instruction's, and four more follow the last one, `incb`.
    assert got.trace.nepochs == instructions - 2 - 3


def test_a_few_ring_entries_could_be_a_bitmap_and_are_asked_for():
    from spte.trace import TraceError

    with pytest.raises(TraceError, match=r"bitmap or ring .* --format"):
        convert(files("ring-0.bin"), slots=SLOTS)
