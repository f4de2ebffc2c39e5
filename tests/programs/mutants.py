"""Every step that the oracle takes so that no write gets lost and no translation stays: where it stands, and what catches its loss.

One switch each: `Oracle.mutants` holds the name of a step that is left out, or cut down to the first of several.
"""

from dataclasses import dataclass, replace

from conftest import PLATFORMS, PML_PLATFORMS, TDP_PLATFORMS, WP_PLATFORMS
from oracle.memory import RO
from oracle.rules import RULES

from programs.tlb import MAPPING, Scene

LOST, STALE, STATE = "lost write", "stale translation", "another state than the VM's"
TDP_PML = [name for name in TDP_PLATFORMS if name in PML_PLATFORMS]  # clear-dirty takes huge leaves too there, and flushes
RMAP_PLATFORMS = tuple(name for name in PLATFORMS if name not in TDP_PLATFORMS)


@dataclass(frozen=True)
class Mutant:
    """A step, what it does, what shows that it is missing, and the scenes in which that must show."""

    step: str
    what: str
    caught: str
    scenes: tuple


def on(platforms, *modes, **more):
    return tuple(Scene(platform, mode=mode, **more) for platform in platforms for mode in modes or ("GET",))


def mapping(platforms, *policies, **more):
    policies = policies or ("6.12",)
    return tuple(Scene(platform, policy, steps=steps_on(policy), **more) for platform in platforms for policy in policies)


def steps_on(policy):
    """Before 6.11 there is no prefault."""
    return tuple(step for step in MAPPING if step != "prefault" or RULES[policy].prefault)


def huge(scenes):
    """The same with leaves that stay huge: not split when logging begins, nor at CLEAR."""
    return tuple(replace(scene, eager=False) for scene in scenes)


HUGE_SECOND = {"base": 513, "off": 1, "pages": (500, 510, 511, 512, 600), "eager": False}  # page 511 begins a 2 MiB region
BEFORE_6_1 = {"policy": "series", "eager": False}
BUSY = {"pages": (0, 1, 2), "steps": ("write", "log", "harvest", "harvest", "harvest")}
ALIASED = {"views": 3, "pages": (0, 1, 68, 512)}

MUTANTS = [
    # -- flushes of what arms
    Mutant("enable", "flush after enabling", LOST, (*on(PLATFORMS, "GET", "manual 1", "ring"), *huge(on(PLATFORMS, "GET")))),
    Mutant("enable: after clear dirty", "flush after its clear-dirty, before 6.1", LOST, on(PML_PLATFORMS, kind="4k", **BEFORE_6_1)),
    Mutant(
        "enable: after write-protect", "flush after its write-protect, before 6.1", LOST,
        (*on(WP_PLATFORMS, kind="4k", **BEFORE_6_1), *on([name for name in PLATFORMS if name not in TDP_PML], **BEFORE_6_1)),
    ),
    Mutant(
        "enable: after write-protect", "the same of huge leaves with initially-set: CLEAR flushes before a write counts", STALE,
        on(PLATFORMS, "manual 3", **BEFORE_6_1),
    ),
    Mutant("GET", "flush after a GET that harvests", LOST, (*on(PLATFORMS, "GET"), *huge(on(PLATFORMS, "GET")))),
    Mutant(
        "CLEAR", "flush after a CLEAR, also of a huge leaf's write-protect", LOST,
        (*on(PLATFORMS, "manual 1", "manual 3"), *huge(on(PLATFORMS, "manual 3"))),
    ),
    Mutant("RESET", "flush after a reset of rings", LOST, on(PLATFORMS, "ring")),
    # -- what arms
    Mutant("enable: clear dirty", "D of 4 KiB leaves when logging begins", LOST, on(PML_PLATFORMS, kind="4k")),
    Mutant("enable: write-protect", "W when logging begins", LOST, (*on(WP_PLATFORMS, kind="4k"), *huge(on(PLATFORMS)))),
    Mutant("re-arm: GET", "D or W of the leaves of a GET's mask", LOST, on(PLATFORMS, "GET")),
    Mutant("re-arm: CLEAR", "D or W of the leaves of a CLEAR's mask", LOST, on(PLATFORMS, "manual 1", "manual 3")),
    Mutant("re-arm: RESET", "D or W of the leaf of a ring entry", LOST, on(PLATFORMS, "ring")),
    Mutant(
        "re-arm: huge leaf at the first gfn", "W of a huge leaf that is still writable", LOST,
        (*huge(on(PLATFORMS, "manual 3")), *on(RMAP_PLATFORMS, "manual 3")),
    ),
    Mutant("re-arm: huge leaf at the last gfn", "W of the next one, if a mask ends there", LOST, on(PLATFORMS, "manual 3", **HUGE_SECOND)),
    # -- every view of a gfn
    Mutant("enable: aliases", "all leaves of a gfn when logging begins", LOST, on(PLATFORMS, "GET", "manual 1", "ring", **ALIASED)),
    Mutant("re-arm: aliases", "all leaves of a gfn in a mask", LOST, on(PLATFORMS, "GET", "manual 1", "manual 3", "ring", **ALIASED)),
    Mutant("re-arm: aliases of huge leaves", "all huge leaves that cover a gfn", LOST, huge(on(PLATFORMS, "manual 3", **ALIASED))),
    Mutant(
        "W of L2 leaves", "W instead of D where PML is off", LOST,
        on(PML_PLATFORMS, "GET", "manual 1", "manual 3", "ring", **ALIASED),
    ),
    # -- order
    Mutant("bit first", "bits are taken before their leaves are armed", LOST, on(PLATFORMS, "GET", "manual 1", "manual 3", **BUSY)),
    Mutant("read last", "userspace reads after the flush", LOST, on(PLATFORMS, "GET", "manual 1", "manual 3", **BUSY)),
    # -- flushes of what takes translations away
    Mutant(
        "collapse", "flush after what may be larger was dropped", STALE,
        mapping(TDP_PLATFORMS, "series", "6.1", "6.12", "6.13") + mapping(RMAP_PLATFORMS, "series", "6.12"),
    ),
    Mutant("link replaced", "flush after a huge leaf took the place of a table", STALE, mapping(PLATFORMS, flags=RO)),
    Mutant(
        "lazy zap", "flush after a huge leaf was dropped for a table", STALE,
        mapping(TDP_PLATFORMS, "6.1", eager=False) + mapping(RMAP_PLATFORMS, "6.1", "6.12"),
    ),
    Mutant(
        "remake", "flush after a leaf lost D when it was made anew", STALE,
        mapping(name for name in RMAP_PLATFORMS if name not in ("ept-noad-rmap", "shadow")),
    ),
    Mutant("unmap", "flush of a notifier that dropped a leaf", STALE, mapping(PLATFORMS)),
    Mutant("unmap: aliases", "a notifier drops all leaves of a gfn", STALE, mapping(PLATFORMS, **ALIASED)),
    Mutant("age", "flush after R, W and X of a leaf were parked", STALE, mapping(["ept-noad", "ept-noad-rmap"])),
    Mutant("zap-all", "flush, or new roots, after everything was dropped", STALE, mapping(PLATFORMS)),
    # -- what no write and no translation hangs on
    Mutant("split: enable", "write-protect takes what is not split", STATE, on(["npt", "ept-pml"])),
    Mutant("split: re-arm", "write-protect takes what is not split", STATE, on(["ept-noad"], "manual 3")),
    Mutant("disable: set dirty", "a TLB without D sets it once more", STATE, on(["ept-pml", "ept-pml-rmap"], policy="5.11")),
    Mutant("obsolete root freed", "zap-all has flushed what hung on it", STATE, on(["npt-rmap", "shadow"])),
]  # fmt: skip


def cases(caught):
    return [(mutant.step, scene) for mutant in MUTANTS if mutant.caught == caught for scene in mutant.scenes]
