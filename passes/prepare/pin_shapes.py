"""Give inputs the shapes the user asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from ..errors import InputError, did_you_mean


@dataclass(frozen=True)
class PinShapes(Pass):
    """Fix the shapes of inputs to those given with --pin.

        --pin X=1,3,8
        agraph (float[N,3,L] X) => (float[N,3,L] Y)   ->   agraph (float[1,3,8] X) => (float[1,3,8] Y)

    A symbol has one value in the whole model, so pinning one input pins every dimension of that name.
    Left alone: inputs that share no symbol with a pinned one, and types. Without pins it does nothing.
    A pin that does not fit (name, rank, a fixed dimension, two values for one symbol) is an error.
    """

    name: ClassVar[str] = "pin-shapes"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        inputs = _inputs(model)
        bindings = bound_symbols(model, ctx.pins)
        if not ctx.pins:
            return report
        before = {name: str(value.shape) for name, value in inputs.items()}
        for name, pinned in ctx.pins.items():
            inputs[name].shape = ir.Shape(pinned)
        for value in _values(model):
            if value.shape is not None:
                _substitute(value, bindings)
        for name, value in inputs.items():
            if before[name] != str(value.shape):
                report.changed("pin", name, f"{before[name]} -> {value.shape}")
            elif name not in ctx.pins and value.shape is not None and graph.static_shape(value) is None:
                report.skipped("pin", name, f"still dynamic: {value.shape}; pin it with --pin {name}=SHAPE")
        return report


def _inputs(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}


def bound_symbols(model: ir.Model, pins: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Symbol -> size of every dimension that `pins` (input name -> shape) fix. Raises InputError if they do not fit."""
    inputs = _inputs(model)
    bindings: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, pinned in pins.items():
        if isinstance(pinned, str | int) or not all(isinstance(dim, Integral) for dim in pinned):
            raise InputError(f"pin {name}={pinned!r} is no shape; expected whole numbers, as in (1, 3, 224, 224)")
        if name not in inputs:
            raise InputError(f"no input is called {name!r}; {did_you_mean(name, inputs)}")
        _bind(inputs[name], tuple(pinned), bindings, origin)
    return bindings


def _bind(value: ir.Value, pinned: tuple[int, ...], bindings: dict[str, int], origin: dict[str, str]) -> None:
    """Check `pinned` against the declared shape and note what its symbols become."""
    written = "x".join(map(str, pinned))
    if any(dim < 0 for dim in pinned):
        raise InputError(f"pin {value.name}={written}: a dimension cannot be negative; write its size")
    if value.shape is None:
        return
    if len(value.shape) != len(pinned):
        raise InputError(
            f"pin {value.name}={written} has {len(pinned)} dimensions, the input has {len(value.shape)}: "
            f"{value.shape}; give all of them"
        )
    for axis, (declared, size) in enumerate(zip(value.shape, pinned, strict=True)):
        if isinstance(declared, int):
            if declared not in (size, -1):  # some exporters write -1 for a free dimension
                raise InputError(
                    f"pin {value.name}={written}: dimension {axis} is {declared} in the model, not {size}; "
                    "only dynamic dimensions can be pinned"
                )
        elif (symbol := declared.value) is not None:
            where = f"{value.name}[{axis}]"
            if bindings.setdefault(symbol, size) != size:
                raise InputError(
                    f"pin {value.name}={written}: {where} and {origin[symbol]} are both {symbol!r}, "
                    f"pinned to {size} and {bindings[symbol]}; give them the same size"
                )
            origin.setdefault(symbol, where)


def _values(model: ir.Model) -> list[ir.Value]:
    """Every value of the main graph and its subgraphs; symbols of functions are their own."""
    found: list[ir.Value] = []
    for scope in graph.scopes(model):
        if scope.function is None:
            found.extend(scope.graph.inputs)
            found.extend(value for node in scope.graph for value in node.outputs)
    return found


def _substitute(value: ir.Value, bindings: dict[str, int]) -> None:
    """Replace bound symbols in the shape. An expression of symbols (`2*N`) is worked out if it can be, else
    forgotten: inference finds it again."""
    assert value.shape is not None
    dims: list[int | ir.SymbolicDim] = []
    changed = False
    for dim in value.shape:
        new: int | ir.SymbolicDim = dim
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            if dim.value in bindings:
                new = bindings[dim.value]
            elif not dim.value.isidentifier() and any(
                word in bindings for word in re.findall(r"[A-Za-z_]\w*", dim.value)
            ):
                new = _evaluate(dim, bindings)
        changed = changed or new is not dim
        dims.append(new)
    if changed:
        value.shape = ir.Shape(dims)


def _evaluate(dim: ir.SymbolicDim, bindings: dict[str, int]) -> int | ir.SymbolicDim:
    try:
        return dim.evaluate(bindings)
    except Exception:  # names such as "seq.len" or "batch size" are not expressions
        return ir.SymbolicDim(None)
