"""Where a platform keeps the bits that the public kernels change."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from spte import bits
from spte import policy as policies
from spte.bits import W_SHIFT
from spte.platform import Platform, named
from spte.policy import Policy


class KernelLayout(NamedTuple):
    """What the public kernels need of a platform; `layout` makes it."""

    dirty_shift: np.uint64  # place of D: 9 with EPT, 6 with NPT and shadow paging
    rearm_shift: np.uint64  # place of the bit that a harvest clears where the A/D type is 0: D if PML logs it, else W
    link: np.uint64  # a non-leaf entry without its address


AnyPlatform = str | Platform | KernelLayout


@lru_cache(maxsize=64)
def _prepare(platform: str | Platform, policy: str | Policy) -> KernelLayout:
    cpu = named(platform) if isinstance(platform, str) else platform
    era = (policies.parse(policy) if isinstance(policy, str) else policy).era
    lay = bits.layout(cpu, era)
    return KernelLayout(lay.dirty_shift, lay.dirty_shift if cpu.pml else W_SHIFT, lay.link)


def layout(platform: str | Platform, policy: str | Policy = "6.12") -> KernelLayout:
    """Prepare what `clear_dirty`, `harvest` and `split` take as `platform`, so that nothing is looked up at a call.

    Parameters
    ----------
    platform : str or Platform
        Name of a platform, such as ``"ept-pml"`` or ``"npt"``, or a `spte.Platform`.
    policy : str or Policy
        Kernel version as `spte.policy.parse` takes it, or a `spte.Policy`. Only its era counts: bit 63 of EPT's links is set from 6.10 on.

    Returns
    -------
    KernelLayout
        Pass it as `platform`.

    Raises
    ------
    TypeError
        `platform` or `policy` is neither a name nor a value of its class.
    PlatformError
        The name is not known.
    """
    if not isinstance(platform, str | Platform):
        raise TypeError(f"platform is of type {type(platform).__name__}; pass a name, a Platform or what spte.kernels.layout returns")
    if not isinstance(policy, str | Policy):
        raise TypeError(f"policy is of type {type(policy).__name__}; pass a name or a Policy")
    return _prepare(platform, policy)


def resolve(platform: AnyPlatform) -> KernelLayout:
    """Return the layout of `platform`, under 6.12 where it was not prepared."""
    return platform if isinstance(platform, KernelLayout) else layout(platform)
