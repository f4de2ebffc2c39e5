"""Why a recording can not be made. Each message is one line that holds the value and the way out."""

from __future__ import annotations


class RecordError(Exception):
    """A recording that can not be made or read."""


class TargetError(RecordError):
    """The caller's choice can not be recorded: no such process, not executable, a file that is no journal."""


class MissingPieceError(RecordError):
    """The host lacks a piece: a kernel feature, a permission, the architecture."""
