"""House rules that a machine can hold: floors, jit in one place, docstrings, no prints, small files, no paths."""

import ast
import dataclasses
import inspect
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spte"
MAX_LINES = 320

# Floor of each module or subpackage below `spte`; imports point down or stay on the floor.
FLOORS = {
    "_version": 0, "errors": 0, "exits": 0, "_numba": 0, "trace": 0,
    "platform": 1, "policy": 1, "bits": 2,
    "arrays": 3, "kernels": 4, "host": 5, "mmu": 6,
    "cpu": 7, "guest_tables": 7, "observe": 7,
    "vm": 8, "mm": 8, "warm": 8,
    "recording": 9, "record": 9, "replay": 10, "check": 10, "patches": 10, "profile": 10, "limits": 10,
    "cli": 11,
}  # fmt: skip
TOP = 12  # `spte` itself re-exports the public names and may import all but the command line


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
    """Dotted names of the modules that the file imports, inside functions too."""
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


def test_the_library_does_not_import_the_command_line():
    assert not [dotted(p) for p in sources() if "cli" not in p.parts and any("spte.cli" in name for name in imports_of(p))]


def test_kernel_families_do_not_import_each_other():
    """They may share argument checks (`_plain`), no more: what two share moves down."""
    files = [p for p in sources() if p.parent.name == "kernels" and p.name != "__init__.py"]
    assert files
    assert not [(p.name, name) for p in files for name in imports_of(p) if re.match(r"spte\.kernels\.[a-z]", name)]


def test_only_two_modules_know_numba():
    users = {dotted(p) for p in sources() if any(n.split(".")[0] in ("numba", "llvmlite") for n in imports_of(p))}
    assert users == {"spte._numba.jit", "spte._numba.link"}
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


def test_kernels_take_their_masks_from_the_bit_layout():
    """In a kernel a bare wide mask is signed, or no number at all."""
    shifts = [
        f"{dotted(p)}:{n.lineno}"
        for p in sources()
        if p.parent.name == "kernels"
        for n in ast.walk(parse(p))
        if isinstance(n, ast.BinOp) and isinstance(n.op, ast.BitAnd | ast.BitOr) and is_wide_literal(n.right)
    ]
    assert not shifts


def is_wide_literal(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value > 0xFFFF_FFFF


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
            for attr, member in vars(thing).items():
                if not attr.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod | staticmethod)):
                    yield f"{name}.{attr}", getattr(thing, attr)
        elif callable(thing):
            yield name, thing


def parameters(thing):
    thing = getattr(thing, "py_func", thing)
    if inspect.isclass(thing) and issubclass(thing, BaseException):
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
