"""The MMU of one vCPU: which root it runs on, and the roots that it keeps so that going back and forth finds them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spte.arrays.mode import Modes
from spte.bits import ROLE_IS_DIRECT, ROLE_LEVEL, ROLE_PAGING_OFF, ROLE_SMM_SHIFT

PREVIOUS = 3  # KVM_MMU_NUM_PREV_ROOTS


@dataclass(frozen=True, slots=True)
class Root:
    """One root.

    Parameters
    ----------
    row : int
        Its page in the arena.
    role : int
        Its role when it was loaded.
    pgd : int
        What the guest put into CR3 or EPTP; 0 for a root that shadows no guest table.
    """

    row: int
    role: int
    pgd: int


class RootCache:
    """`root_mmu` or `guest_mmu` of a vCPU: the root and prev_roots of KVM's struct kvm_mmu."""

    def __init__(self) -> None:
        self.current: Root | None = None
        self.previous: list[Root | None] = [None] * PREVIOUS

    def __iter__(self) -> Iterator[tuple[str, Root]]:
        if self.current is not None:
            yield "cur", self.current
        for i, root in enumerate(self.previous):
            if root is not None:
                yield f"prev{i}", root

    def switch(self, role: int, pgd: int, *, direct: bool) -> list[Root]:
        """Make the root for `role` and `pgd` the current one, None if there is none; returns what fell out: fast_pgd_switch."""

        def fits(root: Root | None) -> bool:
            return root is not None and root.role == role and (direct or root.pgd == pgd)

        if self.current is None:
            for i, root in enumerate(self.previous):
                if fits(root):
                    self.current = root
                    self.previous = [*self.previous[:i], *self.previous[i + 1 :], None]
                    break
            return []
        if fits(self.current):
            return []
        for i in range(PREVIOUS):
            self.current, self.previous[i] = self.previous[i], self.current
            if fits(self.current):
                return []
        lost, self.current = self.current, None
        return [lost] if lost is not None else []

    def drop(self, gone: set[int]) -> list[Root]:
        """Forget the roots in rows `gone`; returns them."""
        dropped = [root for _, root in self if root.row in gone]
        if self.current is not None and self.current.row in gone:
            self.current = None
        self.previous = [root if root is None or root.row not in gone else None for root in self.previous]
        return dropped


class VcpuMmu:
    """The MMU of one vCPU: `root_mmu`, `guest_mmu` and `mmu` of KVM's struct kvm_vcpu_arch.

    Parameters
    ----------
    role : int
        Role of the root that it runs on first.
    mode : Modes
        Of a vCPU that runs L1.
    """

    def __init__(self, role: int, mode: Modes) -> None:
        self.root_mmu, self.guest_mmu = RootCache(), RootCache()
        self.active, self.role, self.pgd = self.root_mmu, role, 0
        self.pae_root = -1  # row of the root of a guest whose paging is off, under shadow paging
        self.mode = mode
        self.reloads = 0  # `Mmu.reloads` that it has followed
        self.loaded = -1  # `Mmu.generation` at which registers and mode were last brought in step; -1: they are not

    @property
    def is_direct(self) -> bool:
        """The root shadows no guest table."""
        return bool(self.role & ROLE_IS_DIRECT)

    @property
    def is_pae(self) -> bool:
        """The guest's paging is off, under shadow paging."""
        return self.role & ~(ROLE_LEVEL | 0xFF << ROLE_SMM_SHIFT) == ROLE_PAGING_OFF

    @property
    def as_id(self) -> int:
        """Address space that the root maps."""
        return self.role >> ROLE_SMM_SHIFT

    def switch(self, cache: RootCache, role: int, pgd: int) -> list[Root]:
        """Run on the root for `role` and `pgd` of `cache`, which becomes the active one; returns what fell out: kvm_mmu_new_pgd."""
        self.active, self.role, self.pgd, self.loaded = cache, role, pgd, -1
        return cache.switch(role, pgd, direct=self.is_direct)

    def drop(self, cache: RootCache, gone: set[int]) -> list[Root]:
        """Forget the roots in rows `gone` of `cache`; returns them."""
        self.loaded = -1
        return cache.drop(gone)
