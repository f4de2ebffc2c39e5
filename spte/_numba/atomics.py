"""Atomic operations on 64-bit words of arrays that several threads use, with their plain-Python twins; and which variant a kernel is.

Operations that read and write in one step are sequentially consistent, as x86's locked ones; `load` acquires, `store` releases. `array`
is C-contiguous, of uint64 or int64; `index` is that of ``array.flat``; what is stored has the array's type.
"""

from __future__ import annotations

import threading
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from spte._numba.jit import PLAIN


class Shared:
    """Base of a NamedTuple of arrays that several kernels use at once: code that asks `is_shared` differs for it."""


if PLAIN:
    one_at_a_time: Any = threading.Lock()

    def is_shared(group: Any) -> bool:
        """Tell whether `group` is one that several kernels use at once; known when a kernel is compiled."""
        return isinstance(group, Shared)

    def load(array: Any, index: Any) -> Any:
        """Return a word as it is now, once; what is loaded after it is not older."""
        return array.reshape(-1)[index]

    def store(array: Any, index: Any, value: Any) -> None:
        """Store `value`; a thread that sees it also sees all that was stored before."""
        with one_at_a_time:  # not between the two halves of another operation
            array.reshape(-1)[index] = value

    def compare_exchange(array: Any, index: Any, expected: Any, value: Any) -> Any:
        """Store `value` if the word is `expected`; returns what it was, in one step."""
        flat = array.reshape(-1)
        with one_at_a_time:
            old = flat[index]
            if old == expected:
                flat[index] = value
        return old

    def swap(array: Any, index: Any, value: Any) -> Any:
        """Store `value`; returns what the word was, in one step."""
        flat = array.reshape(-1)
        with one_at_a_time:
            old, flat[index] = flat[index], value
        return old

    def fetch_or(array: Any, index: Any, bits: Any) -> Any:
        """Set `bits`; returns what the word was, in one step."""
        flat = array.reshape(-1)
        with one_at_a_time:
            old = flat[index]
            flat[index] = old | bits
        return old

    def fetch_and(array: Any, index: Any, bits: Any) -> Any:
        """Leave only `bits`; returns what the word was, in one step."""
        flat = array.reshape(-1)
        with one_at_a_time:
            old = flat[index]
            flat[index] = old & bits
        return old

    def fetch_add(array: Any, index: Any, count: Any) -> Any:
        """Add `count`; returns what the word was, in one step."""
        flat = array.reshape(-1)
        with one_at_a_time:
            old = flat[index]
            flat[index] = old + count
        return old

    def relax() -> None:
        """Wait a moment before the next look at a word that another thread is to change."""

else:

    def _place(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.gep(view.data, [args[1]])

    @intrinsic
    def is_shared(typingctx: Any, group: Any) -> Any:
        """Tell whether `group` is one that several kernels use at once; known when a kernel is compiled."""
        shared = issubclass(group.instance_class, Shared)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return ir.Constant(ir.IntType(1), int(shared))

        return types.boolean(group), codegen

    @intrinsic
    def load(typingctx: Any, array: Any, index: Any) -> Any:
        """Return a word as it is now, once; what is loaded after it is not older."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load_atomic(_place(context, builder, signature, args), "acquire", 8)

        return array.dtype(array, types.int64), codegen

    @intrinsic
    def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
        """Store `value`; a thread that sees it also sees all that was stored before."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store_atomic(args[2], _place(context, builder, signature, args), "release", 8)
            return context.get_dummy_value()

        return types.void(array, types.int64, array.dtype), codegen

    @intrinsic
    def compare_exchange(typingctx: Any, array: Any, index: Any, expected: Any, value: Any) -> Any:
        """Store `value` if the word is `expected`; returns what it was, in one step."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = _place(context, builder, signature, args)
            return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "seq_cst"), 0)

        return array.dtype(array, types.int64, array.dtype, array.dtype), codegen

    def _read_modify_write(op: str, doc: str) -> Any:
        def operation(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.atomic_rmw(op, _place(context, builder, signature, args), args[2], "seq_cst")

            return array.dtype(array, types.int64, array.dtype), codegen

        operation.__doc__ = doc
        return intrinsic(operation)

    swap = _read_modify_write("xchg", "Store `value`; returns what the word was, in one step.")
    fetch_or = _read_modify_write("or", "Set `bits`; returns what the word was, in one step.")
    fetch_and = _read_modify_write("and", "Leave only `bits`; returns what the word was, in one step.")
    fetch_add = _read_modify_write("add", "Add `count`; returns what the word was, in one step.")

    @intrinsic
    def relax(typingctx: Any) -> Any:
        """Wait a moment before the next look at a word that another thread is to change."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), codegen
