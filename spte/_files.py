"""How a file is replaced: by a whole new one, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO


def destination(path: str | os.PathLike[str]) -> str:
    """Return the file that a new `path` makes or replaces, symbolic links followed.

    Raises
    ------
    OSError
        If something lies there that is no regular file, as a device, a FIFO or a folder, or that may not be written.
    """
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return os.path.realpath(name)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", name)
    if not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    return os.path.realpath(name)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a file beside `path` that takes its place at the end; after an error or an interrupt it goes, and `path` is as before.

    Raises
    ------
    OSError
        If `path` can not be replaced or the file not be written; it names `path`.
    """
    final = destination(path)
    folder, base = os.path.split(final)
    part = os.path.join(folder, f"{base[:60]}.{secrets.token_hex(4)}.part")  # a file name has at most 255 bytes
    try:
        with open(part, "xb") as stream:
            if os.path.exists(final):
                shutil.copymode(final, part)
            yield stream
        os.replace(part, final)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(part)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from None
        raise


def write_whole(path: str | os.PathLike[str], content: str) -> None:
    """Write text, UTF-8, to `path` as `replacing` does; into what is no regular file, or lies where no file can be made, as it stands.

    Raises
    ------
    OSError
        If it can not be written; it names `path`.
    """
    name = os.fspath(path)
    replaceable = os.path.isfile(name) and os.access(os.path.dirname(os.path.realpath(name)), os.W_OK)
    if replaceable or not os.path.exists(name):
        with replacing(name) as stream:
            stream.write(content.encode())
        return
    try:
        with open(name, "w", encoding="utf-8") as there:
            there.write(content)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), name) from None
