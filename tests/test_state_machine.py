"""Random programs on the VM and on the oracle, compared after each step; each step also runs the invariant scan.

One table of steps and arguments drives two searches: seeds, which spread evenly, and a Hypothesis state machine, which shrinks.
"""

import dataclasses
import random

import hypothesis.strategies as st
import pytest
from both import Both
from conftest import PLATFORMS, POLICIES
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from oracle_memory import LOG, READ, RO, WRITE

SLOTS, VCPUS = (0, 1), (0, 1)
SPACING = 8192  # gfns between the homes of two slots
OFFSETS = (*range(0, 1500, 13), 11, 12, 63, 64, 511, 512, 514)
EXEC = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a slot of a program looks: small, odd, misaligned in gpa or in host memory."""

    kind: str
    npages: int
    shift: int  # first gfn modulo 2 MiB
    off: int  # first page of the backing that the slot maps
    populate: bool

    def backing_pages(self):
        return -(-(self.npages + self.off) // 512) * 512 if self.kind == "hugetlb2m" else self.npages + self.off


SHAPES = [
    Shape(kind, npages, shift, shift if fits else 448 - shift, populate)
    for kind in ("thp", "thp", "hugetlb2m", "4k", "shm")
    for npages in (1088, 1500, 1024, 600, 515, 65, 1)
    for shift in (0, 0, 1, 448)
    for fits in ((True, True, True, False) if kind in ("thp", "hugetlb2m") else (True,))
    for populate in (True, False)
]
START = {
    "shape0": SHAPES, "shape1": SHAPES, "manual": (0, 0, 1, 3), "eager": (True, False), "flags": (0, 0, 0, LOG, RO),
    "touch": (None, READ, WRITE, WRITE),
}  # fmt: skip
STEPS = {
    "access": {
        "v": VCPUS, "sid": SLOTS, "first": OFFSETS, "count": range(1, 49), "stride": (1, 1, 7, 64, 512),
        "kind": (WRITE, WRITE, READ, EXEC), "wrap": (True, True, True, True, False),
    },
    "sweep": {"v": VCPUS, "sid": SLOTS, "kind": (WRITE, WRITE, READ), "step": (1, 1, -1, 3)},
    "stale": {"v": VCPUS, "sid": SLOTS, "first": OFFSETS},
    "get": {"sid": SLOTS},
    "clear": {
        "sid": SLOTS, "word": range(25), "words": range(1, 25), "tail": (True, True, False), "mask": (1, 2, 3, 64, 511),
        "only_seen": (True, False),
    },
    "get_and_clear": {"sid": SLOTS},
    "toggle_logging": {"sid": SLOTS},
    "rearrange": {"sid": SLOTS, "place": (0, 1, 1, 2, None), "flags": (0, LOG, LOG, RO, RO | LOG)},
    "tune": {"eager": (True, False), "bits": (None, None, None, 0, 1, 3)},
    "collect": {"v": VCPUS, "limit": (1, 5, 100, 4096)},
    "reset": {},
}  # fmt: skip
WITHOUT_RINGS, WITH_RINGS = {"clear", "get_and_clear"}, {"collect", "reset"}


class Program:
    """Two slots, two vCPUs, and the steps of `STEPS`."""

    def __init__(self, platform, policy, rings):
        self.platform, self.policy, self.rings = platform, policy, rings

    def start(self, shape0, shape1, manual, eager, flags, touch):
        ring = (1024 if "-pml" in self.platform else 256) if self.rings else 0
        self.both = Both(self.platform, self.policy, vcpus=2, manual=0 if ring else manual, ring=ring)
        self.both.set_eager(eager)
        self.shapes = {0: shape0, 1: shape1}
        for sid, shape in self.shapes.items():
            self.both.backing(sid, shape.kind, shape.backing_pages(), shape.populate)
            assert self.create(sid, 0, flags) == 0
            if touch is not None:
                self.sweep(0, sid, touch, 1)

    def create(self, sid, place, flags):
        """Create, move or change the slot; `place` 0 and 1 are its own, 2 lies across its neighbour."""
        shape = self.shapes[sid]
        base = sid * SPACING + place * SPACING // 2 + shape.shift if place < 2 else (1 - sid) * SPACING
        return self.both.set_region(sid, base, shape.npages, shape.off, flags)

    def base(self, sid):
        slot = self.both.ref.slots.get(sid)
        return slot.base if slot else sid * SPACING + self.shapes[sid].shift

    def want_logging(self, sid):
        """Most programs are about a slot that logs."""
        slot = self.both.ref.slots.get(sid)
        if slot is None or not slot.flags & LOG:
            self.toggle_logging(sid)

    def access(self, v, sid, first, count, stride, kind, wrap):
        """Some accesses; without `wrap` they may leave the slot."""
        size = self.shapes[sid].npages if wrap else 1 << 20
        gfns = [self.base(sid) + (first + i * stride) % size for i in range(count)]
        self.both.run(v, gfns, [kind] * count)

    def sweep(self, v, sid, kind, step):
        gfns = range(self.base(sid), self.base(sid) + self.shapes[sid].npages)[::step]
        self.both.run(v, gfns, [kind] * len(gfns))

    def stale(self, v, sid, first):
        """Write through a stale translation, which only the oracle has; else a plain write on both."""
        gfn = self.base(sid) + first % self.shapes[sid].npages
        if not self.both.ref.through_tlb(v, gfn):
            self.both.write([gfn], v)

    def get(self, sid):
        self.both.get(sid)
        self.want_logging(sid)

    def clear(self, sid, word, words, tail, mask, only_seen):
        """Clear each `mask`-th page of some words, or of all up to the slot's end."""
        first, npages = word * 64, self.shapes[sid].npages
        num = npages - first if tail and first <= npages else words * 64
        seen = self.both.get(sid) if only_seen else None
        pages = set(range(first, first + num, mask))
        self.both.clear(sid, first, num, pages & seen if isinstance(seen, set) else pages)
        self.want_logging(sid)

    def get_and_clear(self, sid):
        seen = self.both.get(sid)
        if isinstance(seen, set):
            self.both.clear(sid, 0, self.shapes[sid].npages, seen)
        self.want_logging(sid)

    def toggle_logging(self, sid):
        slot = self.both.ref.slots.get(sid)
        flags = slot.flags ^ LOG if slot else LOG
        self.both.set_region(sid, self.base(sid), self.shapes[sid].npages, self.shapes[sid].off, flags)

    def rearrange(self, sid, place, flags):
        """Move the slot or create it; `place` None deletes it if it is there."""
        if place is None and sid in self.both.ref.slots:
            self.both.set_region(sid)
        else:
            self.create(sid, place or 0, flags)

    def tune(self, eager, bits):
        """Slots that log since initially-set was on must keep it: without it KVM never arms their huge leaves."""
        self.both.set_eager(eager)
        ref = self.both.ref
        hazard = ref.manual == 3 and any(slot.flags & LOG for slot in ref.slots.values())
        if bits is not None and not self.rings and not hazard:
            self.both.set_manual(bits)

    def collect(self, v, limit):
        self.both.collect(v, limit)

    def reset(self):
        self.both.reset()


def draw(rng, arguments):
    return {name: rng.choice(choices) for name, choices in arguments.items()}


def run_seed(platform, policy, rings, seed, steps, mutants=()):
    """Run one random program; a failure shows it step by step."""
    rng = random.Random(f"{platform} {policy} {rings} {seed}")
    program = Program(platform, policy, rings)
    names = [name for name in STEPS if name not in (WITHOUT_RINGS if rings else WITH_RINGS)]
    steps = [("start", draw(rng, START)), *((n, draw(rng, STEPS[n])) for n in rng.choices(names, k=steps))]
    for at, (name, arguments) in enumerate(steps):
        try:
            getattr(program, name)(**arguments)
            program.both.ref.mutants = mutants
            program.both.compare()
        except AssertionError as e:
            done = "\n".join(f"p.{n}(**{a})" for n, a in steps[: at + 1])
            raise AssertionError(f"p = Program{platform, policy, rings}\n{done}\n{e}") from e
    program.both.close()


def machine(platform, policy, rings):
    """A Hypothesis state machine over the same steps."""

    def rule_of(name):
        arguments = {key: st.sampled_from(choices) for key, choices in STEPS[name].items()}
        return rule(**arguments)(lambda self, **drawn: getattr(self.program, name)(**drawn))

    def start(self, **drawn):
        self.program = Program(platform, policy, rings)
        self.program.start(**drawn)

    def agree(self):
        if hasattr(self, "program"):
            self.program.both.compare()

    names = [name for name in STEPS if name not in (WITHOUT_RINGS if rings else WITH_RINGS)]
    body = {name: rule_of(name) for name in names}
    body["start"] = initialize(**{key: st.sampled_from(choices) for key, choices in START.items()})(start)
    body["agree"] = invariant()(agree)
    return type(f"Machine_{platform}_{policy}_{rings}", (RuleBasedStateMachine,), body)


every_kind = [
    pytest.mark.parametrize("rings", [False, True], ids=["bitmap", "ring"]),
    pytest.mark.parametrize("policy", POLICIES),
    pytest.mark.parametrize("platform", PLATFORMS),
]


def for_every_kind(test):
    for mark in every_kind:
        test = mark(test)
    return test


@for_every_kind
def test_random_programs_end_as_in_the_oracle(platform, policy, rings):
    for seed in range(5):
        run_seed(platform, policy, rings, seed, steps=15)


@pytest.mark.long
@for_every_kind
def test_many_random_programs_end_as_in_the_oracle(platform, policy, rings):
    for seed in range(100, 200):
        run_seed(platform, policy, rings, seed, steps=30)


@for_every_kind
def test_the_state_machine_finds_no_difference(platform, policy, rings):
    run_state_machine_as_test(machine(platform, policy, rings), settings=settings(max_examples=3, stateful_step_count=10))


@pytest.mark.long
@for_every_kind
def test_the_state_machine_finds_no_difference_in_many_programs(platform, policy, rings):
    run_state_machine_as_test(machine(platform, policy, rings), settings=settings(max_examples=100, stateful_step_count=30))


@pytest.mark.parametrize("mutant", ["enable", "harvest", "collapse", "unmap", "link replaced", "lazy zap", "reset"])
def test_the_comparison_sees_each_missing_flush(mutant):
    """With the flush left out of the oracle, some program must end otherwise than in the VM."""
    kind = ("npt", "6.1", mutant == "reset")
    with pytest.raises(AssertionError):  # noqa: PT012
        for seed in range(200):
            run_seed(*kind, seed, steps=30, mutants=(mutant,))


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("platform", "policy"), [("ept-pml", "6.12"), ("npt", "6.12"), ("ept-noad", "6.1")])
def test_a_gigabyte_leaf_splits_and_comes_back(platform, policy, eager):
    both = Both(platform, policy)
    both.backing(0, "hugetlb1g", 1 << 18, populate=False)
    both.set_region(0, 1 << 18, 1 << 18)
    both.set_eager(eager)
    both.write([1 << 18])
    assert both.vm.stats()["vm"]["pages_1g"] == 1
    both.set_region(0, 1 << 18, 1 << 18, flags=LOG)
    both.write([(1 << 18) + 513 * i for i in range(60)])
    both.compare()
    both.get(0)
    both.compare()
    both.set_region(0, 1 << 18, 1 << 18)
    both.read([(1 << 18) + 5])
    both.compare()
    assert both.vm.stats()["vm"]["pages_1g"] == 1
