"""How much work a compiled module does: operations and bytes of every kernel, and the memory of what lies between.

`compile_region` records it in the manifest, and `profile` compares it with the time that the kernels take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm
    from tvm import tirx

STORAGE = ("relax.vm.alloc_storage", "relax.memory.alloc_storage")
FLOPS, OP = "graphwright.flops", "graphwright.op"  # what a kernel says of itself, as attributes of its function
GATHERS = ("take", "gather", "embedding")  # read as many elements of their table as they write


@dataclass(frozen=True)
class Work:
    """Of one module. kernels: name -> {"flops", "bytes", "op"}; None where sizes are only known at run time.
    activation_bytes: of all storage that the plan of its buffers allocates, outputs included.
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


def kernel_work(name: str, function: tirx.PrimFunc, arguments: Sequence[Any]) -> dict[str, Any]:
    """What one kernel does: {"flops", "bytes", "op"}. arguments: of a call of it, inputs and outputs."""
    attrs = function.attrs or {}
    op = str(attrs[OP]) if OP in attrs else _op(name)
    flops = float(attrs[FLOPS]) if FLOPS in attrs else _estimate(function)
    nbytes = _bytes(arguments, op)
    # Kernels count 0 operations where a size is known only at run time.
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
    if not sizes:
        return None
    if op.startswith(GATHERS):
        sizes = [min(size, sizes[-1]) for size in sizes]
    return sum(sizes)


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
