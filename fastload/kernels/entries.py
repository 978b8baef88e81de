"""Entries: the C functions behind the builtin functions that Python calls kernels by (METH_FASTCALL).

An entry looks at what it is given, lets go of the GIL, calls the kernel, takes the GIL back and returns what the kernel
did. It is written in LLVM's language here, once for each signature. Its `self` is (numpy.ndarray, refuse),
so that there is no address in it; `refuse(place, given)` raises what is to be said about an argument.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from itertools import takewhile
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from fastload.kernels import loading
from fastload.kernels.declare import Array, Entry, Type, boolean, float64, int64

__all__ = ["add_entry"]

# numpy's types; those of 64 bits go by two names.
_LETTERS = {
    "boolean": ("?",),
    "float32": ("f",),
    "float64": ("d",),
    "int32": ("i",),
    "int64": ("l", "q"),
    "uint8": ("B",),
    "uint64": ("L", "Q"),
}

_BIT, _BYTE, _INT32, _INT64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = _BYTE.as_pointer()


def add_entry(library: Any, context: Any, entry: Entry, made: Any) -> None:
    """Add a kernel's entry to a library that has the kernel, which numba describes as `made`."""
    module = library.create_ir_module(entry.symbol)
    conventions, wanted = context.call_conv, entry.signature.arguments
    kind = conventions.get_function_type(made.restype, made.argtypes)
    callee = ir.Function(module, kind, made.llvm_func_name)
    call = _Call(module, entry.symbol)
    call.refuse_unless(call.builder.icmp_signed("==", call.count, _INT64(len(wanted))), len(wanted))
    taken = [_taken(context, call, place, *each) for place, each in enumerate(zip(wanted, made.argtypes, strict=True))]
    state = call.python(_POINTER, "PyEval_SaveThread")
    status, result = conventions.call_function(call.builder, callee, made.restype, made.argtypes, taken)
    call.python(ir.VoidType(), "PyEval_RestoreThread", state)
    call.refuse_unless(call.builder.not_(status.is_error), -1)
    if entry.signature.returns == int64:
        returned = call.python(_POINTER, "PyLong_FromLongLong", result)
    elif entry.signature.returns == boolean:
        returned = call.python(_POINTER, "PyBool_FromLong", call.builder.zext(result, _INT64))
    else:
        returned = call.python(_POINTER, "Py_BuildValue", call.text(""), is_variadic=True)
    call.builder.ret(returned)
    library.add_ir_module(module)


def _taken(context: Any, call: _Call, place: int, wanted: Type, kind: Any) -> ir.Value:
    """An argument, checked, as numba's functions take it."""
    given = call.argument(place)
    if not isinstance(wanted, Array):
        return call.number(given, wanted)
    call.refuse_unless(_is_array(call, given, wanted), place, given)
    array = context.make_array(kind)(context, call.builder)
    of = call.field(given, loading.Header, "shape", _INT64.as_pointer())
    shape = [call.builder.load(call.builder.gep(of, [_INT32(axis)])) for axis in range(wanted.dimensions)]
    item_bytes = np.dtype(_LETTERS[wanted.element.name][0]).itemsize
    strides: list[Any] = [_INT64(item_bytes)]
    for length in reversed(shape[1:]):
        strides.insert(0, call.builder.mul(strides[0], length))
    data = call.field(given, loading.Header, "data", array.data.type)
    populate_array(array, data, shape, strides, item_bytes, meminfo=None)
    return array._getvalue()


def _is_array(call: _Call, given: ir.Value, wanted: Array) -> ir.Value:
    """Whether a Python object is an array as it is wanted; what else it may be is shorter than an array."""
    builder = call.builder
    is_any = builder.icmp_unsigned("==", call.field(given, loading.Header, "type", _POINTER), call.array_type)
    before = builder.block
    with builder.if_then(is_any, likely=True):
        needed = loading.CONTIGUOUS | loading.ALIGNED | (loading.WRITABLE if wanted.is_writable else 0)
        flags = builder.and_(call.field(given, loading.Header, "flags", _INT32), _INT32(needed))
        dimensions = call.field(given, loading.Header, "dimensions", _INT32)
        descr = call.field(given, loading.Header, "descr", _POINTER)
        number = call.field(descr, loading.Descr, "number", _INT32)
        numbers = [np.dtype(each).num for each in _LETTERS[wanted.element.name]]
        swapped = _BYTE(ord(">" if sys.byteorder == "little" else "<"))
        is_wanted = functools.reduce(
            builder.and_,
            [
                builder.icmp_unsigned("==", flags, _INT32(needed)),
                builder.icmp_unsigned("==", dimensions, _INT32(wanted.dimensions)),
                functools.reduce(builder.or_, [builder.icmp_unsigned("==", number, _INT32(each)) for each in numbers]),
                builder.icmp_unsigned("!=", call.field(descr, loading.Descr, "byteorder", _BYTE), swapped),
            ],
        )
        inside = builder.block
    found = builder.phi(_BIT)
    found.add_incoming(_BIT(0), before)
    found.add_incoming(is_wanted, inside)
    return found


class _Call:
    """The code of an entry while it is written, and what it says to Python."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self._module = module
        kind = ir.FunctionType(_POINTER, [_POINTER, _POINTER.as_pointer(), _INT64])
        function = ir.Function(module, kind, name)
        self.context, self._arguments, self.count = function.args
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.array_type = self.python(_POINTER, "PyTuple_GetItem", self.context, _INT64(0))

    def argument(self, place: int) -> ir.Value:
        """The Python object at a place."""
        return self.builder.load(self.builder.gep(self._arguments, [_INT64(place)]))

    def number(self, given: ir.Value, wanted: Type) -> ir.Value:
        """A number as C has it. What is none is refused by Python."""
        if wanted == float64:
            value = self.python(ir.DoubleType(), "PyFloat_AsDouble", given)
            is_odd = self.builder.fcmp_ordered("==", value, ir.DoubleType()(-1.0))
        elif wanted == int64:
            value = self.python(_INT64, "PyLong_AsLongLong", given)
            is_odd = self.builder.icmp_signed("==", value, _INT64(-1))
        else:
            truth = self.python(_INT32, "PyObject_IsTrue", given)
            value = self.builder.icmp_signed("==", truth, _INT32(1))
            is_odd = self.builder.icmp_signed("==", truth, _INT32(-1))
        with self.builder.if_then(is_odd, likely=False):
            error = self.python(_POINTER, "PyErr_Occurred")
            with self.builder.if_then(self.builder.icmp_unsigned("!=", error, _POINTER(None))):
                self.builder.ret(_POINTER(None))
        return value

    def refuse_unless(self, is_right: ir.Value, place: int, given: ir.Value | None = None) -> None:
        """Have Python raise an error about what is at this place."""
        with self.builder.if_then(self.builder.not_(is_right), likely=False):
            refuse = self.python(_POINTER, "PyTuple_GetItem", self.context, _INT64(1))
            about = self.context if given is None else given
            arguments = refuse, self.text("nO"), _INT64(place), about
            self.builder.ret(self.python(_POINTER, "PyObject_CallFunction", *arguments, is_variadic=True))

    def python(self, returns: ir.Type, name: str, *arguments: ir.Value, is_variadic: bool = False) -> ir.Value:
        """Call one of Python's functions. A variadic one has as many arguments fixed as come first and are pointers."""
        assert name in loading.PYTHON, name
        fixed = list(takewhile(lambda kind: not is_variadic or kind == _POINTER, [each.type for each in arguments]))
        kind = ir.FunctionType(returns, fixed, var_arg=is_variadic)
        return self.builder.call(cgutils.get_or_insert_function(self._module, kind, name), arguments)

    def text(self, text: str) -> ir.Value:
        """A constant of C."""
        data = cgutils.make_bytearray(text.encode() + b"\0")
        return self.builder.bitcast(cgutils.global_constant(self._module, "text", data), _POINTER)

    def field(self, base: ir.Value, of: type[ctypes.Structure], name: str, kind: ir.Type) -> ir.Value:
        """What is in a structure of C's."""
        place = self.builder.gep(base, [_INT64(getattr(of, name).offset)])
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()))
