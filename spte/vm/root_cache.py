"""The roots that a vCPU keeps: the current one and three before it, so that going back and forth finds them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PREVIOUS = 3


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
    """`root_mmu` or `guest_mmu` of a vCPU: KVM's struct kvm_mmu as far as roots go."""

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
        """Make the root for `role` and `pgd` the current one, None if there is none; returns what fell out."""

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
