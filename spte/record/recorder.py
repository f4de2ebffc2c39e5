"""A recording from start to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from spte._files import destination
from spte.record import abi, maps
from spte.record.errors import TargetError
from spte.record.journal import Journal, finish
from spte.record.measure import measure
from spte.record.session import Progress, Session
from spte.trace import Trace

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.001, 3600.0


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recording that has ended.

    Parameters
    ----------
    trace : Trace
        What was written to the file.
    ended : str
        How it ended, in words.
    trouble : Exception, optional
        Why it ended before its time.
    children, refused : dict
        Command names of the children seen, by pid; mappings that the kernel does not track, and why.
    """

    trace: Trace
    ended: str
    trouble: Exception | None
    children: dict[int, str]
    refused: dict[str, str]


def record(
    output: Path,
    interval_s: float = 0.1,
    *,
    pid: int = 0,
    command: Sequence[str] = (),
    on_epoch: Callable[[Progress], None] | None = None,
) -> Recorded:
    """Record which pages a process writes, until it exits or SIGINT, SIGTERM or SIGHUP comes. For the main thread only.

    Parameters
    ----------
    output : Path
        The trace to create or replace, at the end; a symbolic link is followed. Until then a journal lies beside it.
    interval_s : float
        Length of an epoch, s.
    pid : int
        The process; 0 to start `command`.
    command : sequence of str
        Program and arguments; found as a shell finds it.
    on_epoch : callable, optional
        Called after each epoch, always with the same object.

    Raises
    ------
    TargetError
        If the process can not be recorded, the output is there and no regular file, or the journal of an earlier recording is in the way.
    MissingPieceError
        If the host lacks a piece.
    RecordError
        If a file can not be written; where the journal has epochs, the message says how to make the trace of it.
    """
    try:
        destination(output)
    except OSError as error:
        raise TargetError(f"{str(output)!r} can not be replaced ({error.strerror}); name another output") from None
    if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
        raise TargetError(f"interval {interval_s:g} s; take one from {MIN_INTERVAL_S * 1000:g}ms to {MAX_INTERVAL_S:g}s")
    abi.require()
    if pid:
        maps.check_target(pid)
    fault_s = measure(4096, 2).first_write / 1e9
    journal = Journal(output)
    session = Session(journal, interval_s, pid, command, fault_s, on_epoch)
    try:
        session.run()
    except BaseException:
        journal.close()
        if not session.progress.epochs:
            journal.path.unlink()
        raise
    journal.close()
    trace = finish(journal.path, output)
    return Recorded(trace, session.ended, session.trouble, session.progress.children, session.refused)
