"""The documents say what is there: paths exist, every folder is named."""

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
