"""Random programs on the VM and on the oracle, compared after each step; each step also runs the invariant scan.

One table of steps and arguments drives two searches: seeds, which spread evenly, and a Hypothesis state machine, which shrinks.
"""

import dataclasses
import random

import hypothesis.strategies as st
import pytest
from conftest import PLATFORMS, POLICIES, TDP_PLATFORMS
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from oracle.memory import LOG
from oracle.rules import RULES

from programs.both import Both
from programs.mutants import STATE, cases
from programs.steps import START, STEPS, WEIGHTS, Program, steps_of


def draw(rng, arguments):
    return {name: rng.choice(choices) for name, choices in arguments.items()}


def run_seed(platform, policy, rings, seed, steps, mutants=(), names=()):
    """Run one random program, of the steps in `names` if it has some; a failure shows it step by step."""
    rng = random.Random(f"{platform} {policy} {rings} {seed}")
    program = Program(platform, policy, rings)
    names = names or steps_of(policy, rings)
    chosen = rng.choices(names, [WEIGHTS.get(name, 1) for name in names], k=steps)
    steps = [("start", draw(rng, START)), *((name, draw(rng, STEPS[name])) for name in chosen)]
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

    body = {name: rule_of(name) for name in steps_of(policy, rings)}
    body["start"] = initialize(**{key: st.sampled_from(choices) for key, choices in START.items()})(start)
    body["agree"] = invariant()(agree)
    return type(f"Machine_{platform}_{policy}_{rings}", (RuleBasedStateMachine,), body)


EVERY_KIND = [
    (platform, policy, rings) for platform in PLATFORMS for policy in RULES for rings in (False, True) if not rings or RULES[policy].rings
]
# What a version changed in the shadow MMU is little: the other versions are for the long lane, as are those near a recorded one.
NEAR = ("5.11", "5.12", "6.13")
KINDS = [kind for kind in EVERY_KIND if (kind[0] in TDP_PLATFORMS and kind[1] not in NEAR) or kind[1] in POLICIES]


def for_each_of(kinds):
    return pytest.mark.parametrize(("platform", "policy", "rings"), kinds)


@for_each_of(KINDS)
def test_random_programs_end_as_in_the_oracle(platform, policy, rings):
    for seed in range(3):
        run_seed(platform, policy, rings, seed, steps=15)


@pytest.mark.long
@for_each_of(EVERY_KIND)
def test_many_random_programs_end_as_in_the_oracle(platform, policy, rings):
    """Fewer on the shadow MMU, whose programs take the oracle twice as long."""
    for seed in range(100, 140 if platform in TDP_PLATFORMS else 115 if policy in POLICIES else 106):
        run_seed(platform, policy, rings, seed, steps=25)


@for_each_of(KINDS)
def test_the_state_machine_finds_no_difference(platform, policy, rings):
    run_state_machine_as_test(machine(platform, policy, rings), settings=settings(max_examples=2, stateful_step_count=8))


@pytest.mark.long
@for_each_of(KINDS)
def test_the_state_machine_finds_no_difference_in_many_programs(platform, policy, rings):
    run_state_machine_as_test(machine(platform, policy, rings), settings=settings(max_examples=8, stateful_step_count=25))


@pytest.mark.long
@pytest.mark.parametrize(("mutant", "platform", "policy"), [
    *((flush, "npt", "6.1") for flush in ("enable", "GET", "CLEAR", "collapse", "unmap", "link replaced", "RESET")),
    *((flush, "npt-rmap", "6.12") for flush in ("zap-all", "remake", "lazy zap", "link replaced")),
    ("lazy zap", "ept-pml", "6.1"), ("collapse", "shadow", "6.12"),
    *((step, scene.platform, scene.policy) for step, scene in cases(STATE)),
])  # fmt: skip
def test_the_comparison_sees_each_missing_flush(mutant, platform, policy):
    """With the step left out of the oracle, some program must end otherwise than in the VM."""
    with pytest.raises(AssertionError):  # noqa: PT012
        for seed in range(300):
            run_seed(platform, policy, mutant == "RESET", seed, steps=30, mutants=(mutant,))


SEEN_ON = {  # a decision, and a platform and version whose programs show it
    "layout": ("ept-pml", "6.12"), "fast": ("npt", "6.12"), "lazy_split": ("npt", "6.12"), "nx_marks_all": ("npt", "6.12"),
    "nx_any_table": ("ept-noad", "6.1"),
    "protects_huge_at_enable": ("npt", "series"), "heeds_start_level": ("ept-pml", "5.12"), "pml_has_own_protect": ("ept-pml", "5.11"),
    "flush_if_changed": ("npt", "6.1"), "collapse": ("npt", "6.13"), "by_page": ("npt", "5.11"),
    "disable_sets_dirty": ("npt-pml", "5.11"), "pml_always": ("ept-pml", "5.11"),
    "fast_huge": ("npt-rmap", "6.12"), "prefault_remakes": ("npt", "6.12"), "prefetch_tail": ("npt-rmap", "6.12"),
    "rewrites": ("npt", "5.11"), "oldest_first": ("npt-pml", "7.2"), "ages_dirty": ("npt", "5.11"), "unmaps_tables": ("npt", "5.11"),
    "table_flush": ("npt", "5.11"),
    "remake_sets_dirty": ("npt", "6.12"), "software_ad": ("ept-noad", "6.13"), "aging_flushes": ("npt", "6.13"),
}  # fmt: skip
MADE_OF = {  # the steps that show a decision which programs of every step show too rarely
    "pml_always": ("access", "madvise", "toggle_logging"),  # D is clear while nothing logs: after aging
    "fast_huge": ("access", "sweep", "toggle_logging", "tune"),  # a huge leaf is read-only while its slot does not log
}


@pytest.mark.long
@pytest.mark.parametrize("decision", SEEN_ON)
def test_the_comparison_sees_each_wrong_decision_of_a_version(decision, monkeypatch):
    platform, policy = SEEN_ON[decision]
    right = getattr(RULES[policy], decision)
    wrong = {"recover": "table", "6.12": "6.1"}.get(right, not right)
    monkeypatch.setitem(RULES, policy, dataclasses.replace(RULES[policy], **{decision: wrong}))
    with pytest.raises(AssertionError):  # noqa: PT012
        for seed in range(200):
            rings = decision == "oldest_first"  # a bitmap has no order
            run_seed(platform, policy, rings, seed, steps=25, names=MADE_OF.get(decision, ()))


@pytest.mark.parametrize("eager", [pytest.param(True, marks=pytest.mark.long), False])
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
