"""Kinds of access. The bits are those of an EPT entry and of an EPT violation's exit qualification: read 1, write 2, fetch 4."""

from __future__ import annotations

from enum import IntFlag


class Access(IntFlag):
    """What an access does, or what an entry allows.

    One bit says what a guest access is; several, what guest page tables allow. Other encodings, such as KVM's ACC_ALL and the page
    fault error code, are converted where they come in or go out.
    """

    READ = 1
    WRITE = 2
    EXEC = 4


READ, WRITE, EXEC = Access.READ, Access.WRITE, Access.EXEC
NO_ACCESS, RWX = Access(0), READ | WRITE | EXEC
