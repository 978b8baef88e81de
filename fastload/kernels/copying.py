"""Moving bytes inside a kernel.

`copy_bytes` is for short texts. A slice assignment `out[:n] = source` would do the same, but makes numba compile its
machinery for broadcasting and overlap: 1.8 s the first time in a process and 0.2 s for each use, where this loop takes
0.06. LLVM vectorises it, and its indexes are checked where numba is told to.

`copy_range` is the C library's memcpy, a third faster from a few hundred bytes on; whoever calls it has checked
everything. `prefetch` asks for a cache line that will be read soon, into the second cache level; it never faults.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import intp, types, uint8, void
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastload.kernels.jit import array_in, array_out, kernel

__all__ = ["copy_bytes", "copy_range", "prefetch"]

Bytes = NDArray[np.uint8]

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # LLVM's words for what is fetched, and how near


@kernel(void(array_in(uint8), array_out(uint8)))
def copy_bytes(source: Bytes, out: Bytes) -> None:
    """Copy all of `source` to the start of `out`, which must be long enough. They do not overlap."""
    for i in range(source.size):
        out[i] = source[i]


if numba.config.DISABLE_JIT:

    def copy_range(source: Bytes, at: int, out: Bytes, to: int, size: int) -> None:
        """Copy `size` bytes from `source[at]` to `out[to]`."""
        out[to : to + size] = source[at : at + size]

    def prefetch(source: Bytes, at: int) -> None:
        """Ask for the cache line of `source[at]`."""

else:

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_range(typing: Any, source: Any, at: Any, out: Any, to: Any, size: Any) -> Any:
        """Copy `size` bytes from `source[at]` to `out[to]`."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            from_, into = _pointer(context, builder, signature, args, 0), _pointer(context, builder, signature, args, 2)
            cgutils.raw_memcpy(builder, into, from_, args[4], 1)
            return context.get_dummy_value()

        return types.void(source, intp, out, intp, intp), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def prefetch(typing: Any, source: Any, at: Any) -> Any:
        """Ask for the cache line of `source[at]`."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(context, builder, signature, args, 0)
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
            builder.call(function, [pointer, word(_READ), word(_SECOND_LEVEL), word(_DATA)])
            return context.get_dummy_value()

        return types.void(source, intp), generate

    def _pointer(context: Any, builder: Any, signature: Any, args: Any, number: int) -> Any:
        """The address of the element that argument `number`, an array, and the index after it name."""
        array = context.make_array(signature.args[number])(context, builder, args[number])
        return builder.gep(array.data, [args[number + 1]])
