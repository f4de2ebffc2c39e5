"""Each public kernel runs the leaf loops of its twin in the VM: followed through the sources, call by call."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TWINS = {
    "write_protect": ("spte.mmu.slot.write_protect", "write_protect_slot"),
    "clear_dirty": ("spte.mmu.slot.clear_dirty", "clear_dirty_slot"),
    "harvest": ("spte.mmu.dirty_log.harvest", "get_dirty_log"),
    "pml_flush": ("spte.mmu.dirty_log.pml", "drain"),
    "split": ("spte.mmu.slot.split", "split_slot"),
    "collapse": ("spte.mmu.slot.collapse", "collapse_slot"),
}


@cache
def module(name):
    """Compiled functions of a module by name, and where each imported name is from."""
    tree = ast.parse(ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text())
    compiled = {}
    for node in tree.body:
        marks = {d.id for d in getattr(node, "decorator_list", ()) if isinstance(d, ast.Name)}
        if isinstance(node, ast.FunctionDef) and any(mark.startswith(("kernel", "helper")) for mark in marks):
            compiled[node.name] = node
    froms = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module.startswith("spte.")]
    return compiled, {alias.name: n.module for n in froms for alias in n.names}


def reached(where, name):
    """All compiled functions that a compiled function calls, itself included, as ``(module, name)``."""
    found, todo = set(), [(where, name)]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        found.add(at)
        compiled, origin = module(at[0])
        called = [n.func.id for n in ast.walk(compiled[at[1]]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        places = [(origin.get(f, at[0]), f) for f in called]
        todo += [place for place in places if place[0] != "spte._numba.jit" and place[1] in module(place[0])[0]]
    return found


def loops(where, name):
    return any(isinstance(n, ast.For | ast.While) for n in ast.walk(module(where)[0][name]))


def only_public(kernel, twin):
    """Compiled functions below the driver of a public kernel that the twin does not call; all below the driver."""
    driver = (f"spte.kernels._{kernel}", f"_{kernel}")
    below = reached(*driver) - {driver}
    return below - reached(*TWINS[twin]), below


@pytest.mark.parametrize("kernel", TWINS)
def test_all_that_a_public_kernel_calls_is_what_the_vm_calls(kernel):
    own, below = only_public(kernel, kernel)
    assert not own
    assert [f for f in below if loops(*f)], "the loop over entries is one of them"


@pytest.mark.parametrize(
    ("kernel", "other"), [("harvest", "clear_dirty"), ("pml_flush", "harvest"), ("split", "collapse"), ("collapse", "split")]
)
def test_a_kernel_beside_the_twin_of_another_shows_what_is_not_shared(kernel, other):
    """The rule above can fail."""
    assert only_public(kernel, other)[0]


@pytest.mark.parametrize("kernel", TWINS)
def test_a_public_kernel_calls_one_compiled_function_and_does_not_loop_itself(kernel):
    """Else a second implementation might stand beside the one that is followed above."""
    tree = ast.parse((ROOT / "spte" / "kernels" / f"_{kernel}.py").read_text())
    public = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    called = {n.func.id for n in ast.walk(public) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert called & set(module(f"spte.kernels._{kernel}")[0]) == {f"_{kernel}"}
    assert not [n for n in ast.walk(public) if isinstance(n, ast.For | ast.While)]
