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
