"""The documents say what is there: paths exist, every folder is named."""

import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_path_in_the_architecture_exists():
    paths = re.findall(r"`((?:spte|tests)/[\w/.]*)`", ARCHITECTURE)
    assert len(paths) > 40
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_folder_is_in_the_architecture():
    folders = {path.parent for path in (ROOT / "spte").rglob("*") if path.suffix in (".py", ".npz")}
    rows = set(re.findall(r"^\| `(spte/[\w/]*)` \|", ARCHITECTURE, re.MULTILINE))
    assert rows == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


def resolves(name):
    """Whether a dotted name is a module of the package, or in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_name_of_the_package_that_a_text_gives_exists():
    texts = [*(ROOT / "spte").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {name: path.name for path in texts for name in re.findall(r"`(spte(?:\.\w+)+)", path.read_text())}
    assert len(named) > 10
    assert {name: where for name, where in named.items() if not resolves(name)} == {}


def python_of(name):
    """The Python code that a document shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)


def test_the_reaper_of_the_dirty_ring_is_short_and_works_as_printed():
    reaper, use = python_of("dirty_ring.md")
    assert reaper.startswith("def reap(")
    assert len(reaper.splitlines()) <= 15
    names = {}
    exec(compile(reaper + use, "dirty_ring.md", "exec"), names)
    vm, vcpu, fetched = names["vm"], names["vcpu"], names["fetched"]
    vcpu.write([7, 9])
    assert names["reap"](vm, fetched) == {0: {7, 9}}
    assert names["reap"](vm, fetched) == {}
    assert fetched == {0: int(vcpu.arrays.vcpu[0].dirty_index)}
