"""Each step that keeps writes and translations right is needed: without it a short program loses a write, or keeps a translation.

`mutants` lists the steps; programs are random, deterministic, and shrunk until no step can be spared.
"""

import ast
from pathlib import Path

import pytest
from conftest import PLATFORMS, POLICIES

from programs.mutants import LOST, MUTANTS, STALE, cases
from programs.tlb import MODES, Scene, fails, random_program, search, shrink

LONGEST = 10
FEW = ("ept-pml", "npt", "ept-noad-rmap", "npt-pml-rmap", "shadow")  # each MMU with PML and by write protection; the rest: long lane
SEEDS = 600
NAMING = {"flush", "does", "each", "harvest", "rearm"}


def few(found):
    return [case for case in found if case[1].platform in FEW]


def rest(found):
    return [case for case in found if case[1].platform not in FEW]


def assert_shrinks_to_a_short_program(step, scene, caught):
    program = search(scene, caught, (step,), SEEDS)
    assert program is not None, f"no program shows {caught}"
    assert len(program) <= LONGEST, program
    assert not fails(scene, program, caught)
    for i in range(len(program)):
        assert not fails(scene, program[:i] + program[i + 1 :], caught, (step,)), f"step {i} of {program} can be spared"


@pytest.mark.parametrize(("step", "scene"), few(cases(LOST)), ids=str)
def test_without_the_step_a_program_of_at_most_ten_steps_loses_a_write(step, scene):
    assert_shrinks_to_a_short_program(step, scene, LOST)


@pytest.mark.long
@pytest.mark.parametrize(("step", "scene"), rest(cases(LOST)), ids=str)
def test_without_the_step_a_program_of_at_most_ten_steps_loses_a_write_everywhere(step, scene):
    assert_shrinks_to_a_short_program(step, scene, LOST)


@pytest.mark.parametrize(("step", "scene"), few(cases(STALE)), ids=str)
def test_without_the_step_a_program_of_at_most_ten_steps_keeps_a_stale_translation(step, scene):
    assert_shrinks_to_a_short_program(step, scene, STALE)


@pytest.mark.long
@pytest.mark.parametrize(("step", "scene"), rest(cases(STALE)), ids=str)
def test_without_the_step_a_program_of_at_most_ten_steps_keeps_a_stale_translation_everywhere(step, scene):
    assert_shrinks_to_a_short_program(step, scene, STALE)


SCENES = list(dict.fromkeys([
    *(Scene(platform, policy, mode) for platform in PLATFORMS for policy in POLICIES for mode in MODES),
    *(scene for caught in (LOST, STALE) for _, scene in cases(caught)),
]))  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_no_program_loses_a_write_or_keeps_a_stale_translation(scene):
    for seed in range(3):
        assert not fails(scene, random_program(scene, seed), LOST)


@pytest.mark.long
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_no_long_program_loses_a_write_or_keeps_a_stale_translation(scene):
    for seed in range(20):
        assert not fails(scene, random_program(scene, f"long {seed}", length=150), LOST)


def named_steps():
    """The names in the oracle's own calls that a mutant can leave out."""
    for path in (Path(__file__).parent.parent / "oracle").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NAMING:
                yield from (n.value for arg in node.args for n in ast.walk(arg) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_every_step_that_the_oracle_names_is_in_the_table_and_no_other():
    assert set(named_steps()) == {mutant.step for mutant in MUTANTS}


def test_shrinking_leaves_what_is_needed_and_no_more():
    needed = {3, 8, 21, 22, 39}
    assert shrink(list(range(40)), lambda program: needed <= set(program)) == sorted(needed)
    assert len(shrink(list(range(40)), lambda program: sum(program) >= 39)) == 1
