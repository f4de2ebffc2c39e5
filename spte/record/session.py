"""The loop of a recording: a scan for each epoch, in between what the tracer and the signals say."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spte._version import __version__
from spte.platform import PAGE_SIZE
from spte.record import maps
from spte.record.errors import MissingPieceError, RecordError, TargetError
from spte.record.journal import Journal, unwritten
from spte.record.ranges import RangeArray, count, merge
from spte.record.tracing.tracer import GO
from spte.record.tracker import MemoryGone, Tracker
from spte.trace import FORMAT, MAX_BYTES

MAX_NAMED = 100
"""Children, and refused mappings, that `meta` names."""
_CHILDREN_EVERY_S = 0.5
_GRACE_NS = 500_000_000
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The tracer needs none of what `import spte` loads: the package is there by name and place only.
_START_TRACER = (
    "import sys, types; spte = types.ModuleType('spte'); spte.__path__ = [sys.argv[1]]; sys.modules['spte'] = spte; "
    "from spte.record.tracing.tracer import main; main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])"
)


@dataclasses.dataclass
class Progress:
    """Where a recording is.

    Parameters
    ----------
    epochs, pages : int
        Epochs so far, and the pages that the last one wrote.
    seconds, epoch_s, scan_s, fault_s : float
        Time since the start; of the last epoch its length, its scan, and the faults of its writes (pages times what one costs here).
    children : dict
        Command names of the children seen, by pid.
    """

    epochs: int = 0
    pages: int = 0
    seconds: float = 0.0
    epoch_s: float = 0.0
    scan_s: float = 0.0
    fault_s: float = 0.0
    children: dict[int, str] = dataclasses.field(default_factory=dict)


class Session:
    """One recording, from the start of the tracer to the last epoch in the journal."""

    def __init__(
        self, journal: Journal, interval_s: float, pid: int, command: Sequence[str], fault_s: float,
        on_epoch: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self.journal, self.interval_s, self.pid, self.command = journal, interval_s, pid, list(command)
        self.on_epoch, self._fault_s = on_epoch, fault_s
        self.progress = Progress()
        self.ended = ""
        self.trouble: Exception | None = None
        self.refused: dict[str, str] = {}
        self._tracker: Tracker | None = None
        self._pending: list[RangeArray] = []
        """Pages of the current epoch that were read before its end, at an exec."""
        self._start = self._last = 0
        """ns of the monotonic clock: start of the recording, end of the last epoch."""
        self._signal = 0
        self._children_at = 0.0

    def run(self) -> None:
        """Record until the target exits, a signal comes, or nothing more can be recorded (then `trouble` says why).

        Raises
        ------
        RecordError, OSError
            If not even the start succeeds.
        """
        with self._signals() as wake, self._tracer() as channel:
            leave_ns = 0
            while not self.ended:
                # Between two address spaces an epoch has no end: what is written then comes with the next one.
                waits = [self._next_ns()] if self._tracker else []
                if self._signal:
                    leave_ns = leave_ns or time.monotonic_ns() + self._grace_ns()
                    waits.append(max(0, leave_ns - time.monotonic_ns()))
                ready, _, _ = select.select((channel.fileno(), wake), (), (), min(waits) / 1e9 if waits else None)
                if wake in ready:
                    os.read(wake, 4096)
                if channel.fileno() in ready:
                    self._listen(channel)
                elif leave_ns and time.monotonic_ns() >= leave_ns:
                    self._close_epoch(last=True)
                    self.ended = self.ended or f"{_spell_signal(self._signal)}; pid {self.pid} ran on"
                elif self._tracker and not self._next_ns():
                    self._close_epoch()
        if not self._start:
            raise TargetError(f"{self.ended}, before the recording had begun")
        self._close_tracker()
        children = dict(list(self.progress.children.items())[:MAX_NAMED])
        refused = dict(list(self.refused.items())[:MAX_NAMED])
        self._write(lambda: self.journal.about({"ended": self.ended, "children": children, "not_tracked": refused}))

    def _grace_ns(self) -> int:
        """Return how long the target's end is waited for after a signal: a terminal's Ctrl-C, say, goes to its whole process group."""
        try:
            reached = not self._tracker or os.getpgid(self.pid) == os.getpgrp()
        except ProcessLookupError:
            reached = True
        return _GRACE_NS if self._start and reached else 0

    # -- epochs --------------------------------------------------------------------------------------------------------

    def _next_ns(self) -> int:
        """Return how long the current epoch has to go; after a late scan the next one ends at a multiple of the interval again."""
        interval = int(self.interval_s * 1e9)
        end = self._start + ((self._last - self._start) // interval + 1) * interval
        return max(0, end - time.monotonic_ns())

    def _close_epoch(self, *, last: bool = False) -> None:
        """Scan, and write the epoch, which ends when the scan begins; `last`: even if the address space is gone."""
        now = time.monotonic_ns()
        self._pending.append(self._scan())
        after = time.monotonic_ns()
        if not self._start or not (self._tracker or last):
            return
        written = merge(self._pending)
        self._pending = []
        self._write(lambda: self.journal.epoch(now - self._start, written))
        progress = self.progress
        progress.epochs += 1
        progress.pages = count(written)
        progress.seconds, progress.epoch_s = (now - self._start) / 1e9, (now - self._last) / 1e9
        progress.scan_s, progress.fault_s = (after - now) / 1e9, progress.pages * self._fault_s
        self._last = now
        self._look_for_children()
        if self.journal.bytes > MAX_BYTES * 0.99:
            self._stop(RecordError(f"the trace is full ({MAX_BYTES} bytes); record a shorter time, or with a longer interval"))
        if self.on_epoch:
            self.on_epoch(progress)

    def _scan(self) -> RangeArray:
        if self._tracker:
            try:
                return self._tracker.scan()
            except MemoryGone:  # an exec or the exit; the tracer tells which
                self._close_tracker()
        return merge([])

    def _close_tracker(self) -> None:
        if self._tracker:
            self.refused |= self._tracker.refused
            self._tracker.close()
            self._tracker = None

    def _write(self, step: Callable[[], None]) -> None:
        """Write to the journal; a full disk ends the recording, not what is on it."""
        try:
            step()
        except OSError as error:
            if not self.progress.epochs:
                raise unwritten(self.journal.path, error) from None
            self._stop(RecordError(f"{str(self.journal.path)!r}: {error.strerror}; the recording ends with the last whole epoch"))

    def _stop(self, trouble: Exception) -> None:
        self.trouble = self.trouble or trouble
        self.ended = self.ended or str(trouble)

    def _look_for_children(self) -> None:
        now = time.monotonic()
        if now >= self._children_at:
            self.progress.children |= maps.read_children(self.pid)
            self._children_at = now + _CHILDREN_EVERY_S

    # -- the tracer ----------------------------------------------------------------------------------------------------

    def _listen(self, channel: socket.socket) -> None:
        data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 1)
        message: dict[str, Any] = json.loads(data) if data else {"event": "gone"}
        event = message["event"]
        if event == "memory":
            self._track(descriptors[0], message["pid"])
            channel.send(GO)
        elif event == "exit":
            self._close_epoch()
            channel.send(GO)
        elif event == "over":
            self._over(message)
        else:
            kind = MissingPieceError if message.get("kind") == "missing" else TargetError
            error = kind(message.get("text", "the process that traces the target was killed"))
            if not self._start:
                raise error
            self._close_epoch(last=True)
            self._stop(error)

    def _track(self, uffd: int, pid: int) -> None:
        """Arm a new address space, whose process stands still."""
        self._close_tracker()
        self.pid = pid
        try:
            self._tracker = Tracker(uffd, pid)
        except MemoryGone:
            return
        populated = self._scan()
        if self._start or self.command:
            self._pending.append(populated)  # written by exec itself
        else:
            self._write(lambda: self.journal.populated(populated))
        if not self._start:
            self._start = self._last = time.monotonic_ns()
            self._write(lambda: self.journal.about(self._about()))
        self._write(lambda: self.journal.about({"command": maps.read_command(pid)}))  # after an exec: what the wrapper became

    def _over(self, message: dict[str, Any]) -> None:
        if any(map(len, self._pending)) or not self.progress.epochs:
            self._close_epoch(last=True)
        if "code" in message:
            self.ended = f"pid {self.pid} exited with {message['code']}"
        elif "signal" in message:
            self.ended = f"pid {self.pid} was killed by {_spell_signal(message['signal'])}"
        else:
            self.ended = f"pid {self.pid} ended"

    def _about(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "how": f"spte record {__version__}: userfaultfd WP_ASYNC and PAGEMAP_SCAN, Linux {platform.release()}, one scan an epoch",
            "interval_s": self.interval_s,
            "page_size": PAGE_SIZE,
            "pid": self.pid,
            "started": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "start_monotonic_ns": self._start,
            "page_space": "2 MiB regions that held a page in memory, side by side; ranges: first gfn, pages, virtual address",
        }

    @contextmanager
    def _tracer(self) -> Iterator[socket.socket]:
        """Run the tracer; when the channel closes it lets the target go, and ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package = str(Path(__file__).parents[1])
        arguments = [package, str(theirs.fileno()), str(self.pid), *self.command]
        with theirs:
            tracer = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START_TRACER, *arguments], pass_fds=[theirs.fileno()]
            )
        try:
            with ours:
                yield ours
        finally:
            tracer.wait()

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Note the first signal that ends a recording; yields a descriptor that becomes readable with it."""
        wake, woken = os.pipe()
        os.set_blocking(woken, False)

        def note(number: int, _: Any) -> None:
            self._signal = self._signal or number

        before = {number: signal.signal(number, note) for number in _ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
        before_fd = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        try:
            yield wake
        finally:
            signal.set_wakeup_fd(before_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(wake)
            os.close(woken)


def _spell_signal(number: int) -> str:
    """Return the name of a signal; most real-time ones have none."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
