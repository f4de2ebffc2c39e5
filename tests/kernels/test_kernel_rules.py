"""Rules of the compiled kernels: no floats, one signature each, a cache that notices edits and may be missing."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spte._numba import jit as _jit

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(_jit.PLAIN, reason="kernels are plain Python in this lane")


REPORT = """
import json, operator, sys
import numba
from numba.core import ir
from conftest import PLATFORMS, VERSIONS, typical_run
from spte._numba import jit as _jit
from spte.warm import warmup

if _jit.LINK:
    del _jit.LINK.Entry.__call__  # numba looks at the arguments of every call


def arrays(args):
    "Array types among the arguments, those inside named tuples too; scalars may differ between callers."
    for ty in args:
        if isinstance(ty, numba.types.BaseTuple):
            yield from arrays(ty.types)
        elif isinstance(ty, numba.types.Array):
            yield str(ty)


MASKS = (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift,
         operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift)


def masks(annotation):
    "Operand types of each shift and mask of 64-bit words, with its line."
    for expr in annotation.calltypes:
        if isinstance(expr, ir.Expr) and expr.op in ("binop", "inplace_binop") and expr.fn in MASKS:
            operands = [str(annotation.typemap[v.name]) for v in (expr.lhs, expr.rhs)]
            if "uint64" in operands:
                yield expr.loc.line, *operands


def report():
    for entry, part in _jit.KERNELS:
        part = part if _jit.LINK is None else part.dispatcher
        both = [part] if entry in (None, part) else [entry, part]  # as Python calls it, as kernels take it in
        annotations = [d.overloads[sig].type_annotation for d in both for sig in d.signatures]
        yield {
            "name": part.py_func.__module__ + "." + part.py_func.__name__,
            "for_python": entry is not None,
            "signatures": [str(sig) for sig in both[0].signatures],
            "layouts": sorted({str(tuple(arrays(sig))) for d in both for sig in d.signatures}),
            "floats": [v for a in annotations for v, ty in a.typemap.items() if isinstance(ty, numba.types.Float)],
            "masks": sorted({mask for a in annotations for mask in masks(a)}),
        }


warmup()
after_warm_up = list(report())
for platform in PLATFORMS:
    for name in VERSIONS:
        typical_run(platform, name)
json.dump([after_warm_up, list(report())], sys.stdout)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Each kernel after the warm-up and after typical runs, in a process with an empty cache: only there types are kept."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SPTE_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def entry_points(report):
    """Kernels for Python."""
    return {k["name"]: k for k in report if k["for_python"]}


@compiled
@pytest.mark.long
def test_no_kernel_holds_a_float(reports):
    """Mixing signed and unsigned, or a typed and an untyped constant, makes a float64, silently."""
    assert not {k["name"]: k["floats"] for k in reports[1] if k["floats"]}


@compiled
@pytest.mark.long
def test_a_64_bit_word_is_shifted_and_masked_by_words_only(reports):
    """A bare literal is signed: numba makes an int64 of both, and bit 63 a sign. What is signed on both sides is an index or a count."""
    masks = [(k["name"], *mask) for k in reports[1] for mask in k["masks"]]
    assert masks
    assert not [mask for mask in masks if set(mask[2:]) != {"uint64"}]


@compiled
@pytest.mark.long
@pytest.mark.skipif(_jit.LINK is None, reason="without spte._numba.link an entry point is called by kernels too, with their types")
def test_each_entry_point_has_one_signature(reports):
    entries = entry_points(reports[1])
    assert entries
    assert not {name: k["signatures"] for name, k in entries.items() if len(k["signatures"]) > 1}


@compiled
@pytest.mark.long
def test_each_kernel_sees_one_array_layout(reports):
    """Strided and read-only arrays are other types and would compile again."""
    assert not {k["name"]: k["layouts"] for k in reports[1] if len(k["layouts"]) > 1}


@compiled
@pytest.mark.long
def test_every_kernel_was_compiled_by_the_runs_above(reports):
    """Else the tests above would pass a kernel that they never saw."""
    assert not [k["name"] for k in reports[1] if not k["signatures"]]


@compiled
@pytest.mark.long
def test_the_warm_up_leaves_nothing_to_compile(reports):
    before, after = (entry_points(r) for r in reports)
    assert not {name for name in after if after[name]["signatures"] != before[name]["signatures"]}


RUN = """
import sys, warnings
warnings.simplefilter("error")
import spte
from spte._numba import jit as _jit
assert spte.__file__.startswith({copy!r}), spte.__file__
vm = spte.VM("npt")
vm.set_memory_region(0, 0, 1 << 22, spte.Backing("thp", 1 << 22))
vm.vcpus[0].write(range(8))
cached = [k.entry for k in _jit.KERNELS if k.entry is not None]
hits = sum(sum(k.stats.cache_hits.values()) for k in cached)
misses = sum(sum(k.stats.cache_misses.values()) for k in cached)
print(hits, misses, vm.leafs()[0][1:3])
"""


WARNINGS = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import spte
assert spte.__file__.startswith({copy!r}), spte.__file__
print(len(seen), 0, seen[0].message)
"""


def run_copy(copy, cache, code=RUN):
    env = {**os.environ, "PYTHONPATH": str(copy), "SPTE_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code.format(copy=str(copy))],
        env=env,
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, misses, leaf = done.stdout.split(maxsplit=2)
    return int(hits), int(misses), leaf.strip()


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "spte", tmp_path / "copy" / "spte", ignore=shutil.ignore_patterns("__pycache__", "data"))
    return tmp_path / "copy"


@compiled
@pytest.mark.long
def test_the_cache_is_hit_and_an_edit_of_another_source_file_is_seen(copy, tmp_path):
    cache = tmp_path / "cache"
    hits, misses, first = run_copy(copy, cache)
    assert hits == 0
    assert misses > 0

    (copy / "spte" / "notes.txt").write_text("no source")
    hits, misses, again = run_copy(copy, cache)
    assert hits > 0
    assert (misses, again) == (0, first)

    # numba stamps only the file of the kernel itself; what a helper in another file does must still be seen.
    host = copy / "spte" / "host" / "pages.py"
    text = host.read_text()
    edited = text.replace("return np.int64(3 if h.kinds[hpage >> 9] == HUGETLB_1G else 2)", "return np.int64(1)")
    assert edited != text
    host.write_text(edited)
    hits, misses, second = run_copy(copy, cache)
    assert misses > 0
    assert second != first


MANY_KERNELS = """
import spte
vm = spte.VM("ept-pml-rmap")
vm.set_memory_region(0, 0, 2 << 20, spte.Backing("thp", 2 << 20))
vm.vcpus[0].write(range(50))
assert vm.vcpus[0].prefault(0, 2 << 20) == (2 << 20, 0)
vm.check()
"""


@compiled
@pytest.mark.long
def test_kernels_compiled_one_after_the_other_call_each_its_own_parts(tmp_path):
    """LLVM takes other arguments from a part in each kernel: with the other's part, this crashed the process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SPTE_CACHE_DIR": str(tmp_path)}
    for _ in ("compiled", "from the cache"):
        done = subprocess.run([sys.executable, "-c", MANY_KERNELS], env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def path_of(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(tree):
    """{name: module of the package that it comes from, or that it is}."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "spte":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = inner if path_of(inner).exists() else node.module
    return found


def kernels_in(tree):
    """Functions with a decorator of the module that knows numba."""
    makers = {name for name, module in imports(tree).items() if module == "spte._numba.jit"}
    return [f for f in tree.body if isinstance(f, ast.FunctionDef) and makers & {d.id for d in f.decorator_list if isinstance(d, ast.Name)}]


def kernel_sources():
    """Modules with kernels, and those whose names stand in a kernel, or in a constant that may."""
    found, todo = {}, [path for path in (ROOT / "spte").rglob("*.py") if kernels_in(ast.parse(path.read_text()))]
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = tree = ast.parse(path.read_text())
            compiled = [*kernels_in(tree), *(n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign))]
            names = {n.id for part in compiled for n in ast.walk(part) if isinstance(n, ast.Name)}
            todo += [path_of(module) for name, module in imports(tree).items() if name in names]
    return sorted(path.relative_to(ROOT / "spte").as_posix() for path in found)


def test_kernels_are_made_of_sources_in_many_folders():
    """Else the next test would look at few of them."""
    folders = {Path(name).parts[0] for name in kernel_sources()}
    assert {"_numba", "arrays", "bits.py", "cpu", "host", "kernels", "mmu", "observe"} <= folders


@compiled
@pytest.mark.parametrize("name", kernel_sources())
def test_the_cache_key_covers_every_source_that_kernels_are_made_of(name, monkeypatch, copy):
    """Column numbers, masks and helpers are compiled into kernels wherever they are written down."""
    monkeypatch.setattr(_jit, "HERE", copy / "spte")
    before = _jit._digest()
    with (copy / "spte" / name).open("a") as source:
        source.write("\nEDITED = True\n")
    assert _jit._digest() != before


@compiled
def test_machine_code_for_blocks_of_another_size_lies_under_another_key(monkeypatch):
    """Also where NUMBA_CPU_NAME makes machine code of one CPU for all: arrays have the size of the block."""
    before = _jit._digest()
    monkeypatch.setattr(_jit, "PREFETCHES", _jit.PREFETCHES // 2)
    assert _jit._digest() != before


@compiled
def test_an_unwritable_cache_costs_one_warning(copy, tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("not a directory")
    count, _, message = run_copy(copy, blocked, WARNINGS)
    assert count == 1
    assert "SPTE_CACHE_DIR" in message
    assert str(blocked) in message


@compiled
def test_bit_operations_equal_their_plain_twins():
    import numba

    rng = np.random.default_rng(5)
    words = rng.integers(1, 1 << 63, 200, dtype=np.uint64) << rng.integers(0, 64, 200, dtype=np.uint64)
    words = words[words != 0]

    @numba.njit
    def both(x):
        return _jit.ctz(x), _jit.popcount(x)

    got = [both(word) for word in words]
    assert got == [((int(w) & -int(w)).bit_length() - 1, int(w).bit_count()) for w in words]
