"""Cost profiles: what ships can be read, every number says where it is from, and a wrong file is refused in one line."""

import dataclasses
import re

import pytest

from spte.cost import CostError, CostProfile, Costs, Origin, dump, load, names
from spte.cost.costs import ITEMS
from spte.cost.files import FOLDER


@pytest.fixture
def text():
    return (FOLDER / "guess.toml").read_text()


@pytest.fixture
def refused(tmp_path):
    def run(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        with pytest.raises(CostError) as error:
            load(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        return str(error.value)

    return run


@pytest.mark.parametrize("name", names())
def test_every_profile_that_ships_has_all_costs_with_band_and_origin(name):
    profile = load(name)
    for item in ITEMS:
        low, ns, high = (getattr(costs, item) for costs in (profile.low, profile.costs, profile.high))
        assert 0 <= low <= ns <= high
        origin = profile.origins[item]
        assert origin.source
        assert origin.guess or (origin.date and origin.machine)


def test_of_the_guesses_the_exit_alone_is_measured():
    assert load("guess").guesses == tuple(item for item in ITEMS if item != "exit")


@pytest.mark.parametrize("name", names())
def test_a_profile_written_reads_back_as_it_was(name, tmp_path):
    path = tmp_path / "again.toml"
    path.write_text(dump(load(name)))
    assert dataclasses.replace(load(path), name=name) == load(name)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(CostError, match=re.escape(", ".join(names()))):
        load("skylark")


def test_what_is_no_toml_is_refused(refused):
    assert "no TOML" in refused("exit = [")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[exit]", "[exits]", "'exits' is no cost"),
        ("ns = 683", "ns = -1", "exit: ns=-1 is no time"),
        ("ns = 683", "ns = 'a lot'", "exit: ns='a lot' is no time"),
        ("high = 1500", "high = 1e301", "exit: high=1e+301 is no time of one item; take nanoseconds, 0 to 1000000000"),
        ("ns = 683", "ns = nan", "exit: ns=nan is no time"),
        ("ns = 683", "ns = true", "exit: ns=True is no time"),
        ("ns = 683", "ns = 6830", "ns=6830 is not within low=500 and high=1500"),
        ("ns = 683\n", "", "exit: ns missing"),
        ("ns = 683\n", "ns = 683\nmean = 3\n", "exit: 'mean' is not known"),
        ("guess = true", "guess = false", "fast_fault: date, machine missing"),
        ('date = "2011"\n', "", "exit: date missing"),
        ("guess = true", "guess = 1", "guess=1; take true or false"),
        ("title = ", "name = ", "title=None"),
        ('date = "2011"', "date = 2011-01-01", "exit: date=datetime.date(2011, 1, 1) is no text"),
    ],
)
def test_a_wrong_file_is_refused_with_the_value_and_the_way_out(text, refused, old, new, said):
    assert old in text
    assert said in refused(text.replace(old, new, 1))


def test_a_missing_cost_is_named(text, refused):
    start = text.index("# a leaf dropped")
    assert "zap missing" in refused(text[:start] + text[text.index("\n\n", start) + 2 :])


def test_a_cost_that_is_no_table_is_refused(text, refused):
    start = text.index("[walk_2d]")
    assert "walk_2d=3 is no table" in refused(text[: text.index("\n") + 1] + "walk_2d = 3\n" + text[text.index("\n") : start])


def test_costs_by_hand_are_checked_too():
    values = dict.fromkeys(ITEMS, 1.0)
    with pytest.raises(CostError, match="exit=-2"):
        Costs(**(values | {"exit": -2}))
    costs = Costs(**values)
    origins = {item: Origin("nobody", guess=True) for item in ITEMS}
    with pytest.raises(CostError, match="zap: ns="):
        CostProfile("mine", "mine", costs, dataclasses.replace(costs, zap=3), costs, origins)
    with pytest.raises(CostError, match="zap has no origin"):
        CostProfile("mine", "mine", costs, costs, costs, {k: v for k, v in origins.items() if k != "zap"})
