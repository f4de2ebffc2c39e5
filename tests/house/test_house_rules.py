"""House rules that a machine can hold: floors, jit in one place, docstrings, no prints, small files, no paths."""

import ast
import dataclasses
import enum
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spte.cli.app import VERBS as COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spte"
MAX_LINES, MAX_FILES = 320, 13

# Floor of each module or subpackage below `spte`; imports point down or stay on the floor.
FLOORS = {
    "_version": 0, "_arguments": 0, "_files": 0, "errors": 0, "access": 0, "exits": 0, "_numba": 0,
    "platform": 1, "policy": 1, "trace": 1, "bits": 2, "kernel_bits": 2,
    "arrays": 3, "kernels": 4, "host": 5, "mm": 5, "mmu": 6,
    "cpu": 7, "guest_tables": 7, "observe": 7,
    "vm": 8, "warm": 8,
    "recording": 9, "record": 9, "cost": 9,
    "replay": 10, "check": 10, "patches": 10, "profile": 10, "limits": 10, "convert": 10, "generate": 10,
    "devkvm": 10, "calibrate": 10,
    "migrate": 10, "sweep": 10, "papers": 11, "diff": 11,
    "cli": 12,
}  # fmt: skip
TOP = 13  # `spte` itself re-exports the public names and may import all but the command line


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path):
    return ast.parse(path.read_text(), str(path))


def exists(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of(path):
    """Dotted names of the modules that the file imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if exists(name) else node.module


def floor_of(name):
    """Floor of a module of the package; None if the table does not know it."""
    if name == "spte":
        return TOP
    return FLOORS.get(name.split(".")[1])


def test_every_module_has_a_floor():
    assert not [dotted(p) for p in sources() if floor_of(dotted(p)) is None]


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_imports_point_down(path):
    mine = floor_of(dotted(path))
    assert mine is not None, "give the module a floor"
    up = [name for name in imports_of(path) if name.split(".")[0] == "spte" and (floor_of(name) or 0) > mine]
    if dotted(path) != "spte":
        top = [name for name in up if name != "spte"]
        assert not top, f"{dotted(path)} (floor {mine}) imports {top}"
        assert "spte" not in up or mine >= 6, f"{dotted(path)} imports the package's own top"


def cycle_in(graph):
    """A list of modules that import each other in a circle, the first one again at its end; empty if there is none."""
    done = set()

    def visit(name, above):
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for imported in sorted(graph[name]):
                if found := visit(imported, [*above, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    known = {dotted(p) for p in sources()}
    graph = {dotted(p): {name for name in imports_of(p) if name in known} for p in sources()}
    assert graph["spte.vm.vm"] >= {"spte.vm.kvm", "spte.vm.vcpu"}
    assert not cycle_in(graph)
    hidden = {**graph, "spte.errors": {"spte.vm.vm"}}  # however long the way round is, it is found
    assert {"spte.errors", "spte.vm.vm"} <= set(cycle_in(hidden))


@pytest.mark.parametrize("folder", sorted({p.parent for p in sources()}), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_folders_stay_small(folder):
    limit = len(COMMANDS) + 1 if folder.name == "verbs" else MAX_FILES  # there one module a verb, and no other
    assert len(list(folder.glob("*.py"))) <= limit


def test_the_library_does_not_import_the_command_line():
    assert not [dotted(p) for p in sources() if "cli" not in p.parts and any("spte.cli" in name for name in imports_of(p))]


VERBS = (
    "recording", "replay", "check", "devkvm", "calibrate", "patches", "cost", "profile", "papers", "diff", "limits", "convert", "generate",
    "migrate", "sweep", "cli",
)  # fmt: skip


def test_import_spte_loads_no_verb():
    code = f"import sys, spte; print([m for m in sys.modules if m.split('.')[:2] in {[['spte', verb] for verb in VERBS]}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all((PACKAGE / verb / "__init__.py").exists() for verb in VERBS)


KERNEL_FAMILIES = {"_write_protect", "_clear_dirty", "_harvest", "_pml_flush", "_split", "_collapse"}
SHARED_BY_KERNELS = {"_bitmap", "_check", "_entries", "_layout"}


def test_kernel_families_do_not_import_each_other():
    """What two share lies below both, and imports no family either."""
    files = [p for p in sources() if p.parent.name == "kernels" and p.name != "__init__.py"]
    assert {p.stem for p in files} == KERNEL_FAMILIES | SHARED_BY_KERNELS
    within = [(p.stem, name.removeprefix("spte.kernels.")) for p in files for name in imports_of(p) if name.startswith("spte.kernels")]
    assert not [(user, used) for user, used in within if used not in SHARED_BY_KERNELS]


def test_the_page_size_is_defined_once():
    from spte.bits import SHIFT_PAGE
    from spte.platform import PAGE_SIZE

    assert 1 << int(SHIFT_PAGE) == PAGE_SIZE
    assigned = [
        dotted(p)
        for p in sources()
        for n in parse(p).body
        if isinstance(n, ast.Assign | ast.AnnAssign)
        for v in ([*n.value.elts] if isinstance(n.value, ast.Tuple) else [n.value])
        if isinstance(v, ast.Constant) and v.value == PAGE_SIZE
    ]
    assert assigned == ["spte.platform"]


def test_only_one_folder_knows_numba():
    users = {dotted(p) for p in sources() if any(n.split(".")[0] in ("numba", "llvmlite") for n in imports_of(p))}
    assert users == {"spte._numba.atomics", "spte._numba.jit", "spte._numba.link"}
    options = re.compile(r"\b(njit|nogil|fastmath|error_model|boundscheck)\b")
    assert not [dotted(p) for p in sources() if dotted(p) != "spte._numba.jit" and options.search(code_of(p))]


def code_of(path):
    """Source without docstrings and comments."""
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def calls(path, name):
    return [n.lineno for n in ast.walk(parse(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


@pytest.mark.parametrize("path", [p for p in sources() if "cli" not in p.parts], ids=dotted)
def test_the_library_never_prints(path):
    assert not calls(path, "print")
    assert "sys.stdout" not in code_of(path)
    assert "sys.stderr" not in code_of(path)


@pytest.mark.parametrize("path", sources(), ids=dotted)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def public_api():
    import spte

    for name in spte.__all__:
        thing = getattr(spte, name)
        if inspect.ismodule(thing):
            for inner in getattr(thing, "__all__", ()):
                yield f"{name}.{inner}", getattr(thing, inner)
        else:
            yield name, thing


def documented():
    """Public callables: functions, classes, and the public methods of classes defined here."""
    for name, thing in public_api():
        if inspect.isclass(thing):
            yield name, thing
            own = [owner for owner in thing.__mro__ if owner.__module__.startswith("spte.")]
            for attr, member in (pair for owner in own for pair in vars(owner).items()):
                if not attr.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod | staticmethod)):
                    yield f"{name}.{attr}", getattr(thing, attr)
        elif callable(thing):
            yield name, thing


def parameters(thing):
    thing = getattr(thing, "py_func", thing)
    if inspect.isclass(thing) and issubclass(thing, BaseException | enum.Enum):
        return []
    told = {f.name for f in dataclasses.fields(thing) if "doc" in f.metadata} if dataclasses.is_dataclass(thing) else set()
    return [p for p in inspect.signature(thing).parameters if p not in {"self", "cls", "args", "kwargs"} | told]


@pytest.mark.parametrize(("name", "thing"), [pytest.param(n, t, id=n) for n, t in documented()])
def test_public_docstrings_name_every_parameter(name, thing):
    doc = inspect.getdoc(getattr(thing, "py_func", thing))
    assert doc, f"{name} has no docstring"
    missing = [p for p in parameters(thing) if not re.search(rf"(^|[\s`,*]){re.escape(p)}([\s`,:.]|$)", doc)]
    assert not missing, f"{name}: the docstring does not name {missing}"


def tracked_texts():
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".cfg", ".yml", ".yaml", ".txt", ".sh", ""):
            yield name, path.read_text(errors="replace")


def test_no_file_names_a_place_on_one_machine():
    here = re.compile(r"(?<![\w.$}>])/" + r"(work|tmp|home|root)/")
    assert not [(name, m.group()) for name, text in tracked_texts() for m in [here.search(text)] if m]


def test_no_file_reaches_outside_the_repository():
    outside = re.compile(r"\.\./" + "shared")
    assert not [name for name, text in tracked_texts() if outside.search(text)]
