"""All that knows numba, beside its neighbours: options, cache directory and its key, intrinsics with their plain-Python twins."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_name
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CONFIG: Any = numba.config
PLAIN = bool(CONFIG.DISABLE_JIT)  # NUMBA_DISABLE_JIT=1: every kernel is its plain-Python twin
PREFETCHES = 64 if get_host_cpu_name().startswith("znver") else 16  # lines that a core fetches at once; machine code holds it
HERE = Path(__file__).parent.parent
WITHOUT_KERNELS = ("access.py", "bits.py", "_numba/", "arrays/")  # what kernels are made of beside the files with kernels


class Kernel(NamedTuple):
    """One kernel, as the tests look at it; both are numba's dispatchers, or the function itself with NUMBA_DISABLE_JIT=1."""

    entry: Any
    """What Python calls; None if only kernels call it."""
    part: Any
    """What other kernels call."""


KERNELS: list[Kernel] = []  # all, in order of definition


def _linker() -> Any:
    """Return `spte._numba.link`, or None: SPTE_LINK=0 asks for that, or this numba is not as it needs it (one warning)."""
    choice = os.environ.get("SPTE_LINK") or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"SPTE_LINK={choice}; take 1, or 0 to have numba compile each kernel by itself")
    if PLAIN or choice == "0":
        return None
    try:
        from spte._numba import link
    except (ImportError, AttributeError) as e:
        told = f"numba {numba.__version__} is not as spte._numba.link needs it ({e}): kernels take longer to compile and to load"
        warnings.warn(f"{told}; SPTE_LINK=0 says that this is fine", RuntimeWarning, stacklevel=2)
        return None
    return link


LINK = _linker()


def _digest() -> str:
    """Return a key over all sources that machine code depends on: numba stamps only the file of the kernel itself."""
    h = hashlib.sha256()
    for path in sorted(HERE.rglob("*.py")):
        name = path.relative_to(HERE).as_posix()
        if "spte._numba.jit import" in (text := path.read_text()) or name.startswith(WITHOUT_KERNELS):
            h.update(f"{name}\0{text}\0".encode())
    for part in (numba.__version__, np.__version__, sys.version, bool(CONFIG.BOUNDSCHECK), LINK is not None, PREFETCHES):
        h.update(str(part).encode())
    return h.hexdigest()[:20]


def _cache_dir() -> str | None:
    """Return the writable cache directory of this state of the sources, or None (with one warning)."""
    base = os.environ.get("SPTE_CACHE_DIR") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "spte")
    path = os.path.join(base, _digest())
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        warnings.warn(f"no compile cache: {base} is not writable ({e.strerror}); set SPTE_CACHE_DIR", RuntimeWarning, stacklevel=2)
        return None
    return path


CACHE_DIR = None if PLAIN else _cache_dir()


def _enable_cache(dispatcher: Any) -> None:
    if CACHE_DIR is None:
        return
    old, CONFIG.CACHE_DIR = CONFIG.CACHE_DIR, CACHE_DIR
    try:
        dispatcher.enable_caching()
    finally:
        CONFIG.CACHE_DIR = old


def kernel(func: Callable[..., Any], *, noinline: bool = False, inner: bool = False) -> Callable[..., Any]:
    """Compile `func` lazily, without the GIL, cached under the key of all sources; plain Python with NUMBA_DISABLE_JIT=1.

    It becomes part of its callers, unless `noinline`; Python can not call it if it is `inner`.
    """
    if PLAIN:
        KERNELS.append(Kernel(None if inner else func, func))
        return func
    # No reference counts: kernels allocate nothing, and counting each array of a NamedTuple at each call made a faulting write
    # take 950 ns instead of 21 ns.
    options: dict[str, Any] = {"nopython": True, "nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
    inlined = options | {"forceinline": not noinline}
    if LINK is None:
        jit: Any = numba.jit
        made = part = jit(**inlined, no_cpython_wrapper=inner)(func)
    else:
        part = LINK.Part(func, inlined | {"no_cpython_wrapper": True})
        made = part if inner else LINK.Entry(func, options, part)
    if not inner:
        _enable_cache(made)
    KERNELS.append(Kernel(None if inner else made, part))
    return cast(Callable[..., Any], made)


def kernel_noinline(func: Callable[..., Any]) -> Callable[..., Any]:
    """As `kernel`, for work on a block: a call stays a call, because loops inlined beside large code ran 1.5 times as long."""
    return kernel(func, noinline=True, inner=True)


def kernel_noinline_entry(func: Callable[..., Any]) -> Callable[..., Any]:
    """As `kernel_noinline`, for work that Python asks for too."""
    return kernel(func, noinline=True)


def helper(func: Callable[..., Any]) -> Callable[..., Any]:
    """As `kernel`, for other kernels only."""
    return kernel(func, inner=True)


def is_warm() -> bool:
    """Tell whether the compile cache of this state of the sources holds machine code."""
    return PLAIN or (CACHE_DIR is not None and any(Path(CACHE_DIR).rglob("*.nbc")))


if PLAIN:

    def ctz(x: np.uint64) -> int:
        """Return the number of trailing zero bits of `x`, which is not 0."""
        value = int(x)
        return (value & -value).bit_length() - 1

    def popcount(x: np.uint64) -> int:
        """Return the number of one bits of `x`."""
        return int(x).bit_count()

    def prefetch(array: Any, index: Any) -> None:
        """Prefetch the cache line of ``array.flat[index]``; no effect in plain Python."""

else:

    def _unary(name: str) -> Any:
        @intrinsic
        def bit_count(typingctx: Any, x: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                i64 = ir.IntType(64)
                if name == "llvm.cttz":
                    fn = builder.module.declare_intrinsic(name, [i64], ir.FunctionType(i64, [i64, ir.IntType(1)]))
                    return builder.call(fn, [args[0], ir.Constant(ir.IntType(1), 1)])
                return builder.call(builder.module.declare_intrinsic(name, [i64]), [args[0]])

            return types.int64(types.uint64), codegen

        return bit_count

    ctz = _unary("llvm.cttz")
    popcount = _unary("llvm.ctpop")

    @intrinsic
    def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
        """Prefetch the cache line of ``array.flat[index]`` of a C-contiguous array."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            view = context.make_array(signature.args[0])(context, builder, args[0])
            ptr = builder.gep(view.data, [args[1]])
            i8p, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [i8p, i32, i32, i32])
            fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
            builder.call(fn, [builder.bitcast(ptr, i8p), *(ir.Constant(i32, v) for v in (1, 3, 1))])
            return context.get_dummy_value()

        return types.void(array, types.int64), codegen
