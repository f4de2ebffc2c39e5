"""Recordings whose arguments and order were changed at random, on the host's KVM and on the model: the same answers, never a traceback."""

import copy
import os
import random

import pytest

from spte import devkvm
from spte.devkvm.device import NoKvmError, open_kvm
from spte.recording.file import dumps, parse
from spte.recording.ops import OPS, RecordingError

NUMBERS = (
    -(1 << 63), -1, 0, 1, 2, 3, 7, 64, 100, 4096, 8192, 32764, 1 << 16, 2 << 16, 0x30000, 1 << 20, 1 << 31, 0xC0000000, (1 << 32) - 1,
    1 << 40, 1 << 52, (1 << 63) - 1,
)  # fmt: skip
PROGRAMS = 60


def mutated(rng, recording):
    """The recording with some arguments replaced, one in five in another order; None if it is no recording then."""
    records = [{"op": record["op"], "args": copy.deepcopy(record["args"])} for record in recording.records]
    for record in rng.choices(records, k=4):
        args, known = record["args"], OPS[record["op"]]
        numbers = [name for name, arg in known.items() if arg.kind == "int"]
        if numbers and rng.random() < 0.7:
            name = rng.choice(numbers)
            args[name] = rng.choice([n for n in NUMBERS if known[name].low <= n < known[name].high])
        elif "gfns" in args:
            args["gfns"] = [[rng.choice((0, 1, 1023, 1024, 1 << 18, 0xC0000, 0xFFFFF)), rng.choice((0, 1, 2, 64, 300))], *args["gfns"][:3]]
    if rng.random() < 0.2:
        rng.shuffle(records)
    lines = [recording.header, *({"i": i, **record} for i, record in enumerate(records))]
    try:
        return parse(recording.name, "\n".join(map(dumps, lines)).encode())
    except RecordingError:
        return None


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_changed_recordings_get_the_same_answers(seed):
    try:
        kvm, host = open_kvm(), devkvm.host()
    except NoKvmError as why:
        pytest.skip(str(why))
    rng, scenarios, compared = random.Random(seed), list(devkvm.interface()), 0
    for _ in range(PROGRAMS):
        recording = mutated(rng, rng.choice(scenarios))
        if recording is None:
            continue
        try:
            report = devkvm.compare(recording, host, kvm)
        except RecordingError:
            continue
        assert report.finding is None, f"{report.finding}\n" + "\n".join(map(dumps, recording.records))
        compared += report.fields
    os.close(kvm)
    assert compared > 1000
