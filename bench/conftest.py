"""Guests and the comparison of a kernel with its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bench.report import time_of
from spte.limits import cases as ratios
from spte.limits.measure import Case, Guest, limit_seconds, ratio_of

ROUNDS, SMALL_ROUNDS = 5, 25  # a small guest's rounds are short, and need more of them to find a quiet one
SMALL = (32 << 30) >> 12  # pages
SIZES, SIZE_AS_TEST = "4G,32G,256G,1T", "256M"
UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
HUGE_PAGE = 2 << 20


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"guest memory, multiples of 2 MiB; default: {SIZES}, with --benchmark-disable {SIZE_AS_TEST}"
    parser.addoption("--guest", metavar="SIZE[,SIZE...]", help=text)


def guest_pages(text: str) -> int:
    """Return the 4 KiB pages of a size such as 256M."""
    number, unit = text[:-1], UNITS.get(text[-1:].upper())
    if unit is None or not number.isdigit() or int(number) == 0 or int(number) * unit % HUGE_PAGE:
        raise pytest.UsageError(f"--guest {text}: give multiples of 2 MiB as a number and M, G or T, such as 256M or 4G,1T")
    return int(number) * unit >> 12


def sizes_of(config: pytest.Config) -> list[str]:
    """Return the sizes asked for, in their spelling."""
    default = SIZE_AS_TEST if config.getoption("benchmark_disable", default=True) else SIZES
    return (config.getoption("--guest") or default).split(",")


def pytest_configure(config: pytest.Config) -> None:
    for size in sizes_of(config):
        guest_pages(size)  # a wrong one ends the run at once


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pages" in metafunc.fixturenames:
        metafunc.parametrize("pages", sizes_of(metafunc.config), indirect=True, scope="session")


@pytest.fixture(scope="session")
def pages(request: pytest.FixtureRequest) -> int:
    return guest_pages(request.param)


@pytest.fixture(scope="module")
def guest(pages: int, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest of 4 KiB leaves that logs."""
    small = ratios.small_guest(pages, getattr(request, "param", "ept-pml"))
    with small.vm:
        yield small


@pytest.fixture(scope="module")
def huge_guest(pages: int) -> Iterator[Guest]:
    """A guest of 2 MiB leaves that does not log."""
    huge = ratios.huge_guest(pages)
    with huge.vm:
        yield huge


@pytest.fixture
def compare(benchmark: object, pages: int) -> Callable[[Case], None]:
    """Measure a case: the kernel by pytest-benchmark with its refill in setup, before it the limit, by turns; least times count."""
    rounds = SMALL_ROUNDS if pages <= SMALL else ROUNDS

    def run(case: Case) -> None:
        limits = []

        def refill() -> None:
            limits.append(limit_seconds(case, 1))
            case.setup()

        benchmark.pedantic(case.work, setup=refill, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is not None:
            ratio = ratio_of(case, benchmark.stats.stats.min, min(limits[1:]))
            benchmark.extra_info.update(
                name=ratio.name, unit=ratio.unit, units=case.units, ns_per_unit=ratio.ns, limit=ratio.limit,
                limit_ns_per_unit=ratio.limit_ns, ratio=ratio.ratio, at_most=ratio.at_most, met=ratio.met,
                why=case.why, guest=pages << 12,
            )  # fmt: skip

    return run


def best(benchmark: object, name: str, run: Callable[[], float], at_most_s: float | None, rounds: int = 9, why: str = "") -> None:
    """Measure the seconds that `run` returns; the least of the rounds counts. The bar is a time."""
    found: list[float] = []
    benchmark.pedantic(lambda: found.append(run()), rounds=rounds)
    info = {"name": name, "unit": "call", "units": 1, "ns_per_unit": min(found) * 1e9}
    if at_most_s is not None:
        ratio = min(found) / at_most_s
        limit = {"limit": time_of(at_most_s * 1e9), "limit_ns_per_unit": at_most_s * 1e9}
        info |= limit | {"ratio": ratio, "at_most": 1.0, "met": ratio <= 1.0, "why": why}
    benchmark.extra_info.update(info)
