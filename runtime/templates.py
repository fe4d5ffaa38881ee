"""Kernel templates: how the loops of an operator are written by us.

An anchor is a function whose body is not written yet: a stub with the template's name and its parameters as an
attribute. Relax fuses elementwise operators behind it, and `claiming` writes one kernel for the whole group.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import elements
from .elements import Size
from .kernels.vectors import Buffer, Expr, Vectors
from .target import Target
from .work import FLOPS

log = logging.getLogger("graphwright")

ANCHOR = "graphwright.anchor"
FUSES = 4  # Relax's operator pattern of a function into whose output elementwise operators are fused
OPAQUE = 8

# Called with a vector of results, the values of the output's axes of which the last is that of the first lane, and how
# many lanes exist (None: all).
Store = Callable[[Expr, Sequence[Expr], "int | Expr | None"], None]


@dataclass(frozen=True)
class Body:
    """What a template gets to write its loops: flat buffers of the anchor's inputs, and `store` for its results.

    Shapes hold numbers, and symbols where a size is known at run time. merged: axes of the result that `store` takes as
    one: place (0, i) of two of them may stand for the i-th.
    """

    vectors: Vectors
    target: Target
    inputs: Sequence[Buffer]
    shapes: Sequence[Sequence[Size]]
    out_shape: Sequence[Size]
    store: Store
    index: str
    merged: Sequence[Sequence[int]] = ()


Template = Callable[[dict[str, Any], Body], None]
TEMPLATES: dict[str, Template] = {}
PER_ITEM: set[str] = set()


def template(name: str, per_item: bool = False) -> Callable[[Template], Template]:
    """Register the writer of an anchor's loops: a function (parameters of the anchor, Body).

    per_item: the first axis of the result and of the inputs that have it is a batch. Where its size is known only at
    run time the template is given one item, and is run for each.
    """

    def register(function: Template) -> Template:
        TEMPLATES[name] = function
        if per_item:
            PER_ITEM.add(name)
        return function

    return register


def anchor(
    bb: relax.BlockBuilder, name: str, parameters: dict[str, Any], inputs: Sequence[Any], out: Any, flops: int = 0
) -> Any:
    """A call of template `name`. out: the Relax type of the result. parameters: what JSON can hold. flops: operations,
    where sizes of the result that are known only at run time count as 1."""
    dims = [*(i.ty for i in inputs), out]
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        spec = json.dumps({"template": name, "parameters": parameters}, sort_keys=True)
        T.func_attr({ANCHOR: spec, "op_pattern": FUSES, "tirx.noalias": True, FLOPS: flops})
        symbols: dict[Any, Any] = {}
        for number, kind in enumerate(dims):
            shape = [elements.renamed(d, symbols) for d in kind.shape.values]
            T.match_buffer(T.arg(f"x{number}", T.handle()), shape, str(kind.dtype.dtype))
        with T.sblock("root"):
            T.evaluate(tirx.const(0, "int32"))
    stub = bb.add_func(builder.get(), name)
    return bb.emit(relax.call_tir(stub, list(inputs), out))


def spec_of(function: tirx.PrimFunc) -> dict[str, Any] | None:
    """Template and parameters of an anchor's stub; None for other functions."""
    text = (function.attrs or {}).get(ANCHOR)
    return json.loads(str(text)) if text is not None else None
