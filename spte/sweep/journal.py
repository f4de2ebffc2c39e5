"""What is finished of a sweep, a line a point: a sweep that was killed goes on where it stopped.

The first line names the sweep by its digest. A line that a kill cut off is dropped, and its point done again.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from spte.sweep.points import Figures, SweepError

FORMAT = "spte-sweep-journal/1"


class Journal:
    """The journal of one sweep.

    Parameters
    ----------
    path : Path
        The file; it is made if there is none.
    digest : str
        The sweep's.

    Attributes
    ----------
    done : dict of int to dict
        Figures by the number of their point.

    Raises
    ------
    SweepError
        If the file is the journal of another sweep, or none.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.done: dict[int, Figures] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            whole = self._read(self._file.read(), digest)
        except BlockingIOError:
            self._file.close()
            raise SweepError(f"{path} is in use: the same sweep runs already; wait for it, or name another file") from None
        except SweepError:
            self._file.close()
            raise
        self._file.truncate(whole)
        if not whole:
            self._append({"format": FORMAT, "digest": digest})

    def _read(self, text: bytes, digest: str) -> int:
        """Take what is finished; returns the bytes that are whole lines."""
        whole = text.rfind(b"\n") + 1
        lines = text[:whole].splitlines()
        try:
            head, *rest = map(json.loads, lines) if lines else ({"format": FORMAT, "digest": digest},)
            self.done = {int(line["point"]): line["figures"] for line in rest}
            known = head["format"] == FORMAT
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise SweepError(f"{self.path} is no journal of a sweep; name another file for the result, or remove it")
        if head["digest"] != digest:
            raise SweepError(f"{self.path} is the journal of another sweep, or its traces have changed; name another file, or remove it")
        return whole

    def add(self, point: int, figures: Figures) -> None:
        """Keep the figures of a point; they are on the disk when this returns."""
        self._append({"point": point, "figures": figures})
        self.done[point] = figures

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Remove the file: the result is somewhere else now."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
