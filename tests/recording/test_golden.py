"""The model does, op for op and SPTE for SPTE, what real KVM did."""

import copy
import re
import tarfile
from functools import cache
from pathlib import Path

import pytest

from spte.check.run import check
from spte.policy import Policy, running
from spte.recording import file as rec
from spte.vm import kvm, vcpu
from spte.vm.vcpu_run import GOES_ON

GOLDEN = Path(__file__).parent.parent / "golden"

# A walk that the scheduler made yield flushed what it had so far, which is an input: two boots differ in it. File, op, how often.
YIELDED = {
    ("6.1-amd-shadow", "b6_hugetlb1g.jsonl"): (13, 1),
    ("5.10-intel-shadow", "24-thp-long-rounds.jsonl"): (15, 1),
}
# Of the kernels before and after the two that came first, one machine of each kind is in the fast lane, without the random scenarios.
LATER = ("5.10", "6.12-y90", "6.18", "7.2")
FAST = {"5.10-amd-tdp", "5.10-amd-shadow", "5.10-intel-pml", "5.10-intel-pml-legacy", "5.10-nested-intel-pml",
        "7.2-amd-tdp", "7.2-intel-pml", "7.2-intel-noad"}  # fmt: skip
RANDOM = re.compile(r"[yz]\d?_|.*random")


@cache
def archive(path: Path) -> dict[str, rec.Recording]:
    return {r.name.split(":")[-1]: r for r in rec.read_all(path)}


def recording_of(config: str, name: str) -> rec.Recording:
    """The recording, with the yields that are known of it as inputs."""
    recording = archive(GOLDEN / f"{config}.tar.xz")[name]
    if (config, name) not in YIELDED:
        return recording
    op, yields = YIELDED[config, name]
    records = copy.deepcopy(recording.records)
    records[op]["yields"] = yields
    return rec.Recording(recording.name, recording.header, records)


def every_recording() -> list[object]:
    params: list[object] = []
    for path in sorted(GOLDEN.glob("*.tar.xz")):
        config = path.name.removesuffix(".tar.xz")
        later = config.startswith(LATER)
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                slow = later and (config not in FAST or RANDOM.match(name))
                params.append(pytest.param(config, name, id=f"{config}/{name}", marks=[pytest.mark.long] if slow else []))
    return params


EVERY = every_recording()


@pytest.mark.parametrize(("config", "name"), EVERY)
def test_the_model_does_what_kvm_did(config: str, name: str) -> None:
    recording = recording_of(config, name)
    report = check(recording)
    assert report.finding is None, f"{report.name}: {report.finding}"
    assert report.ops == len(recording.records)
    assert report.fields > report.ops


@pytest.mark.parametrize(("config", "name"), YIELDED)
def test_without_its_yields_a_recording_has_that_many_flushes_more(config: str, name: str) -> None:
    op, yields = YIELDED[config, name]
    report = check(archive(GOLDEN / f"{config}.tar.xz")[name])
    assert report.finding is not None
    assert report.finding.i == op
    assert report.finding.key in ("stats.vm.remote_tlb_flush_requests", "counts.flush_all")
    assert report.finding.expected == report.finding.got + yields


INTERRUPTED = [
    ("6.12-intel-pml", "06-thp-manual1.jsonl"), ("6.12-intel-pml", "19-ring.jsonl"), ("7.2-amd-tdp", "b1_thp_eager.jsonl"),
    ("5.10-amd-shadow", "h3_notifier.jsonl"), ("6.12-nested-intel-pml", "n60-pml-in-l2.jsonl"),
    ("6.12-nested-amd-tdp", "n23-two-vcpus-ept.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("piece", [1, 50])
@pytest.mark.parametrize(("config", "name"), INTERRUPTED)
def test_a_run_that_lets_other_threads_in_is_one_run_if_none_comes(config, name, piece, monkeypatch) -> None:
    """Exits, drains and flushes are as recorded, wherever a batch of accesses is interrupted, or ends to go on beside others."""
    run, interruptions = vcpu.vcpu_run, []

    def runs(kvm, *args, **kwargs):
        kvm.exclusive.needbreak[0] = 1
        stop = run(kvm, *args, **kwargs)
        if stop is not None and stop.reason == GOES_ON:
            interruptions.append(stop)
        return stop

    monkeypatch.setattr(vcpu, "vcpu_run", runs)
    monkeypatch.setattr(kvm, "PIECE", piece)
    monkeypatch.setattr(kvm.ExclusiveLock, "let_in", lambda lock: interruptions.append(lock))
    report = check(recording_of(config, name))
    assert report.finding is None, f"{report.name}: {report.finding}"
    assert interruptions


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda p: p.name)
def test_a_recordings_kernel_finds_its_policy(path: Path) -> None:
    header = next(rec.read_all(path)).header
    version = running(header["kernel"])
    assert version is not None
    assert path.name.split("-")[0] == version == Policy.named(version).name
