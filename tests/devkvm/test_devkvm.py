"""The host's own KVM beside the model: what stands for the host, what ships, and, where there is one, /dev/kvm itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spte import devkvm
from spte.cli.app import run
from spte.devkvm import abi, device, guest, scenarios
from spte.devkvm.device import HostMemory, HostVm, IoctlError, NoKvmError, open_kvm
from spte.devkvm.machine import SkippedOp
from spte.policy import VERSIONS
from spte.recording.file import Recording, read_all, write
from spte.recording.ops import RecordingError
from spte.replay.guest import UnsupportedOp
from spte.replay.machine import PLATFORMS, Machine
from spte.replay.payload import Command

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "6.18-amd-tdp.tar.xz"
SHIPPED = {recording.name: recording for recording in devkvm.interface()}


@pytest.fixture
def kvm():
    try:
        fd = open_kvm()
        devkvm.host()
    except NoKvmError as why:
        pytest.skip(str(why))
    yield fd
    os.close(fd)


def modules(folder, **found):
    """A copy of /sys/module with those modules' parameters."""
    for module, parameters in found.items():
        (folder / module / "parameters").mkdir(parents=True)
        for name, text in parameters.items():
            (folder / module / "parameters" / name).write_text(text + "\n")
    return folder


# -- what stands for a host -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "config"), [
    ({"kvm_intel": {"ept": "Y", "eptad": "Y", "pml": "Y"}, "kvm": {"tdp_mmu": "Y"}}, "intel-pml"),
    ({"kvm_intel": {"ept": "Y", "eptad": "Y", "pml": "N"}, "kvm": {"tdp_mmu": "Y"}}, "intel-nopml"),
    ({"kvm_intel": {"ept": "1", "eptad": "1", "pml": "0"}, "kvm": {"tdp_mmu": "0"}}, "intel-nopml-legacy"),
    ({"kvm_intel": {"ept": "Y", "eptad": "N", "pml": "N"}, "kvm": {"tdp_mmu": "Y"}}, "intel-noad"),
    ({"kvm_intel": {"ept": "Y", "eptad": "N", "pml": "N"}, "kvm": {"tdp_mmu": "N"}}, "intel-noad-legacy"),
    ({"kvm_intel": {"ept": "N"}, "kvm": {"tdp_mmu": "N"}}, "intel-shadow"),
    ({"kvm_amd": {"npt": "Y"}, "kvm": {"tdp_mmu": "Y"}}, "amd-tdp"),
    ({"kvm_amd": {"npt": "1"}, "kvm": {"tdp_mmu": "N"}}, "amd-legacy"),
    ({"kvm_amd": {"npt": "N"}, "kvm": {"tdp_mmu": "N"}}, "amd-shadow"),
    ({"kvm": {"tdp_mmu": "N"}}, "shadow"),
    ({}, "shadow"),
])  # fmt: skip
def test_a_platform_is_chosen_by_the_modules_parameters(tmp_path, found, config):
    host = devkvm.host("6.8.0-51-generic", modules(tmp_path, **found))
    assert host.config == config
    assert config in PLATFORMS
    assert host.user_mode == (config == "shadow")
    assert Machine(host.header).policy.name == "6.8"


def test_a_kernel_without_a_policy_is_refused(tmp_path):
    with pytest.raises(NoKvmError, match=rf"the host runs Linux 9\.1\.0, of which there is no policy; there are {VERSIONS[0]} to"):
        devkvm.host("9.1.0", tmp_path)


def test_parameters_are_those_of_the_kvm_module(tmp_path):
    found = {"kvm": {"tdp_mmu": "Y", "eager_page_split": "N", "nx_huge_pages": "Y", "halt_poll_ns": "200000"}}
    host = devkvm.host("6.12.1", modules(tmp_path, kvm_amd={"npt": "1"}, **found))
    assert host.params == found["kvm"]
    assert Machine(host.header).params == {"eager_page_split": False, "nx_huge_pages": True}


# -- what ships -------------------------------------------------------------------------------------------------------------


def test_the_shipped_scenarios_are_the_recorded_ops(tmp_path):
    recorded = {r.header["scenario"]: r for r in read_all(GOLDEN)}
    wanted = {name for name in recorded if name[:2] in {"a1", "a2", "a3", "a4", "a5", "a6", "a7", "g1", "g2"} or name[0] in "cf"}
    assert set(SHIPPED) == wanted | {"f4_ring_neighbours"}
    for name in wanted:
        inputs = [{key: record[key] for key in ("i", "op", "args")} for record in recorded[name].records]
        assert SHIPPED[name].records == inputs
    scenarios.ship(GOLDEN, tmp_path / "again.tar.xz")
    again = [recording.records for recording in read_all(tmp_path / "again.tar.xz")]
    assert again == [recording.records for recording in SHIPPED.values()]
    assert scenarios.SHIPPED.stat().st_size < 10_000


def test_the_guests_jumps_meet_their_places():
    """The loop's jumps are relative: each leads to the instruction that its comment names."""
    for user in (False, True):
        code = guest.program(user=user)
        jumps = {4: 34, 12: 26, 24: 12, 32: 0, 42: 0}  # jz halt, jecxz done, jmp page, jmp next, jmp next
        assert {at: (at + 2 + code[at + 1] + 128) % 256 - 128 for at in jumps} == jumps
        assert code[34] == (0x89 if user else 0xF4)
        assert all(code[64 + 32 * n] for n in range(8))
        assert len(code) <= 4096


def test_structures_have_the_kernels_sizes():
    sizes = {abi.REGION: 32, abi.DIRTY_LOG: 16, abi.CLEAR_LOG: 24, abi.ENABLE_CAP: 104, abi.PRE_FAULT: 64, abi.REGS: 144, abi.SEGMENT: 24}
    assert {structure.format: structure.size for structure in sizes} == {structure.format: size for structure, size in sizes.items()}
    assert abi.CONTROL_OFFSET + abi.CONTROL.size + 8 + 32 == abi.SREGS_BYTES  # apic_base, interrupt_bitmap


# -- the command without a KVM ----------------------------------------------------------------------------------------------


def test_without_a_kvm_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device, "PATH", str(tmp_path / "kvm"))
    for argv in (["check", "--kvm"], ["check", "--kvm", "--json"], ["check", "--kvm", str(GOLDEN)]):
        assert run(argv) == 4
        out, err = capsys.readouterr()
        why = f"there is no {tmp_path / 'kvm'}: load kvm_intel or kvm_amd, or take a host with virtualization"
        assert (out, err) == ("", f"spte check: {why}\n")
    (tmp_path / "kvm").write_text("")
    assert run(["check", "--kvm"]) == 4
    assert "speaks API version" in capsys.readouterr().err


def test_bad_input_of_the_command(capsys, tmp_path):
    for argv, text in (
        (["check", "--kvm", str(tmp_path / "none")], "no such file or directory"),
        (["check", "--kvm", "--markdown"], "--kvm and --markdown exclude each other"),
        (["check"], "Missing argument 'FILE_OR_DIR...'; or take --kvm"),
    ):
        assert run(argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert text in err


# -- /dev/kvm ---------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", SHIPPED)
def test_the_hosts_kvm_answers_as_the_model(kvm, name):
    report = devkvm.compare(SHIPPED[name], devkvm.host(), kvm)
    assert report.finding is None, str(report.finding)
    assert report.ended is None
    assert report.ops + len(report.skipped) == len(SHIPPED[name].records)
    assert report.fields > report.ops / 2
    assert all("one address space" in text for text in report.skipped)


@pytest.mark.long
@pytest.mark.parametrize(("name", "key"), [("f1_ring_basic", "ring_ret"), ("g2_set_region_errors", "ret")])
def test_a_model_of_another_kernel_differs(kvm, name, key):
    if devkvm.host().version == "5.10":
        pytest.skip("the host is that kernel")
    report = devkvm.compare(SHIPPED[name], devkvm.host()._replace(kernel="5.10.223"), kvm)
    assert report.finding is not None
    assert report.finding.key == key


@pytest.mark.long
def test_the_command_tells_what_was_compared(kvm, capsys, tmp_path):
    assert run(["check", "--kvm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passing"] == told["files"] == len(SHIPPED)
    assert told["fields"] == sum(each["fields"] for each in told["recordings"]) > 1000
    nested = tmp_path / "nested.jsonl"
    recording: Recording = SHIPPED["a1_4k_rounds_s1"]
    header = {**recording.header, "kernel": "6.18.0", "config": "tdp"}
    write(nested, header, [{"i": 0, "op": "new_vm", "args": {"nested": "auto"}}])
    assert run(["check", "--kvm", str(nested)]) == 4
    out, err = capsys.readouterr()
    assert "not performed from op 0 new_vm: op new_vm: the guest runs no guests here" in out
    assert err == "spte check: nothing could be compared: this host performs none of the ops\n"
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    assert run(["check", "--kvm", str(broken)]) == 2
    assert "line 1 is not JSON" in capsys.readouterr().err


@pytest.mark.long
def test_a_difference_is_shown_with_both_values(kvm, capsys, monkeypatch):
    host = devkvm.host()
    monkeypatch.setattr(devkvm, "host", lambda: host._replace(kernel="5.10.223"))
    assert run(["check", "--kvm"]) == (0 if host.version == "5.10" else 1)
    assert "f1_ring_basic: op 0 new_vm: ring_ret: the kernel 0, the model -1" in capsys.readouterr().out


@pytest.mark.long
def test_bytes_behind_a_bitmap_stay_as_they_are(kvm):
    vm, memory = HostVm(kvm), HostMemory(100 << 12, huge=False)
    vm.set_memory_region(0, 0, 100 << 12, memory, flags=1)
    assert vm.get_dirty_log(0).tolist() == [0, 0]
    with pytest.raises(IoctlError, match="EINVAL") as refused:
        vm.set_memory_region(0, 0, 50 << 12, memory, flags=1)
    assert refused.value.errno_name == "EINVAL"
    vm.close()


@pytest.mark.long
def test_a_guest_that_does_not_halt_is_stopped(kvm, monkeypatch):
    monkeypatch.setattr(guest, "TIME_LIMIT", 0.2)
    machine = devkvm.HostMachine(devkvm.host(), kvm)
    machine.perform("new_vm", {}, {"args": {}})
    machine.perform("backing", {"name": "m", "kind": "4k", "size": 4096}, {})
    machine.perform("create_slot", {"slot": 0, "gpa": 4 << 20, "backing": "m"}, {})
    machine.backing("m").bytes[:2] = 0xEB, 0xFE  # jmp to itself
    with pytest.raises(UnsupportedOp, match="the guest has not halted within"):
        machine.guest.start(0, [Command("guest_exec", 1024, 1, 0)])
    machine.close()


def host_machine(kvm):
    machine = devkvm.HostMachine(devkvm.host(), kvm)
    machine.perform("new_vm", {}, {"args": {}})
    machine.perform("backing", {"name": "m", "kind": "4k", "size": 8192}, {})
    return machine


@pytest.mark.long
@pytest.mark.parametrize("slot", [
    {"hva": 0x400000, "size": 4096}, {"backing": "m", "size": 16384}, {"backing": "m", "off": 4096, "size": 8192},
    {"backing": "m", "off": -4096, "size": 4096},
])  # fmt: skip
def test_a_guest_never_reaches_memory_of_this_process_that_is_no_backings(kvm, slot):
    machine = host_machine(kvm)
    assert machine.perform("set_region", {"slot": 0, "gpa": 4 << 20, **slot}, {})["errno"] == "0"
    for op, args in (("guest_write", {"gfns": [[1024, 1]]}), ("resume", {}), ("set_msr", {"index": 0x4B564D00, "data": 4 << 20})):
        with pytest.raises(UnsupportedOp, match=f"op {op}: a slot maps memory of this process that is no backing's"):
            machine.perform(op, args, {"op": op, "args": args})
    machine.close()


@pytest.mark.long
def test_a_recording_can_not_harm_the_host(kvm):
    machine = host_machine(kvm)
    page = {"backing": "m", "pages": [[0, 1]]}
    with pytest.raises(RecordingError, match="advice 100 is not known; known are 4, 8, 20, 21"):  # MADV_HWPOISON
        machine.perform("madvise", {**page, "advice": 100}, {})
    with pytest.raises(RecordingError, match="prot 0 is not known"):
        machine.perform("mprotect", {**page, "prot": 0}, {})
    assert machine.perform("mprotect", {**page, "prot": 1}, {}) == {"ret": 0, "errno": "0"}
    assert machine.perform("host_write", page, {}) == {}  # no SIGSEGV
    with pytest.raises(UnsupportedOp, match="of memory free"):
        machine.perform("backing", {"name": "n", "kind": "4k", "size": 1 << 44}, {})
    with pytest.raises(SkippedOp, match="parameter 'enable_pmu'"):
        machine.perform("param", {"name": "enable_pmu", "val": "Y"}, {})
    with pytest.raises(UnsupportedOp, match="op 'fork': this process does not do it to itself"):
        machine.perform("fork", {}, {})
    with pytest.raises(RecordingError, match=r"\[0, 3\] is outside backing 'm'"):
        machine.perform("host_write", {"backing": "m", "pages": [[0, 3]]}, {})
    machine.close()


@pytest.mark.long
def test_the_commands_of_the_document_work_as_printed(kvm, tmp_path):
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "kvm.md").read_text(), re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-eu", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(SHIPPED)} of {len(SHIPPED)} recordings are equal" in done.stdout
    assert (tmp_path / "costs.toml").read_text().startswith("title = ")
