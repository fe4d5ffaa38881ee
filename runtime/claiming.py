"""Fused groups of a Relax module become kernels of our own.

`claim` writes one kernel for each group that an anchor of `templates` begins, with the elementwise part as the epilogue
on the anchor's registers, and one for each chain of elementwise operators alone. Groups that a template cannot take
stay for the default schedule; an anchor in such a group stands alone.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..passes.errors import CompileError
from . import elements
from .elements import NotElementwise, Size, Source, Symbol, Tree
from .kernels import moves
from .kernels.elementwise import emit_elementwise
from .kernels.emitter import TreeEmitter
from .kernels.vectors import Buffer, Expr, Vectors
from .target import Target
from .templates import ANCHOR, OPAQUE, PER_ITEM, TEMPLATES, Body, spec_of
from .work import FLOPS, with_flops

log = logging.getLogger("graphwright")

# Functions such as exp, of twenty operations and more, that an epilogue computes in all places of a kernel that store
# results. Unrolled kernels have few such places, mostly under 100; code far beyond that takes minutes to compile.
MOST_FUNCTIONS = 256


# --- groups -----------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call_tir: the function and its name, its arguments, the variable that is bound to the result.

    given: all arguments, sizes that it is told among them.
    """

    name: str
    function: tirx.PrimFunc
    given: list[Any]
    var: Any
    out: Any

    @functools.cached_property
    def arguments(self) -> list[Any]:
        """The tensors."""
        return [a for a in self.given if isinstance(a.ty, relax.TensorType)]

    @functools.cached_property
    def anchor(self) -> dict[str, Any] | None:
        return spec_of(self.function)


def _call_of(value: Any, var: Any, module: tvm.IRModule) -> _Call | None:
    """A binding's value as a call of a TIR function with one output, else None."""
    if not isinstance(value, tvm.ir.Call) or getattr(value.op, "name", "") != "relax.call_tir":
        return None
    function = module[value.args[0]]
    if not isinstance(function, tirx.PrimFunc):
        return None
    given = list(value.args[1].fields)
    out = value.ty_args[0]
    if isinstance(out, relax.TensorType) and isinstance(out.shape, relax.ShapeExpr):
        return _Call(value.args[0].name_hint, function, given, var, out)
    return None


def _group_calls(function: relax.Function, module: tvm.IRModule) -> list[_Call] | None:
    """The calls of a fused function, in order; None when there is anything else in it."""
    calls = []
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Var):
                continue
            call = _call_of(value, binding.var, module)
            if call is None:
                return None
            calls.append(call)
    return calls


class _Shapes:
    """Shapes of a group's tensors in the symbols of the kernel that is written for it.

    A symbol is a size of its own in one of the tensors. An expression of sizes of which one is none there is a symbol
    as a whole.
    """

    def __init__(self, kinds: Sequence[Any]) -> None:
        self.symbols: dict[Any, Any] = {}
        self.wholes: dict[Symbol, Any] = {}
        for kind in kinds:
            if not isinstance(kind, relax.TensorType) or not isinstance(kind.shape, relax.ShapeExpr):
                raise NotElementwise("a shape is not known")
            for d in kind.shape.values:
                if isinstance(d, tirx.Var):
                    self.symbols.setdefault(d, tirx.Var(d.name, "int64"))
        for kind in kinds:
            for d in kind.shape.values:
                if not self._known(d):
                    self.wholes.setdefault(Symbol(d), tirx.Var("size", "int64"))

    def _known(self, dim: Any) -> bool:
        return all(variable in self.symbols for variable in tirx.analysis.undefined_vars(dim))

    def of(self, kind: Any) -> tuple[Size, ...]:
        """Raises NotElementwise where a size is not known to the kernel."""
        dims = []
        for d in kind.shape.values:
            if self._known(d):
                dims.append(elements.size_of(elements.renamed(d, self.symbols)))
            elif Symbol(d) in self.wholes:
                dims.append(Symbol(self.wholes[Symbol(d)]))
            else:
                raise NotElementwise("a size is not one of its tensors'")
        return tuple(dims)


def _epilogue(calls: Sequence[_Call], params: Sequence[Any], shapes: _Shapes) -> tuple[Tree, tuple[Size, ...]]:
    """The tree of a group's last result over its axes, the anchor's value being elements.Anchor."""
    last = calls[-1]
    shape = shapes.of(last.out)
    axes = elements.axes_of(shape)
    sources: dict[Any, Source] = {}
    for number, param in enumerate(params):
        sources[param] = elements.load_source(number, shapes.of(param.ty), str(param.ty.dtype.dtype), axes)
    for call in calls:
        if call.anchor is not None:
            if shapes.of(call.out) != shape:
                raise NotElementwise("the epilogue has another shape than its kernel")
            sources[call.var] = elements.anchor_source(axes, shape, str(call.out.dtype.dtype))
            continue
        nest = elements.nest_of(call.function)
        sources[call.var] = elements.nested_source(nest, [_source(a, sources) for a in call.arguments])
    return sources[last.var](axes), shape


def _source(argument: Any, sources: dict[Any, Source]) -> Source:
    if argument in sources:
        return sources[argument]
    if isinstance(argument, tvm.ir.GenericConst) and argument.value.numpy().size == 1:
        value = argument.value.numpy().reshape(-1)[0].item()
        constant = elements.Constant(value, str(argument.ty.dtype.dtype))
        return lambda indices: constant
    raise NotElementwise("it has an argument of another kind")


def _kernel(
    name: str,
    kinds: Sequence[Any],
    shapes: _Shapes,
    target: Target,
    flops: int,
    write: Callable[[Vectors, Any, Any, str], None],
) -> tirx.PrimFunc:
    """A function over tensors of these kinds, the output last; `write(vectors, flat inputs, flat output, index)` fills
    it. flops: operations, where sizes of the output that are known only at run time count as 1."""
    dims = [shapes.of(kind) for kind in kinds]
    sizes = [elements.product(shape) for shape in dims]
    index = "int32" if all(isinstance(size, int) and size < 1 << 30 for size in sizes) else "int64"
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, "tirx.is_scheduled": True})
        shaped = []
        for number, (kind, shape) in enumerate(zip(kinds, dims, strict=True)):
            extents = [elements.expression(d, index) for d in shape]
            shaped.append(T.match_buffer(T.arg(f"x{number}", T.handle()), extents, str(kind.dtype.dtype)))
        v = Vectors(target.isa)
        with T.sblock("root"):
            # Nobody asks what the root block touches; left out, TVM spends up to minutes to find it out.
            T.reads()
            T.writes()
            buffers = [
                T.decl_buffer((elements.expression(size, index),), str(kind.dtype.dtype), data=buffer.data)
                for buffer, kind, size in zip(shaped, kinds, sizes, strict=True)
            ]
            with v.prelude():
                write(v, buffers[:-1], buffers[-1], index)
    open_axes = [(len(dims) - 1, axis) for axis, size in enumerate(dims[-1]) if not isinstance(size, int)]
    return with_flops(builder.get(), [flops, *open_axes])


def _elementwise_kernel(name: str, calls: Sequence[_Call], params: Sequence[Any], target: Target) -> tirx.PrimFunc:
    kinds = [*(p.ty for p in params), calls[-1].out]
    shapes = _Shapes(kinds)
    tree, shape = _epilogue(calls, params, shapes)
    small, extents, _ = elements.collapsed(tree, shape)
    v = Vectors(target.isa)
    if _transposes(small, extents):
        return _transposition(name, small, extents, kinds, shapes, target)
    elements.check_vectors(small, extents, v.lanes)
    last, size = extents[-1] if extents else 1, elements.product(extents)
    if isinstance(last, int) and last < v.lanes and not (isinstance(size, int) and size <= v.lanes):
        raise NotElementwise("its last axis is shorter than a vector")

    def write(v: Vectors, inputs: Sequence[Buffer], y: Buffer, index: str) -> None:
        emit_elementwise(v, tree, shape, inputs, y, target.cores, index)

    return _kernel(name, kinds, shapes, target, math.prod(d for d in shape if isinstance(d, int)), write)


def _transposes(tree: Tree, extents: Sequence[Size]) -> TypeGuard[elements.Load]:
    """Whether a tree is one load whose contiguous axis is not the output's."""
    return (
        isinstance(tree, elements.Load)
        and tree.dtype in moves.ELEMENTS
        and len(extents) > 1
        and tree.strides[-1] not in (0, 1)
        and any(stride == 1 and extent != 1 for stride, extent in zip(tree.strides, extents, strict=True))
    )


def _transposition(
    name: str, load: elements.Load, extents: Sequence[Size], kinds: Sequence[Any], shapes: _Shapes, target: Target
) -> tirx.PrimFunc:
    (base,) = elements.fixed([load.base])

    def write(v: Vectors, inputs: Sequence[Buffer], y: Buffer, index: str) -> None:
        with moves.prelude(v, load.dtype):
            x = inputs[load.source]
            moves.emit_transpose(v, x, base, load.strides, extents, y, target.cores, index)

    return _kernel(name, kinds, shapes, target, 0, write)


def _anchor_kernel(name: str, calls: Sequence[_Call], params: Sequence[Any], target: Target) -> tirx.PrimFunc:
    (main,) = [c for c in calls if c.anchor is not None]
    spec = main.anchor
    assert spec is not None
    kinds = [*(p.ty for p in params), calls[-1].out]
    shapes = _Shapes(kinds)
    tree, shape = _epilogue(calls, params, shapes)
    small, _, groups = elements.collapsed(tree, shape)
    elements.check_vectors(tree, shape, Vectors(target.isa).lanes)
    positions = [list(params).index(a) for a in main.arguments]
    stores = 0

    def write(v: Vectors, inputs: Sequence[Buffer], y: Buffer, index: str) -> None:
        emitter = TreeEmitter(v, inputs, index)

        def store(value: Expr, axes: Sequence[Expr], count: int | Expr | None) -> None:
            nonlocal stores
            stores += 1
            place = elements.place_of(axes, shape, groups)
            result = emitter.vector(small, place, count, value)
            offset: Expr = tirx.const(0, index)
            for axis, extent in zip(axes, shape, strict=True):
                offset = offset * elements.expression(extent, index) + axis
            offset = tvm.sym.Analyzer().simplify(offset)
            v.store(y, offset, result, tirx.const(count, index) if isinstance(count, int) else count)

        read = [shapes.of(a.ty) for a in main.arguments]
        body = Body(v, target, [inputs[p] for p in positions], read, shape, store, index, groups)
        name = spec["template"]
        if name in PER_ITEM and isinstance(shape[0], Symbol):
            with T.serial(elements.expression(shape[0], index)) as item:
                TEMPLATES[name](spec["parameters"], _of_item(body, item))
        else:
            TEMPLATES[name](spec["parameters"], body)

    flops = int((main.function.attrs or {}).get(FLOPS, 0))
    kernel = _kernel(name, kinds, shapes, target, flops, write)
    if len(calls) > 1 and stores * elements.functions(small) > MOST_FUNCTIONS:
        raise NotElementwise(f"its {stores} vectors of results at once would each compute what follows")
    return kernel


def _of_item(body: Body, item: Expr) -> Body:
    """What is left for a template to do when one item of a batch is taken."""
    batch = body.out_shape[0]
    inputs, shapes = [], []
    for buffer, shape in zip(body.inputs, body.shapes, strict=True):
        if not shape or shape[0] != batch:
            inputs.append(buffer)
            shapes.append(shape)
            continue
        size = elements.expression(elements.product(shape[1:]), body.index)
        inputs.append(T.decl_buffer((size,), buffer.dtype, data=buffer.data, elem_offset=item * size))
        shapes.append((1, *shape[1:]))

    def store(value: Expr, axes: Sequence[Expr], count: int | Expr | None) -> None:
        body.store(value, [item, *axes[1:]], count)

    return dataclasses.replace(body, inputs=inputs, shapes=shapes, out_shape=(1, *body.out_shape[1:]), store=store)


class _Outside:
    """Sizes from within a called function in the symbols of its caller."""

    def __init__(self, function: relax.Function, call: Any) -> None:
        self.analyzer = tvm.sym.Analyzer()
        bound: list[Any] = []
        for param, argument in zip(function.params, call.args, strict=True):
            for d, given in zip(_dims(param.ty), _dims(argument.ty), strict=True):
                if isinstance(d, tirx.Var) and not any(d.same_as(b) for b in bound):
                    self.analyzer.bind(d, given)
                    bound.append(d)

    def sizes(self, sizes: Sequence[Any]) -> list[Any]:
        return [self.analyzer.simplify(d) for d in sizes]

    def given(self, argument: Any) -> Any:
        """A constant, or a size, that is an argument."""
        return self.analyzer.simplify(argument) if isinstance(argument.ty, tvm.ir.PrimType) else argument

    def type(self, kind: Any) -> Any:
        return relax.TensorType(self.sizes(kind.shape.values), kind.dtype)


def _dims(kind: Any) -> list[Any]:
    """The sizes that a tensor or a shape tells."""
    if isinstance(kind, relax.ShapeType):
        return list(kind.values or [])
    return list(kind.shape.values) if isinstance(kind, relax.TensorType) and kind.shape is not None else []


# --- the phases -------------------------------------------------------------------------------------------------


def annotate(module: tvm.IRModule) -> tvm.IRModule:
    """Call elementwise functions by their name: TVM takes one that reads place 0 of an axis of one element for a
    broadcast or worse, and fuses it into nothing. Reshapes are fused into nothing: alone they cost nothing, as
    another view of the same memory. Runs after AnnotateTIROpPattern.
    """
    result = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and int((function.attrs or {}).get("op_pattern", 0)) in (1, 2, OPAQUE):
            if "tirx.is_scheduled" in function.attrs or ANCHOR in function.attrs:
                continue
            if not all(isinstance(p.ty, tirx.BufferType) for p in function.params):
                continue  # it is given sizes as numbers, which FuseOps cannot hand on
            if relax.analysis.has_reshape_pattern(function):
                result.update_func(variable, function.with_attr("op_pattern", OPAQUE))
                continue
            try:
                nest = elements.nest_of(function)
            except NotElementwise:
                continue
            pattern = elements.relax_pattern(nest)
            if pattern is not None:
                result.update_func(variable, function.with_attr("op_pattern", pattern))
    return result


def claim(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Replace groups and lone calls that a template takes by kernels. Runs between FuseOps and FuseTIR."""
    return _Claimer(module, target).run()


@relax.expr_functor.mutator
class _Claimer(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module, self.target = module, target
        self.kernels: dict[Any, Any] = {}

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function) and not (function.attrs or {}).get("Primitive"):
                self.builder_.update_func(variable, self.visit_expr(function))
        module = relax.transform.DeadCodeElimination()(self.builder_.get())
        for variable, function in module.functions_items():
            if ANCHOR in (function.attrs or {}):
                raise CompileError(f"the kernel {variable.name_hint} was not written: it is part of no group")
        return module

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if isinstance(call.op, tvm.ir.GlobalVar):
            function = self.module[call.op]
            if isinstance(function, relax.Function) and (function.attrs or {}).get("Primitive"):
                return self.group(call, function)
            return call
        if getattr(call.op, "name", "") != "relax.call_tir":
            return call
        return self.lone(call)

    def group(self, call: Any, function: relax.Function) -> Any:
        calls = _group_calls(function, self.module)
        if calls is None:
            return call
        outside = _Outside(function, call)
        if call.op not in self.kernels:
            params = [p for p in function.params if isinstance(p.ty, relax.TensorType)]
            self.kernels[call.op] = self.written(call.op.name_hint, calls, params)
        kernel = self.kernels[call.op]
        if kernel is not None:
            tensors = [a for a in call.args if isinstance(a.ty, relax.TensorType)]
            return relax.call_tir(kernel, tensors, outside.type(calls[-1].out))
        if not any(c.anchor is not None for c in calls) and not self.better_parted(calls):
            return call
        return self.parted(dict(zip(function.params, call.args, strict=True)), calls, outside)

    def better_parted(self, calls: Sequence[_Call]) -> bool:
        """Whether kernels for some of the calls alone are better than a loop nest for all, element by element: where
        every call has one, as a transposition and a sum, or one that computes a function, as GELU before a Concat."""
        nests = [elements.nest_of(c.function) for c in calls if self.lone_kernel(c) is not None]
        return len(nests) == len(calls) or any(elements.computes_functions(nest.value) for nest in nests)

    def parted(self, values: dict[Any, Any], calls: Sequence[_Call], outside: _Outside) -> Any:
        """A group as several kernels, the first of which takes as many of the calls as it can, and so on.

        values: what the group's parameters are. Returns the value of the last call.
        """
        rest = list(calls)
        while rest:
            part, params, kernel = next(filter(None, (self.part(rest, count) for count in range(len(rest), 0, -1))))
            last = part[-1]
            out = outside.type(last.out)
            if kernel is not None:
                value = relax.call_tir(kernel, [values[p] for p in params], out)
            else:
                callee = next(v for v, f in self.module.functions_items() if f.same_as(last.function))
                given = [values[a] if a in values else outside.given(a) for a in last.given]
                value = self.lone(relax.call_tir(callee, given, out))
            values[last.var] = self.builder_.emit(value)
            rest = rest[len(part) :]
        return values[calls[-1].var]

    def part(self, calls: Sequence[_Call], count: int) -> tuple[Sequence[_Call], list[Any], Any] | None:
        """The first calls with their arguments and the kernel for them. None where there is none for several calls, or
        others read what is computed on the way; a call without a template comes back without a kernel.
        """
        first, others = calls[:count], calls[count:]
        made = {c.var for c in first}
        read = {a for c in others for a in c.arguments}
        if made & read - {first[-1].var}:
            return None
        arguments = dict.fromkeys(a for c in first for a in c.arguments if isinstance(a, relax.Var) and a not in made)
        params = list(arguments)
        kernel = self.written("_".join(["fused"] * (count > 1) + [c.name for c in first]), first, params)
        return None if kernel is None and count > 1 else (first, params, kernel)

    def lone(self, call: Any) -> Any:
        single = _call_of(call, None, self.module)
        if single is None or call.args[0] not in self.module.functions:
            return call
        kernel = self.lone_kernel(single)
        return call if kernel is None else relax.call_tir(kernel, single.arguments, single.out)

    def lone_kernel(self, call: _Call) -> Any:
        """The kernel of one call; None where no template takes it."""
        key = call.function
        if key not in self.kernels:
            params = [relax.Var(f"p{i}", a.ty) for i, a in enumerate(call.arguments)]
            inner = _Call(call.name, call.function, list(params), relax.Var("y", call.out), call.out)
            self.kernels[key] = self.written(call.name, [inner], params)
        return self.kernels[key]

    def written(self, name: str, calls: Sequence[_Call], params: Sequence[Any]) -> Any:
        anchors = sum(c.anchor is not None for c in calls)
        if not anchors and any("tirx.is_scheduled" in (c.function.attrs or {}) for c in calls):
            return None
        write = _anchor_kernel if anchors else _elementwise_kernel
        try:
            if anchors > 1:
                raise NotElementwise("two kernels in one group")
            function = write(name, calls, params, self.target)
        except NotElementwise as error:
            log.debug("no template for %s: %s", name, error)
            if anchors and len(calls) == 1:
                raise
            return None
        return self.builder_.add_func(function, name)
