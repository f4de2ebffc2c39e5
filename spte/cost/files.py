"""Cost profiles as TOML: a title, and for each item a table with ns, low, high and where the number is from.

    title = "a machine, and by what"

    [exit]
    ns = 700
    low = 500
    high = 1500
    source = "where the number is from"
    date = "2021-12"
    machine = "what it was measured on"

A guess has `guess = true` in place of date and machine; its source then says what it leans on.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spte.cost.costs import ITEMS, CostError, CostProfile, Costs, Origin, check_time

FOLDER = Path(__file__).parent.parent / "data" / "costs"
SUFFIX = ".toml"
_NUMBERS, _TEXTS = ("ns", "low", "high"), ("source", "date", "machine")


def names() -> tuple[str, ...]:
    """Return the names of the cost profiles that ship in the package, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def load(name: str | Path) -> CostProfile:
    """Return a cost profile that ships in the package, or one from a file.

    Parameters
    ----------
    name : str or Path
        One of `names`, or the path of a TOML file.

    Returns
    -------
    CostProfile
        Its costs, their bands and origins.

    Raises
    ------
    CostError
        No such profile; not TOML; an item unknown, missing, negative, above 1 s, no number, outside its band, or without a source.
    """
    shipped, path = names(), Path(name)
    if str(name) in shipped:
        path = FOLDER / f"{name}{SUFFIX}"
    elif not path.is_file():
        raise CostError(f"there is no cost profile {str(name)!r}; take one of {', '.join(shipped)}, or a TOML file")
    try:
        return _profile(str(name), tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CostError(f"{name}: this is no TOML: {' '.join(str(error).split())}; see the profiles that ship") from None


def _profile(name: str, data: Mapping[str, Any]) -> CostProfile:
    title = data.get("title")
    if not isinstance(title, str) or not title.strip():
        raise CostError(f"{name}: title={title!r}; give one line that names the machine")
    tables = {key: table for key, table in data.items() if key != "title"}
    for key in tables:
        if key not in ITEMS:
            raise CostError(f"{name}: {key!r} is no cost; take one of {', '.join(ITEMS)}")
    if missing := [item for item in ITEMS if item not in tables]:
        raise CostError(f"{name}: {', '.join(missing)} missing; give each, with guess = true if it is not known")
    for item, table in tables.items():
        _check(f"{name}: {item}", table)
    costs, low, high = (Costs(**{item: tables[item][column] for item in ITEMS}) for column in _NUMBERS)
    origins = {item: Origin(**{key: value for key, value in tables[item].items() if key not in _NUMBERS}) for item in ITEMS}
    return CostProfile(name, title, costs, low, high, origins)


def _check(where: str, table: Any) -> None:
    if not isinstance(table, dict):
        raise CostError(f"{where}={table!r} is no table; give ns, low, high and source")
    for key, value in table.items():
        if key not in (*_NUMBERS, *_TEXTS, "guess"):
            raise CostError(f"{where}: {key!r} is not known; take {', '.join((*_NUMBERS, *_TEXTS))}, guess")
        if key in _NUMBERS:
            check_time(f"{where}: {key}", value)
        if key in _TEXTS and not isinstance(value, str):
            raise CostError(f"{where}: {key}={value!r} is no text; put it in quotes")
        if key == "guess" and not isinstance(value, bool):
            raise CostError(f"{where}: guess={value!r}; take true or false")
    needed = (*_NUMBERS, "source") if table.get("guess") else (*_NUMBERS, *_TEXTS)
    if missing := [key for key in needed if not table.get(key) and table.get(key) != 0]:
        raise CostError(f"{where}: {', '.join(missing)} missing; a number that nobody measured has guess = true")


def dump(profile: CostProfile) -> str:
    """Return `profile` as the text of a TOML file that `load` reads."""
    lines = [f"title = {_quoted(profile.title)}"]
    columns = dict(zip(_NUMBERS, (profile.costs, profile.low, profile.high), strict=True))
    for item, about in ITEMS.items():
        origin = profile.origins[item]
        lines += ["", f"# {about}", f"[{item}]"]
        lines += [f"{key} = {_number(getattr(costs, item))}" for key, costs in columns.items()]
        lines += [f"{key} = {_quoted(text)}" for key in _TEXTS if (text := getattr(origin, key))]
        lines += ["guess = true"] * origin.guess
    return "\n".join(lines) + "\n"


def _number(ns: float) -> str:
    return f"{ns:.4g}" if ns < 1e4 else f"{ns:.0f}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a basic string of TOML has JSON's escapes
