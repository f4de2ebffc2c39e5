"""Wrong arguments of every public call: a TypeError or an error of the package, one line with the way out, and nothing has changed."""

import inspect
import io
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spte
from spte import convert, generate, kernels, mm, policy, trace
from spte.errors import ArgumentError, BufferFaultError, KvmError, PrefaultHoleError, SlotRangeError
from spte.host.pages import the_host
from spte.profile.perf_test import PerfTest
from spte.vm.modes.vcpu import GuestModes
from spte.vm.observed import Observed
from spte.vm.vcpu import VirtualCpu

GONE = Path(tempfile.gettempdir()) / "spte" / "no" / "such" / "file.npz"
PAGES = 64


class NoValue:
    """An object that answers to nothing."""

    def refuse(self, *_, **__):
        raise RuntimeError("no\nvalue")

    def __repr__(self):
        return "no\nvalue"

    __index__ = __len__ = __iter__ = __array__ = __bool__ = __fspath__ = refuse


class World:
    """A VM with a slot that logs, a guest that ran, guest tables, and all that a refused call must leave as it was."""

    def __init__(self):
        self.memory, self.table_memory = spte.Backing("4k", PAGES * 4096), spte.Backing("4k", 16 * 4096)
        self.vm = spte.VM("ept-pml")
        self.vm.set_memory_region(0, 0, PAGES * 4096, self.memory, flags=spte.LOG_DIRTY_PAGES)
        self.vm.set_memory_region(1 << 16, 0, PAGES * 4096, self.memory)
        self.vcpu = self.vm.vcpus[0]
        self.vcpu.write([1, 2, 3])
        self.tables = spte.GuestTables(self.table_memory, 1 << 20)
        self.tables.map(0, 0)
        self.trace = trace.from_gfns([0, 5], [7, 8])
        self.words = [np.zeros(512, np.uint64) for _ in range(3)]
        self.before = self.state()

    def state(self):
        block = the_host().blocks[self.memory.hpage >> 9]
        pages = the_host().page[block["row"]].tobytes()
        contents = [self.table_memory.table(page).tobytes() for page in range(16)]
        vm, vcpu = self.vm, self.vcpu
        seen = vm.slots(), vm.leafs(), vm.tables(), vm.other(), vm.roots(), vm.stats(), vm.counters(), vm.policy, vm.manual
        vcpu_state = vcpu.arrays.vcpu[0].tobytes(), vcpu.arrays.pml.tobytes(), vcpu.cr3, vcpu.nested.l2, vcpu.in_guest
        given = self.tables.roots, [words.tobytes() for words in self.words]
        return seen, len(vm.vcpus), vcpu_state, block.tobytes(), pages, contents, *given


def call(function, **sound):
    return lambda world: (function(world), {name: made(world) if callable(made) else made for name, made in sound.items()})


WORDS = {name: lambda w, n=n: w.words[n] for n, name in enumerate(("sptes", "tables", "bitmap"))}
ONE_TABLE = {"sptes": lambda w: w.words[0][:1], "tables": lambda w: w.words[1].reshape(1, 512), "level": 2}
CALLS = {
    "VM": call(lambda w: spte.VM, platform="npt", policy="6.12", vcpus=1, manual=0, ring_bytes=0),
    "VM.set_memory_region": call(
        lambda w: w.vm.set_memory_region, slot=1, gpa=1 << 20, size=4096, backing=lambda w: w.memory, offset=0, flags=0, hva=None
    ),
    "VM.get_dirty_log": call(lambda w: w.vm.get_dirty_log, slot=0, out=lambda w: w.words[0]),
    "VM.clear_dirty_log": call(lambda w: w.vm.clear_dirty_log, slot=0, first_page=0, num_pages=64, bitmap=lambda w: w.words[0]),
    "VM.enable_cap": call(lambda w: w.vm.enable_cap, name=168, arg0=0),
    "VM.check_extension": call(lambda w: w.vm.check_extension, cap=10),
    "VM.set_param": call(lambda w: w.vm.set_param, name="nx_huge_pages", value=True),
    "VM.create_vcpu": call(lambda w: w.vm.create_vcpu, vcpu_id=5),
    "VM.kernel_write": call(lambda w: w.vm.kernel_write, gfn=1, vcpu=0),
    "VM.set_tss_addr": call(lambda w: w.vm.set_tss_addr, gpa=0xFFFBD000),
    "VM.set_nr_mmu_pages": call(lambda w: w.vm.set_nr_mmu_pages, n=64),
    "VM.leafs": call(lambda w: w.vm.leafs, vcpu=0, hide=(0, 1)),
    "VM.tables": call(lambda w: w.vm.tables, vcpu=0, hide=(0, 1)),
    "VM.other": call(lambda w: w.vm.other, vcpu=0, hide=(0, 1)),
    "VM.roots": call(lambda w: w.vm.roots, hide=(0, 1)),
    "VM.trace_events": call(lambda w: w.vm.trace_events, on=True),
    "VM.trace_hw": call(lambda w: w.vm.trace_hw, on=True),
    "vCPU.read": call(lambda w: w.vcpu.read, gfns=[1]),
    "vCPU.write": call(lambda w: w.vcpu.write, gfns=[1]),
    "vCPU.exec": call(lambda w: w.vcpu.exec, gfns=[1]),
    "vCPU.run": call(lambda w: w.vcpu.run, gfns=[1], kinds=[1], leave=False),
    "vCPU.store": call(lambda w: w.vcpu.store, gpa=8, value=3, leave=False),
    "vCPU.prefault": call(lambda w: w.vcpu.prefault, gpa=0, size=4096, flags=0),
    "vCPU.l1_pml_index": call(lambda w: lambda value: setattr(w.vcpu, "l1_pml_index", value), value=3),
    "vCPU.load_cr3": call(lambda w: w.vcpu.load_cr3, gpa=0),
    "vCPU.enter_l2": call(lambda w: w.vcpu.enter_l2, ept=0, ad=True, pml=0, vmcb=None),
    "vCPU.enter_smm": call(lambda w: w.vcpu.enter_smm, smbase=0x30000),
    "vCPU.invept": call(lambda w: w.vcpu.invept, ept=0),
    "Backing": call(lambda w: spte.Backing, kind="4k", size=4096, align=4096, populate=True, hva_offset=0),
    "Backing.table": call(lambda w: w.memory.table, page=0),
    "Backing.write": call(lambda w: w.memory.write, first=0, count=1),
    "GuestTables": call(lambda w: spte.GuestTables, backing=lambda w: w.memory, gpa=0, kind="ept", page=0),
    "GuestTables.address": call(lambda w: w.tables.address, root=0),
    "GuestTables.map": call(lambda w: w.tables.map, gfn=5, to=6, count=1, level=1, perm=7, accessed=True, dirty=True, root=0),
    "GuestTables.permissions": call(lambda w: w.tables.permissions, entry=7, perm=3),
    "GuestTables.unused": call(lambda w: w.tables.unused, entry=7, accessed=True),
    "GuestTables.walk": call(lambda w: w.tables.walk, gfn=0, root=0),
    "GuestTables.entry": call(lambda w: w.tables.entry, gfn=0, root=0),
    "GuestTables.translate": call(lambda w: w.tables.translate, gfn=0, root=0),
    "Platform": call(
        lambda w: spte.Platform, name="mine", paging="ept", ad_bits=True, pml=True, gpa_bits=46, max_level=3, exec_only=True, l1tf=0,
        tdp_mmu=True,
    ),
    "Policy": call(lambda w: lambda **some: policy.Policy(**{f.name: f.metadata["changes"][0].value for f in policy.decisions()} | some),
                   name="mine", zap_all="in-place", user_mem_slots=509, nx_huge_pages=True),
    "Policy.named": call(lambda w: policy.Policy.named, name="6.12"),
    "policy.parse": call(lambda w: policy.parse, text="6.12"),
    "policy.changes": call(lambda w: policy.changes, decision="zap_all"),
    "policy.evidence": call(lambda w: policy.evidence, version="6.8"),
    "policy.running": call(lambda w: policy.running, release="6.1.0-44-amd64"),
    "policy.mainline": call(lambda w: policy.mainline, name="6.8"),
    "policy.spell": call(lambda w: policy.spell, value=1),
    "mm.madvise": call(lambda w: mm.madvise, backing=lambda w: w.memory, first=0, count=1, advice=4, ages=False),
    "mm.mprotect": call(lambda w: mm.mprotect, backing=lambda w: w.memory, first=0, count=1, prot=1, restores=True),
    "mm.fork": call(lambda w: mm.fork, backings=lambda w: [w.memory]),
    "mm.clear_refs": call(lambda w: mm.clear_refs, backings=lambda w: [w.memory]),
    "Trace": call(
        lambda w: trace.Trace, t_ns=lambda w: np.arange(2), indptr=lambda w: np.arange(2), gfn=lambda w: np.ones(1, np.uint64), npages=512,
        meta=lambda w: {},
    ),
    "Trace.epoch": call(lambda w: w.trace.epoch, index=0),
    "trace.from_bitmaps": call(
        lambda w: trace.from_bitmaps, bitmaps=lambda w: w.words[:1], interval_ns=5, npages=PAGES * 512, squeeze=False, meta=None
    ),
    "trace.from_gfns": call(lambda w: trace.from_gfns, t_ns=[0], gfn=[1], interval_ns=5, npages=512, squeeze=False, meta=None),
    "trace.load": call(lambda w: trace.load, path=GONE),
    "trace.named": call(lambda w: trace.named, name="sqlite"),
    "trace.shipped": call(lambda w: trace.shipped, name="sqlite"),
    "trace.save": call(lambda w: trace.save, trace=lambda w: w.trace, path=GONE),
    "convert.convert": call(
        lambda w: convert.convert, inputs=lambda w: [io.BytesIO(b"0.1 5\n")], format="text", interval_ns=50, npages=64, slots=(),
        addresses=False, time_unit="ms", squeeze=False,
    ),
    "convert.Slot": call(lambda w: lambda **some: convert.convert([io.BytesIO(b"0.1 5\n")], slots=[convert.Slot(**some)]),
                         gpa=0, size=1 << 20, id=3),
    "generate.generate": call(
        lambda w: generate.generate, pattern=lambda w: generate.PATTERNS["uniform"](), memory=2 << 20, rate=10**12, duration_ns=1000,
        interval_ns=10, seed=1,
    ),
    "generate.perf_test": call(lambda w: generate.perf_test, test=lambda w: PerfTest(bytes_per_vcpu=2 << 20), interval_ns=10),
    **{f"generate.PATTERNS[{name!r}]": call(lambda w, name=name: generate.PATTERNS[name], **sound) for name, sound in {
        "zipf": {"theta": 0.5}, "hot-cold": {"hot": 0.1, "hot_writes": 0.9}, "strided": {"stride": 3}, "gc-sweep": {"nursery": 0.5},
    }.items()},
    "kernels.layout": call(lambda w: kernels.layout, platform="npt", policy="6.12"),
    "kernels.write_protect": call(lambda w: kernels.write_protect, sptes=WORDS["sptes"], level=1),
    "kernels.clear_dirty": call(lambda w: kernels.clear_dirty, sptes=WORDS["sptes"], level=1, platform="npt"),
    "kernels.harvest": call(
        lambda w: kernels.harvest, sptes=WORDS["sptes"], bitmap=lambda w: w.words[1][:8], out=lambda w: w.words[2][:8], platform="npt"
    ),
    "kernels.pml_flush": call(lambda w: kernels.pml_flush, buffer=WORDS["sptes"], index=511, bitmap=WORDS["bitmap"], base_gfn=0),
    "kernels.split": call(lambda w: kernels.split, **ONE_TABLE, first_pfn=0, platform="npt"),
    "kernels.collapse": call(lambda w: kernels.collapse, **ONE_TABLE, first_pfn=0),
}  # fmt: skip

INTEGERS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 64, 512, 4096, *(1 << n for n in (31, 32, 40, 52, 62, 63, 64, 70))])
NUMBERS = st.one_of(
    INTEGERS, INTEGERS.map(lambda n: n - 1), INTEGERS.map(lambda n: -n), st.integers(), st.floats(), st.complex_numbers(),
    st.sampled_from([10**5000, -(10**5000)]),
    st.sampled_from([np.int64(-3), np.uint8(200), np.float64(1.5), np.bool_(True), np.datetime64("2020"), np.uint64(5)]),
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=9), st.binary(max_size=9), st.sampled_from(["x" * 100_000, "a\nb", "\0", "6.12,zap_all=x", "6.12,x", "7.99", "npt"]),
    st.sampled_from([b"x" * 100_000, bytearray(3), memoryview(b"abc")]),
)  # fmt: skip
ARRAYS = st.sampled_from([
    np.zeros(3), np.zeros((2, 2)), np.array([None]), np.array(["x"]), np.zeros((), np.uint64), np.zeros(9, np.uint64)[::2],
    np.array([1 << 63], np.uint64), np.array([1 << 70]), np.zeros(4, [("a", "u8")]), np.array([True]),
])  # fmt: skip
OBJECTS = st.sampled_from([
    None, True, False, object(), NoValue(), Exception("x"), int, len, spte.READ, spte.VM, range(3), {}, {"a": 1}, {5: 6}, set(),
    [[1], [1, 2]],
])  # fmt: skip
JUNK = st.one_of(NUMBERS, TEXTS, ARRAYS, OBJECTS, st.lists(st.one_of(NUMBERS, OBJECTS), max_size=3), st.tuples(NUMBERS, NUMBERS))

MAY_CHANGE = (BufferFaultError, PrefaultHoleError)
"""Where KVM itself goes ahead before it fails: bits are taken before they are copied, an MMIO SPTE is made."""
LONGEST = 1500  # characters of a message: some list what there is


def one_clear_line(error):
    """The error was raised on purpose, by the package."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert isinstance(error, KvmError | TypeError | ValueError), repr(error)
    assert "spte" in Path(frame.filename).parts, frame
    assert frame.line.startswith(("raise ", "self._refuse()")), frame
    assert "\n" not in str(error)
    assert 8 < len(str(error)) < LONGEST


VALUES = {"Access", "Change", "DirtyLoggingLeak", "Evidence", "Exit", "InvariantError", "KernelWarning", "KvmError", "TraceError"}
"""Classes that hold what the package gives out: it asks for none of them."""


def public(owner, prefix):
    names = getattr(owner, "__all__", None) or [name for name in vars(owner) if not name.startswith("_")]
    for name in names:
        made = getattr(owner, name)
        home = "spte" if inspect.isclass(owner) else owner.__name__
        ours = callable(made) and getattr(made, "__module__", "").startswith(home) and name not in VALUES
        if ours and set(inspect.signature(made).parameters) - {"self"}:
            yield prefix + name


def test_no_public_call_is_missing():
    owners = [(spte, ""), (spte.VM, "VM."), (VirtualCpu, "vCPU."), (GuestModes, "vCPU."), (spte.Backing, "Backing.")]
    owners += [(spte.GuestTables, "GuestTables.")]
    owners += [(trace.Trace, "Trace."), (policy.Policy, "Policy."), (mm, "mm."), (kernels, "kernels."), (trace, "trace.")]
    owners += [(policy, "policy."), (Observed, "VM.")]
    called = {name for owner, prefix in owners for name in public(owner, prefix)}
    elsewhere = {"policy.Policy": "Policy", "trace.Trace": "Trace", "Backing.pages": "Backing.write"}
    assert {elsewhere.get(name, name) for name in called} <= set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_sound_arguments_are_taken(name):
    """What the table calls sound is: then a refusal is due to what took its place."""
    function, sound = CALLS[name](World())
    if "path" in sound:
        with pytest.raises((trace.TraceError, FileNotFoundError)):
            function(**sound)
    else:
        function(**sound)


@pytest.mark.filterwarnings("ignore::spte.KernelWarning")
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused_with_one_clear_line_and_nothing_has_changed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some texts are names of files
    worlds = [World()]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def run(data):
        world = worlds[0]
        function, arguments = CALLS[name](world)
        wrong = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
        arguments |= {argument: data.draw(JUNK) for argument in wrong}
        try:
            function(**arguments)
        except MAY_CHANGE as error:
            one_clear_line(error)
        except Exception as error:
            if isinstance(error, KvmError) or not isinstance(error, OSError):  # else the operating system's, of a name to save to
                one_clear_line(error)
            assert world.state() == world.before
            return
        worlds[0] = World()  # it was sound after all, or may have changed something

    run()


# -- the reports


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"vcpu": -1}, ArgumentError, "vcpu=-1 is not in 0..0"), ({"vcpu": 1}, ArgumentError, "vcpu=1 is not in 0..0"),
    ({"vcpu": 0.5}, TypeError, "vcpu=0.5 is of type float; pass an integer"),
    ({"gfn": 0.5}, TypeError, "gfn=0.5 is of type float; pass an integer"),
    ({"gfn": 1 << 70}, SlotRangeError, "gfn=an integer of 71 bits is not in 0..1099511627775"),
    ({"gfn": -1}, SlotRangeError, "gfn=-1 is not"),
])  # fmt: skip
def test_kernel_write_checks_its_arguments_while_the_guest_runs_on(arguments, error, text):
    world = World()
    world.vcpu.run([1], [spte.WRITE], leave=False)
    before = world.state()
    with pytest.raises(error, match=text.replace("..", r"\.\.")):
        world.vm.kernel_write(**{"gfn": 1} | arguments)
    assert world.state() == before
    assert world.vcpu.in_guest
