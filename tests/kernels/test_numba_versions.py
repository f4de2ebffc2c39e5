"""The oldest and the newest numba and NumPy that `pyproject.toml` allows, and kernels that numba compiles without `spte._numba.link`."""

import ast
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from spte._numba import jit as _jit

ROOT = Path(__file__).parents[2]
LINK = ROOT / "spte" / "_numba" / "link.py"
compiled = pytest.mark.skipif(_jit.PLAIN, reason="kernels are plain Python in this lane")
RUNNER = ("pytest>=8.0", "hypothesis>=6.100")
SMALL_SET = (
    "tests/kernels/test_kernel_twins.py",
    "tests/verbs/test_profile.py::test_every_platform_and_policy_reports_exactly_what_was_written",
    "tests/recording/test_golden.py::test_the_model_does_what_kvm_did[6.12-intel-pml/06-thp-manual1.jsonl]",
)
ABOUT = "import numba, numpy; from spte._numba import jit; print(numba.__version__, numpy.__version__, jit.LINK is not None)"


def requirements(newest):
    """What pyproject.toml asks for: as it stands there, or each at its lower bound."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert all(r.count(">=") == 1 and r.split(">=")[0].isalpha() for r in asked)
    return asked if newest else [r.replace(">=", "==") for r in asked]


def run(python, *argv, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([python, *argv], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def small_set(python, cache, **env):
    """Run it, and return the versions of numba and NumPy, and whether `link` is used."""
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SMALL_SET, SPTE_CACHE_DIR=str(cache), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
    return run(python, "-W", "error", "-c", ABOUT, SPTE_CACHE_DIR=str(cache), **env).stdout.split()


def environment(where, packages):
    """Make one with `packages`; return its Python. It is skipped only where the registry can not be reached, and never in CI."""
    subprocess.run([sys.executable, "-m", "venv", where], check=True)
    python = str(Path(where) / "bin" / "python")
    done = run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages, *RUNNER)
    if done.returncode and "connection" in done.stderr.lower() and "CI" not in os.environ:
        pytest.skip(f"needs a package registry for {', '.join(packages)}")
    assert done.returncode == 0, done.stderr
    return python


@compiled
@pytest.mark.long
@pytest.mark.parametrize("newest", [False, True], ids=["oldest", "newest"])
def test_the_oldest_and_the_newest_numba_and_numpy_pass_the_small_set(newest, tmp_path):
    packages = requirements(newest)
    with tempfile.TemporaryDirectory(dir=tmp_path) as where:  # half a gigabyte that no later look needs
        *versions, linked = small_set(environment(where, packages), tmp_path / "cache")
    assert linked == "True"
    if not newest:
        oldest = dict(r.split("==") for r in packages)
        assert [v.removesuffix(".0") for v in versions] == [oldest["numba"], oldest["numpy"]]


@compiled
@pytest.mark.long
def test_kernels_that_numba_compiles_by_itself_pass_the_small_set(tmp_path):
    assert small_set(sys.executable, tmp_path, SPTE_LINK="0")[-1] == "False"


WITHOUT = """
import warnings
import numba, {module}
del {owner}.{name}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from spte._numba import jit
assert jit.LINK is None
print(*[str(w.message) for w in seen], sep="\\n")
"""


@compiled
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("numba.core.typed_passes", "numba.core.typed_passes", "NativeLowering"),
        ("numba.core.base", "numba.core.base.BaseContext", "insert_user_function"),
        ("numba.core.codegen", "numba.core.codegen.CPUCodeLibrary", "__init__"),
    ],
)
def test_a_numba_without_a_name_that_link_needs_costs_one_warning_unless_it_is_asked_for(module, owner, name, tmp_path):
    code = WITHOUT.format(module=module, owner=owner, name=name)
    done = run(sys.executable, "-c", code, SPTE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "SPTE_LINK=0" in line
    assert ("_linking_libraries" if name == "__init__" else name) in line
    done = run(sys.executable, "-c", code, SPTE_CACHE_DIR=str(tmp_path), SPTE_LINK="0")
    assert (done.returncode, done.stdout.strip()) == (0, "")


@compiled
def test_another_value_of_spte_link_is_refused_with_it():
    done = run(sys.executable, "-c", "import spte", SPTE_LINK="maybe")
    assert done.stderr.splitlines()[-1].startswith("ValueError: SPTE_LINK=maybe; take 1, or 0")


@compiled
def test_machine_code_with_and_without_link_lies_under_two_keys(monkeypatch):
    keys = set()
    for link in (None, object()):
        monkeypatch.setattr(_jit, "LINK", link)
        keys.add(_jit._digest())
    assert len(keys) == 2


def test_link_lists_every_private_name_that_it_needs():
    """In its docstring for the reader, in `NEEDS` for the check at import; nothing else begins with an underscore."""
    from spte._numba import link

    tree = ast.parse(LINK.read_text())
    own = {"_options", "_name", "_replace"}
    named = {n.attr if isinstance(n, ast.Attribute) else n.name for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.FunctionDef)}
    listed = {name for names in link.NEEDS.values() for name in names} | set(link.NEEDS_SET)
    private = {name for name in named if name.startswith("_") and not name.endswith("__")} - own
    assert private - {"_require"} <= listed
    assert listed <= named
    assert not [name for name in listed if f"``{name}``" not in link.__doc__]
