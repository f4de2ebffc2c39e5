"""`bench.stress` in short: vCPU threads against each kind of harvest, with everything else going on; and it would see a lost write."""

import pytest

from bench import stress
from spte._numba import jit as _jit
from spte.vm import dirty_log

FEW, PAGES = (1 << 11, 2048) if _jit.PLAIN else (1 << 17, 4096)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    if _jit.PLAIN:
        monkeypatch.setattr(stress, "BATCH", 1 << 10)


def loses_nothing(platform, mode, vcpus, writes, round_writes):
    result = stress.stress(platform, mode, vcpus, writes, round_writes=round_writes, pages=PAGES)
    assert result.writes >= writes
    assert result.harvests > 0
    assert result.lost == []


@pytest.mark.parametrize(("platform", "mode"), [("ept-pml", "get"), ("npt", "manual 1"), ("ept-pml", "ring")])
def test_no_write_of_a_few_is_lost(platform, mode):
    loses_nothing(platform, mode, 2, FEW, FEW)


@pytest.mark.long
@pytest.mark.parametrize("vcpus", stress.THREADS)
@pytest.mark.parametrize("mode", stress.MODES)
@pytest.mark.parametrize("platform", [*stress.PLATFORMS, "ept-noad", "npt-rmap"])
def test_no_write_of_many_is_lost(platform, mode, vcpus):
    loses_nothing(platform, mode, vcpus, 64 * FEW, 8 * FEW)


def test_a_harvest_that_does_not_tell_is_seen(monkeypatch):
    """A page that was written, taken from the bitmap and not told is another than its copy."""
    real = dirty_log.get

    def forgetful(kvm, slot, out, beside):
        bitmap = real(kvm, slot, out, beside)
        bitmap[:] = 0
        return bitmap

    monkeypatch.setattr(dirty_log, "get", forgetful)
    monkeypatch.setattr(stress, "TOGGLE", 1 << 60)  # then everything is copied
    assert stress.stress("npt", "get", 2, FEW, round_writes=FEW, pages=PAGES).lost


def test_the_command_prints_a_line_and_fails_for_a_lost_write(monkeypatch, capsys):
    results = iter([stress.Result(writes=8, seconds=1.0), stress.Result(writes=8, seconds=1.0, lost=[3])])
    monkeypatch.setattr(stress, "stress", lambda *args: next(results))
    assert stress.main(["--threads", "2", "4", "--platforms", "npt", "--modes", "get"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[-1] for line in lines] == ["0 lost", "1 lost: pages [3]"]
