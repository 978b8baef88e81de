"""The code of functions that kernels call and that cannot be said in Python; see `jit.generated`. For the compiler."""

from __future__ import annotations

import time
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from fastload.kernels.copying import LINE_BYTES

__all__ = [
    "address_of",
    "array_at",
    "copy_line_past_caches",
    "copy_range",
    "monotonic_ns",
    "order_writes",
    "prefetch",
    "scratch",
    "yield_processor",
]

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # LLVM's words for what is fetched, and how near


@intrinsic  # type: ignore[untyped-decorator]
def address_of(typing: Any, array: Any) -> Any:
    """Where it begins."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_range(typing: Any, source: Any, at: Any, out: Any, to: Any, size: Any) -> Any:
    """The C library's memcpy."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_, into = _pointer(context, builder, signature, args, 0), _pointer(context, builder, signature, args, 2)
        cgutils.raw_memcpy(builder, into, from_, args[4], 1)
        return context.get_dummy_value()

    return types.void(source, types.intp, out, types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def copy_line_past_caches(typing: Any, source: Any, at: Any, out: Any, to: Any) -> Any:
    """Plain loads, and stores that LLVM calls non-temporal, which it takes to be aligned by what they write."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_, into = _pointer(context, builder, signature, args, 0), _pointer(context, builder, signature, args, 2)
        line = ir.VectorType(ir.IntType(64), LINE_BYTES // 8)
        value = builder.load(builder.bitcast(from_, line.as_pointer()), align=1)
        store = builder.store(value, builder.bitcast(into, line.as_pointer()), align=LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, out, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def order_writes(typing: Any) -> Any:
    """The strongest fence that there is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, source: Any, at: Any) -> Any:
    """The processor's own instruction."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, 0)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, word(_READ), word(_SECOND_LEVEL), word(_DATA)])
        return context.get_dummy_value()

    return types.void(source, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def array_at(typing: Any, address: Any, length: Any, dtype: Any) -> Any:
    """An array over memory that another object owns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_data_type(dtype.dtype)
        array = context.make_array(signature.return_type)(context, builder)
        item_bytes = context.get_value_type(types.intp)(context.get_abi_sizeof(kind))
        data = builder.inttoptr(args[0], kind.as_pointer())
        populate_array(array, data, [args[1]], [item_bytes], item_bytes, meminfo=None)
        return array._getvalue()

    return types.Array(dtype.dtype, 1, "C")(types.intp, types.intp, dtype), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def scratch(typing: Any, length: Any, dtype: Any) -> Any:
    """An array in the frame of the function that calls this."""
    count = length.literal_value  # it is a constant, and not large

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_data_type(dtype.dtype)
        array = context.make_array(signature.return_type)(context, builder)
        data = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(kind, count)), kind.as_pointer())
        item_bytes = context.get_abi_sizeof(kind)
        intp = context.get_value_type(types.intp)
        populate_array(array, data, [intp(count)], [intp(item_bytes)], item_bytes, meminfo=None)
        return array._getvalue()

    return types.Array(dtype.dtype, 1, "C")(length, dtype), generate


@intrinsic  # type: ignore[untyped-decorator]
def monotonic_ns(typing: Any) -> Any:
    """The C library's clock_gettime, whose struct timespec is two numbers: seconds and nanoseconds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, clock = ir.IntType(64), ir.IntType(32)
        kind = ir.LiteralStructType([number, number])
        now = cgutils.alloca_once(builder, kind)
        function = ir.FunctionType(clock, [clock, kind.as_pointer()])
        builder.call(
            cgutils.get_or_insert_function(builder.module, function, "clock_gettime"),
            [clock(time.CLOCK_MONOTONIC), now],
        )
        second, nanosecond = (builder.load(cgutils.gep_inbounds(builder, now, 0, part)) for part in range(2))
        return builder.add(builder.mul(second, number(1_000_000_000)), nanosecond)

    return types.int64(), generate


@intrinsic  # type: ignore[untyped-decorator]
def yield_processor(typing: Any) -> Any:
    """The C library's sched_yield."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _pointer(context: Any, builder: Any, signature: Any, args: Any, number: int) -> Any:
    """The address of the element that argument `number`, an array, and the index after it name."""
    array = context.make_array(signature.args[number])(context, builder, args[number])
    return builder.gep(array.data, [args[number + 1]])
