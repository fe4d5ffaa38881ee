"""Calls of our own kernels from converters: on CPUs, for float32, with sizes that are numbers or symbols."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax, tirx

from ..kernels.rows import Size
from .site import Dim, Site, dtype_of, int64, same


def for_kernels(site: Site, *indices: int) -> bool:
    """Whether our kernels may take these inputs, those of them that are given: float32 of known rank, on a CPU."""
    given = [site.x(i) for i in indices if site.has(i)]
    return site.target.is_cpu and all(
        dtype_of(x) == "float32" and isinstance(x.ty.shape, relax.ShapeExpr) for x in given
    )


def named(*shapes: Sequence[Dim]) -> list[tuple[Size, ...]]:
    """Shapes for a kernel: numbers as they are, names for symbolic sizes, the same for equal ones."""
    known: list[Dim] = []

    def name(dim: Dim) -> Size:
        if isinstance(dim, int):
            return dim
        for number, other in enumerate(known):
            if same(dim, other):
                return f"n{number}"
        known.append(dim)
        return f"n{len(known) - 1}"

    return [tuple(name(d) for d in shape) for shape in shapes]


def call(
    site: Site, kernel: tirx.PrimFunc, inputs: Sequence[tvm.ir.Expr], dims: Sequence[Dim], dtype: str = "float32"
) -> tvm.ir.Expr:
    """The kernel's output, of these dimensions."""
    return calls(site, kernel, inputs, [(dims, dtype)])[0]


def calls(
    site: Site, kernel: tirx.PrimFunc, inputs: Sequence[tvm.ir.Expr], outputs: Sequence[tuple[Sequence[Dim], str]]
) -> list[tvm.ir.Expr]:
    """The kernel's outputs, each of the given dimensions and element type."""
    function = site.bb.add_func(kernel, str(kernel.attrs["graphwright.op"]))
    types = [relax.TensorType([int64(d) for d in dims], dtype) for dims, dtype in outputs]
    tensors = [site.emit(i) for i in inputs]
    results = site.emit(relax.call_tir(function, tensors, types[0] if len(types) == 1 else types))
    if len(types) == 1:
        return [results]
    return [site.emit(relax.TupleGetItem(results, i)) for i in range(len(types))]
