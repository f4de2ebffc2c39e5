"""The settings of a migration as options, and as axes of a grid or a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from spte.cli.params import bandwidth, duration, rate, refuse_too_large, size, spell_bandwidth, spell_size, spell_time
from spte.cost import CostError
from spte.cost import names as cost_names
from spte.migrate.plan import AFTER, LOGS, THROTTLES, MigrateError, Plan
from spte.migrate.settings import DEFAULTS, plan_of
from spte.platform import named
from spte.policy import parse
from spte.profile.workload import BACKINGS, ORDERS, WorkloadError
from spte.trace import TraceError

MAX_POINTS = 100_000
BYTES_PER_PAGE = 9 + 2 * 4 + 8 + 8
"""Memory of a guest here: its SPTE and bits, two versions, when it is read, its number in what is sent."""


class Setting(NamedTuple):
    """One setting: its option, its key, how text becomes a value and back, and what it is."""

    option: str
    key: str
    parse: Callable[[str], Any]
    spell: Callable[[Any], str]
    doc: str


def _choice(*choices: str) -> Callable[[str], str]:
    def one(text: str) -> str:
        if text not in choices:
            raise click.BadParameter(f"{text[:40]!r}; take one of {', '.join(choices)}")
        return text

    return one


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text[:40]!r} is no whole number") from None


def _platform(text: str) -> str:
    return named(text).name


def _policy(text: str) -> str:
    parse(text)
    return text


def _yes(text: str) -> bool:
    return _choice("yes", "no")(text) == "yes"


def _spell_yes(value: bool) -> str:
    return "yes" if value else "no"


def _spell_ns(ns: int) -> str:
    return spell_time(ns / 1e9)


SETTINGS = (
    Setting("bandwidth", "bandwidth", bandwidth, spell_bandwidth, "Link, such as 10Gbit or 500MB/s."),
    Setting("downtime", "downtime_ns", duration, _spell_ns, "Longest time that the guest may stand still."),
    Setting("fixed-downtime", "fixed_ns", duration, _spell_ns, "Part of it that no page takes: devices, and the start over there."),
    Setting("platform", "platform", _platform, str, "As `spte profile` takes it."),
    Setting("policy", "policy", _policy, str, "Kernel version, single decisions replaced, such as 6.12,eager_page_split=N."),
    Setting("log", "log", _choice(*LOGS), str, f"How dirty pages are learned: {', '.join(LOGS)}."),
    Setting("clear-chunk", "chunk_pages", _number, str, "Pages of one CLEAR, with --log manual or initially-set."),
    Setting("ring", "ring_bytes", size, spell_size, "Dirty ring of each vCPU, with --log ring."),
    Setting("throttle", "throttle", _choice(*THROTTLES), str, f"One of {', '.join(THROTTLES)}, with QEMU's defaults and steps."),
    Setting("vcpu-dirty-limit", "vcpu_dirty_limit", rate, lambda n: f"{n / 1e6:.4g} MB/s", "What dirty-limit lets each vCPU dirty."),
    Setting("cost", "cost", str, lambda name: name or "free", f"Costs of what is counted: {', '.join(cost_names())}, or a TOML file."),
    Setting("after", "after", _choice(*AFTER), str, f"At its end the trace goes on: {' or '.join(AFTER)}."),
    Setting("stop-at", "stop_ns", duration, _spell_ns, "When the guest stops writing."),
    Setting("max-time", "max_ns", duration, _spell_ns, "When the migration is cancelled."),
    Setting("nested", "nested", _yes, _spell_yes, "yes: L2 does the writing."),
    Setting("vcpus", "vcpus", _number, str, "vCPUs; a trace's 2 MiB regions are dealt to them in turn."),
    Setting("backing", "backing", _choice(*BACKINGS), str, "Host memory."),
    Setting("memory", "memory", size, spell_size, "Guest memory, a multiple of 2M; by default the trace's, or 1G."),
    Setting("rate", "rate", rate, lambda n: f"{n / 1e6:.4g} MB/s", "What --workload stress writes."),
    Setting("order", "order", _choice(*ORDERS), str, "Order of the writes inside an epoch."),
    Setting("seed", "seed", _number, str, "Seed of that order."),
)
BY_OPTION = {setting.option: setting for setting in SETTINGS}
BY_KEY = {setting.key: setting for setting in SETTINGS}


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting; the command gets their values by key, those not given as None."""
    for setting in reversed(SETTINGS):
        default = DEFAULTS[setting.key]
        told = "" if default is None else f"  [default: {setting.spell(default)}]"
        if setting.key == "nested":
            command = click.option("--nested", is_flag=True, default=None, help="L2 does the writing.")(command)
            continue
        command = click.option(f"--{setting.option}", setting.key, type=setting.parse, metavar="VALUE", help=setting.doc + told)(command)
    return command


def axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Return the key and the values of an axis, spelled ``option=value,value``."""
    option, _, values = text.partition("=")
    if option not in BY_OPTION or not values:
        raise click.BadParameter(f"{text[:60]!r}; take OPTION=VALUE,VALUE, OPTION one of {', '.join(BY_OPTION)}")
    setting, parts = BY_OPTION[option], values.split(",")
    if option == "policy":  # 6.12,eager_page_split=N is one value
        parts = [",".join((head, *more)) for head, more in _heads(parts)]
    return setting.key, tuple(dict.fromkeys(setting.parse(part) for part in parts))


def _heads(parts: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for part in parts:
        if "=" in part and found:
            found[-1][1].append(part)
        else:
            found.append((part, []))
    return found


def combinations(axes: Sequence[tuple[str, tuple[Any, ...]]], base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of every combination of the values of `axes`, the last one running fastest, each with `base` below.

    All are checked.
    """
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1 or key in base:
            raise click.UsageError(f"--{name_of(key)} is given twice; name all its values in one place")
    points = [{**base, **dict(zip(keys, values, strict=True))} for values in itertools.islice(
        itertools.product(*(values for _, values in axes)), MAX_POINTS + 1)]  # fmt: skip
    if len(points) > MAX_POINTS:
        raise click.UsageError(f"more than {MAX_POINTS} combinations; name fewer values")
    for point in points:
        check(point)
    return points


def check(settings: Mapping[str, Any]) -> Plan:
    """Return the `Plan` of `settings`, or refuse them in one line."""
    try:
        plan = plan_of(settings)
    except (MigrateError, WorkloadError, TraceError, CostError) as error:
        raise click.UsageError(str(error)) from None
    refuse_too_large(plan.workload.npages, BYTES_PER_PAGE)
    return plan


def name_of(key: str) -> str:
    """Return the name of a setting as its option has it."""
    return BY_KEY[key].option if key in BY_KEY else key


def spelled(key: str, value: Any) -> str:
    """Return a value of a setting as tables show it."""
    return BY_KEY[key].spell(value) if key in BY_KEY and value is not None else str(value)
