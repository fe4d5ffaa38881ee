"""How much work a compiled module does: operations and bytes of every kernel, and the memory of what lies between.

`compile_region` records it in the manifest, and `profile` compares it with the time that the kernels take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import tvm
    from tvm import tirx

STORAGE = ("relax.vm.alloc_storage", "relax.memory.alloc_storage")
# What a kernel says of itself, as attributes of its function. TIMES: pairs of numbers, parameter and axis, whose sizes
# the operations are to be multiplied with.
FLOPS, TIMES, OP = "graphwright.flops", "graphwright.flops_times", "graphwright.op"
# A number, the name of a size that is known only at run time, or where one is: (parameter, axis).
Factor: TypeAlias = "int | str | tuple[int, int]"
GATHERS = ("take", "gather", "embedding")  # read as many elements of their table as they write


@dataclass(frozen=True)
class Work:
    """Of one module. kernels: name -> the fields of `KernelWork`. activation_bytes: of all storage that the plan of its
    buffers allocates, outputs included; None where sizes are only known at run time.
    """

    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    activation_bytes: int | None = None


def work_of(module: tvm.IRModule) -> Work:
    """module: after all lowering, before code generation."""
    import tvm
    from tvm import relax, tirx

    functions = {variable.name_hint: function for variable, function in module.functions_items()}
    calls: dict[str, list[Any]] = {}
    sizes: list[int | None] = []

    def visit(expression: Any) -> None:
        if not isinstance(expression, tvm.ir.Call):
            return
        if isinstance(expression.op, tvm.ir.GlobalVar):
            calls.setdefault(expression.op.name_hint, list(expression.args))
        elif getattr(expression.op, "name", "") in STORAGE:
            sizes.append(_storage_bytes(expression))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    kernels = {
        name: kernel_work(name, functions[name], arguments)
        for name, arguments in calls.items()
        if isinstance(functions.get(name), tirx.PrimFunc)
    }
    known = [size for size in sizes if size is not None]
    return Work(kernels, sum(known) if len(known) == len(sizes) else None)


def with_flops(function: tirx.PrimFunc, factors: Iterable[Factor]) -> tirx.PrimFunc:
    """The kernel with the word that its operations are the product of the factors."""
    each = 1
    times: list[int] = []
    for factor in factors:
        if isinstance(factor, int):
            each *= factor
        else:
            times += _place(function, factor) if isinstance(factor, str) else factor
    function = function.with_attr(FLOPS, each)
    return function.with_attr(TIMES, times) if times else function


def _place(function: tirx.PrimFunc, name: str) -> tuple[int, int]:
    """The first parameter and axis whose size has that name."""
    for number, parameter in enumerate(function.params):
        for axis, size in enumerate(getattr(parameter.ty, "shape", ())):
            if getattr(size, "name", None) == name:
                return number, axis
    raise ValueError(f"no parameter has an axis of the size {name}")


def kernel_work(name: str, function: tirx.PrimFunc, arguments: Sequence[Any]) -> dict[str, Any]:
    """What one kernel does: {"flops", "bytes", "op"}. arguments: of a call of it, inputs and outputs."""
    attrs = function.attrs or {}
    op = str(attrs[OP]) if OP in attrs else _op(name)
    flops = float(attrs[FLOPS]) if FLOPS in attrs else _estimate(function)
    nbytes = _bytes(arguments, op)
    if flops and TIMES in attrs:
        places = [int(n) for n in attrs[TIMES]]
        times = [list(place) for place in zip(places[::2], places[1::2], strict=True)]
        return {"flops": {"each": flops, "times": times}, "bytes": nbytes, "op": op}
    # TVM counts 0 operations where a size is known only at run time.
    return {"flops": None if not flops and nbytes is None else flops, "bytes": nbytes, "op": op}


def _op(name: str) -> str:
    """fused_conv2d12_add3_clip -> conv2d_add_clip."""
    return re.sub(r"(?<=[a-z_])\d+(?=_|$)", "", name.removeprefix("fused_"))


def _estimate(function: tirx.PrimFunc) -> float | None:
    """TVM's count of the arithmetic in the loops; None where it meets what it cannot count."""
    import tvm
    from tvm.s_tir.analysis import estimate_tir_flops

    try:
        return float(estimate_tir_flops(tvm.IRModule({"main": function})))
    except Exception:  # symbolic loops, calls into LLVM: whatever it does not know is an error
        return None


def _bytes(arguments: Sequence[Any], op: str) -> int | None:
    """Bytes of all tensors, each once: what must move at least between memory and processor."""
    sizes = []
    for argument in arguments:
        dims = getattr(getattr(argument.ty, "shape", None), "values", None)
        if dims is None:  # a scalar of the program, or a tensor of unknown rank
            if hasattr(argument.ty, "shape"):
                return None
            continue
        known = [_number(dim) for dim in dims]
        if None in known:
            return None
        sizes.append(math.prod(dim for dim in known if dim is not None) * _itemsize(str(argument.ty.dtype.dtype)))
    return moved(sizes, op) if sizes else None


def moved(sizes: Sequence[int], op: str) -> int:
    """Bytes that must move, of tensors of these bytes, the result last."""
    return sum(min(size, sizes[-1]) for size in sizes) if op.startswith(GATHERS) else sum(sizes)


def _storage_bytes(call: Any) -> int | None:
    shape = call.args[0]
    numbers = [_number(value) for value in getattr(shape, "values", [])]
    return numbers[0] if len(numbers) == 1 else None


def _number(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    known = getattr(value, "value", None)  # an IntImm
    return known if isinstance(known, int) else None


def _itemsize(dtype: str) -> int:
    import tvm

    kind = tvm.DataType(dtype)
    return (kind.bits * kind.lanes + 7) // 8
