"""Random programs on the oracle alone, whose TLBs may hold what tables no longer say; a search for one that fails, and its shrinking.

A program is a list of steps ``(name, arguments...)``; a page is given as ``(view, page of the slot)``.
"""

import random
from dataclasses import dataclass

from oracle.host import COLD, DONTNEED, Host
from oracle.memory import EXEC, LOG, READ, SPAN, WRITE
from oracle.rmap import oracle_of

VCPUS = 2
MODES = ("GET", "manual 1", "manual 3", "ring")
LOGGING = ("write", "write", "read", "stale", "stale", "stale", "harvest", "harvest", "log")
MAPPING = ("write", "read", "read", "exec", "log", "harvest", "unmap", "age", "prefault", "move", "nx", "cut")


@dataclass(frozen=True)
class Scene:
    """One slot over one backing, and the pages that programs touch: two words of a 2 MiB region, its end, and the next region."""

    platform: str
    policy: str = "6.12"
    mode: str = "GET"
    kind: str = "thp"
    eager: bool = True
    base: int = 512
    off: int = 0
    flags: int = 0
    views: int = 1
    pages: tuple = (0, 1, 68, 511, 512, 518)
    steps: tuple = LOGGING

    def __str__(self):
        extra = [f"eager={self.eager:d}", f"views={self.views}", *(["RO"] if self.flags else [])]
        return " ".join([self.platform, self.policy, self.mode, self.kind, *extra])

    def machine(self, mutants=()):
        return Machine(self, mutants)


class Machine:
    """The oracle in a scene, one method a step."""

    def __init__(self, scene, mutants):
        self.scene = scene
        manual = int(scene.mode[-1]) if scene.mode.startswith("manual") else 0
        o = self.oracle = oracle_of(scene.platform, scene.policy, VCPUS, manual, 1024 if scene.mode == "ring" else 0, mutants)
        o.views, o.eager = scene.views, scene.eager and o.rules.eager
        self.host, self.npages = Host(scene.kind, 1024 + scene.off, populate=True), 1024
        self.base, self.logs = scene.base, False
        self.set_slot()

    def set_slot(self):
        flags = self.scene.flags | (LOG if self.logs else 0)
        assert self.oracle.set_region(0, self.base, self.npages, self.host, self.scene.off, flags) == 0

    def at(self, place):
        view, page = place
        return self.base + page + view * SPAN

    def write(self, v, place):
        self.oracle.run(v, [self.at(place)], [WRITE])

    def read(self, v, place):
        self.oracle.run(v, [self.at(place)], [READ])

    def exec(self, v, place):
        self.oracle.run(v, [self.at(place)], [EXEC])

    def stale(self, v, place):
        """Write through what the TLB holds, if it lets the write through."""
        self.oracle.through_tlb(v, self.at(place))

    def log(self):
        self.logs = not self.logs
        self.set_slot()

    def harvest(self, pages, point, v, place, drains):
        """Harvest some pages; at one of the three points between its steps a vCPU writes."""
        o, left = self.oracle, [point]

        def meanwhile():
            left[0] -= 1
            if left[0] == 0:
                o.concurrent_write(v, self.at(place))
                if drains:
                    o.drain(o.vcpus[v])

        o.meanwhile = meanwhile
        if o.soft is not None:
            for i in range(VCPUS):
                o.collect(i, 1 << 16)
            o.reset_rings()
        elif self.logs:
            seen = o.get(0)
            if o.manual:
                assert o.clear(0, 0, self.npages, seen & pages) == 0
        o.meanwhile = lambda: None

    def unmap(self, place):
        self.oracle.madvise(self.host, place[1] + self.scene.off, 1, DONTNEED)

    def cut(self, place):
        self.oracle.madvise(self.host, place[1] + self.scene.off, 1, COLD)

    def age(self, place):
        self.oracle.age(self.host, place[1] + self.scene.off)

    def prefault(self, v, place):
        self.oracle.prefault(v, self.base + place[1], 1)

    def move(self):
        """The request for new roots takes vCPUs out of the guest, where they drain."""
        for vcpu in self.oracle.vcpus:
            self.oracle.drain(vcpu)
        self.base = 8192 + 2 * self.scene.base - self.base
        self.set_slot()

    def nx(self, on):
        self.oracle.set_nx(on)

    def failure(self):
        """What went wrong up to now."""
        if any(self.oracle.lost()):
            return "lost write"
        return "stale translation" if any(self.oracle.stale()) else None


def random_program(scene, seed, length=40):
    rng = random.Random(f"{scene} {seed}")
    place = lambda: (rng.randrange(scene.views), rng.choice(scene.pages))  # noqa: E731
    arguments = {
        "log": lambda: (), "move": lambda: (), "nx": lambda: (rng.random() < 0.5,),
        "harvest": lambda: (frozenset(rng.sample(scene.pages, 3)), rng.randrange(4), rng.randrange(VCPUS), place(), rng.random() < 0.5),
        **{name: lambda: (place(),) for name in ("unmap", "cut", "age")},
    }  # fmt: skip
    names = rng.choices(scene.steps, k=length)
    return [(name, *arguments.get(name, lambda: (rng.randrange(VCPUS), place()))()) for name in names]


def fails(scene, program, caught, mutants=()):
    """Whether `program` ends in the failure `caught`; it stops at the first stale translation if that is what is looked for."""
    machine = scene.machine(mutants)
    for name, *arguments in program:
        getattr(machine, name)(*arguments)
        failure = machine.failure()
        if failure == caught:
            return True
        if failure and not mutants:
            raise AssertionError(f"{failure} without any mutant: {scene} {program}")
    return False


def shrink(program, still_fails):
    """Drop steps, many at once and then one by one, while the program still fails: none can be spared in the end."""
    size = len(program)
    while size:
        at, dropped = 0, False
        while at < len(program):
            shorter = program[:at] + program[at + size :]
            if still_fails(shorter):
                program, dropped = shorter, True
            else:
                at += size
        size = size if size == 1 and dropped else size // 2
    return program


def search(scene, caught, mutants, seeds):
    """The first random program that fails, shrunk; None if there is none."""
    for seed in range(seeds):
        program = random_program(scene, seed)
        if fails(scene, program, caught, mutants):
            return shrink(program, lambda shorter: fails(scene, shorter, caught, mutants))
    return None
