"""What slows a guest down that dirties pages faster than they are sent, as QEMU does it.

When it acts: migration_bitmap_sync and migration_trigger_throttle of QEMU's migration/ram.c. A period ends with the first harvest more
than a second after the last period's end. If more was dirtied in it than `THRESHOLD` percent of what was sent, it counts; the second that
counts starts the throttle or increases it. What it does then: mig_throttle_guest_down there, and cpu-throttle.c, which lets
every vCPU sleep for a share of the time; or dirtylimit.c, which lets each vCPU sleep that puts more pages on its ring than its quota.
The defaults are those of QEMU's migration parameters.
"""

from __future__ import annotations

PERIOD_NS = 1_000_000_000
"""A period lasts longer than this."""
HIGH_PERIODS = 2
THRESHOLD = 50
"""throttle-trigger-threshold, percent."""
INITIAL, INCREMENT, MAXIMUM = 20, 10, 99
"""cpu-throttle-initial, cpu-throttle-increment, max-cpu-throttle, percent of time that a vCPU sleeps."""


class Throttle:
    """One throttle and the periods that it looks at.

    Parameters
    ----------
    kind : str
        ``none``, ``auto-converge`` or ``dirty-limit``.
    quota : int
        Bytes a second that a vCPU may dirty once ``dirty-limit`` acts.
    """

    def __init__(self, kind: str, quota: int) -> None:
        self._kind, self._quota = kind, quota
        self._began, self._sent, self._dirtied, self._high = 0, 0, 0, 0
        self.percent = 0
        """Share of the time that every vCPU sleeps, percent."""
        self.limit: int | None = None
        """Bytes a second that each vCPU may dirty; None: as many as it likes."""

    def harvested(self, now: int, dirtied: int, sent: int) -> None:
        """Tell of a harvest at `now`, ns: pages that it found, and pages sent since the one before. What acts may change."""
        self._dirtied += dirtied
        self._sent += sent
        if now <= self._began + PERIOD_NS:
            return
        if self._dirtied * 100 > self._sent * THRESHOLD:
            self._high += 1
        if self._high >= HIGH_PERIODS:
            self._high = 0
            self._act()
        self._began, self._sent, self._dirtied = now, 0, 0

    def _act(self) -> None:
        if self._kind == "auto-converge":
            self.percent = min(self.percent + INCREMENT, MAXIMUM) if self.percent else INITIAL
        elif self._kind == "dirty-limit":
            self.limit = self._quota

    def stop(self) -> None:
        """Let the guest run freely again."""
        self.percent, self.limit = 0, None
