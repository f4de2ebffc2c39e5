"""Random programs of guests that run guests: what is written is reported, what is used is what the guest's tables said."""

import pytest
from conftest import PLATFORMS
from programs.nested import STEPS, run

OUTCOMES = {"refused", "unsync", "emulated", "large leaf"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_random_programs_of_nested_guests_keep_the_contract(platform):
    reached = set()
    for seed in range(8):
        reached |= run(platform, seed, length=80)
    assert {*STEPS, *OUTCOMES} <= reached, {*STEPS, *OUTCOMES} - reached


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
def test_many_random_programs_of_nested_guests_keep_the_contract(platform):
    reached = set()
    for seed in range(1000, 1040):
        reached |= run(platform, seed, length=250)
    assert ("L1's buffer full" in reached) == (platform.startswith("ept") and "noad" not in platform)
