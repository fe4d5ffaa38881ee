"""Elementwise functions as small trees, and trees as explicit vectors.

TVM's loop nests of elementwise operators, and chains of them that Relax fuses, become one tree of operations whose
leaves are loads with a stride for every axis of the output. Such a tree is emitted as vectors along the last axis, by
kernels of its own (`runtime.kernels.elementwise`) or as the epilogue of another one. Sizes and strides are numbers, or
expressions in the sizes that are known only at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tvm
import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad
from tvm.ir import prim as ir_prim
from tvm.tirx.script import builder as T

from .kernels.functions import FUNCTIONS
from .kernels.vectors import Expr
from .rounding import rounded_bits, widened_bits

P = ir_prim.expr


class NotElementwise(Exception):
    """A loop nest that is no tree of elements, with the reason."""


@dataclass(frozen=True)
class Symbol:
    """A size or stride that is known at run time: an int64 expression that is equal and hashed by its structure."""

    expr: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and bool(tvm_ffi.structural_equal(self.expr, other.expr))

    def __hash__(self) -> int:
        return int(tvm_ffi.structural_hash(self.expr))


Size: TypeAlias = "int | Symbol"


def size_of(value: Any) -> Size:
    """A number or expression as a size."""
    if isinstance(value, int | Symbol):
        return value
    value = sym.Analyzer().simplify(value)
    return int(value) if isinstance(value, tirx.IntImm) else Symbol(value)


def renamed(value: Expr, symbols: dict[Any, Any]) -> Expr:
    """A size in other symbols; those that have none yet get one."""
    analyzer = sym.Analyzer()
    for variable in tirx.analysis.undefined_vars(value):
        analyzer.bind(variable, symbols.setdefault(variable, tirx.Var(variable.name, "int64")))
    return analyzer.simplify(value)


def product(sizes: Iterable[Size]) -> Size:
    """Of sizes; 1 for none."""
    result: Size = 1
    for size in sizes:
        if isinstance(result, int) and isinstance(size, int):
            result *= size
        else:
            result = size_of(expression(result) * expression(size))
    return result


def expression(size: Size, dtype: str = "int64") -> Expr:
    """A size in TIR."""
    return tirx.const(size, dtype) if isinstance(size, int) else size.expr


def fixed(sizes: Sequence[Size]) -> tuple[int, ...]:
    """Sizes that have to be numbers; raises NotElementwise for others."""
    numbers = tuple(size for size in sizes if isinstance(size, int))
    if len(numbers) != len(sizes):
        raise NotElementwise("it has sizes that are known only at run time")
    return numbers


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are the same for every run."""
    return a == b or bool(sym.Analyzer().can_prove_equal(expression(a), expression(b)))


@dataclass(frozen=True)
class Load:
    """An element of tensor `source` at base + the sum of strides x axes, in elements."""

    source: int
    base: Size
    strides: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Constant:
    """A number. Equal to those written alike: 0 is not -0, and NaN is NaN."""

    value: float | int
    dtype: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and (repr(self.value), self.dtype) == (repr(other.value), other.dtype)

    def __hash__(self) -> int:
        return hash((repr(self.value), self.dtype))


@dataclass(frozen=True)
class Apply:
    """An operation on trees. op: a name of OPERATIONS or of FUNCTIONS, "cast", "select", "round": to the bits of
    bfloat16, or "widen": from these."""

    op: str
    args: tuple[Tree, ...]
    dtype: str


@dataclass(frozen=True)
class Anchor:
    """The value that a kernel hands to its epilogue."""

    dtype: str = "float32"


Tree: TypeAlias = "Load | Constant | Apply | Anchor"

OPERATIONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "truncdiv": lambda a, b: tirx.truncdiv(a, b),
    "max": lambda a, b: T.max(a, b), "min": lambda a, b: T.min(a, b),
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: T.And(a, b), "or": lambda a, b: T.Or(a, b),
}  # fmt: skip
_BINARY = {
    P.Add: "add", P.Sub: "sub", P.Mul: "mul", P.Div: "div", P.Max: "max", P.Min: "min", P.LT: "lt", P.LE: "le",
    P.GT: "gt", P.GE: "ge", P.EQ: "eq", P.NE: "ne", P.And: "and", P.Or: "or",
}  # fmt: skip
DTYPES = frozenset({"float32", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool"})


# --- from TIR ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nest:
    """One perfect loop nest that writes every element of its output once. extents: numbers, or expressions of its own
    where they are known at run time. parameters: buffers in order, the output last.
    """

    axes: tuple[Any, ...]
    extents: tuple[Any, ...]
    value: Any
    parameters: tuple[Any, ...]


def nest_of(function: tirx.PrimFunc) -> Nest:
    """Raises NotElementwise when a function is anything else than one elementwise nest."""
    block = getattr(function.body, "block", None)
    if block is None or len(block.alloc_buffers):
        raise NotElementwise("it is not one nest of loops")
    body = block.body
    loops = []
    while isinstance(body, tirx.For):
        if not isinstance(body.min, tirx.IntImm) or int(body.min) != 0:
            raise NotElementwise("its loops do not start at 0")
        loops.append(body)
        body = body.body
    realize = body
    if not isinstance(realize, tvm.s_tir.SBlockRealize) or not isinstance(realize.block.body, tirx.BufferStore):
        raise NotElementwise("it is not one nest of loops")
    inner = realize.block
    if inner.init is not None or any(v.iter_type != tirx.IterVar.DataPar for v in inner.iter_vars):
        raise NotElementwise("it reduces")
    values = list(realize.iter_values)
    if len(values) != len(loops) or any(not v.same_as(loop.loop_var) for v, loop in zip(values, loops, strict=True)):
        raise NotElementwise("its blocks are not its loops")
    axes = tuple(v.var for v in inner.iter_vars)
    store = inner.body
    if len(store.indices) != len(axes) or any(not i.same_as(a) for i, a in zip(store.indices, axes, strict=True)):
        raise NotElementwise("it does not write in order")
    if not function.params or not store.buffer.same_as(function.params[-1]):
        raise NotElementwise("it has more than one output")
    extents = tuple(int(e) if isinstance(e, tirx.IntImm) else e for e in (loop.extent for loop in loops))
    parameters = tuple(p for p in function.params if isinstance(p.ty, tirx.BufferType))
    return Nest(axes, extents, store.value, parameters)


def relax_pattern(nest: Nest) -> int | None:
    """Relax's operator pattern of a nest: 0, elementwise, where an input is read at the output's own place, 1 where
    inputs are only broadcast, None where elements move.
    """
    position = {axis: n for n, axis in enumerate(nest.axes)}
    loads: list[TensorLoad] = []
    collect_loads(nest.value, loads)
    whole = False
    for load in loads:
        places = [position[i] for i in load.indices if i in position]
        rest = [i for i in load.indices if i not in position]
        if places != sorted(set(places)) or not all(isinstance(i, tirx.IntImm) and int(i) == 0 for i in rest):
            return None
        missing = [extent for n, extent in enumerate(nest.extents) if n not in places]
        whole = whole or all(isinstance(extent, int) and extent == 1 for extent in missing)
    return 0 if whole else 1


def collect_loads(e: Any, loads: list[TensorLoad]) -> None:
    """Collect the loads in an expression."""
    if isinstance(e, TensorLoad):
        loads.append(e)
        return
    for part in _parts(e):
        collect_loads(part, loads)


def computes_functions(e: Any) -> bool:
    """Whether there is more than arithmetic in an expression: exp, erf, tanh ..."""
    called = isinstance(e, tvm.ir.Call) and isinstance(e.op, tvm.ir.Op) and _short_name(e) in FUNCTIONS
    return called or (not isinstance(e, TensorLoad) and any(computes_functions(part) for part in _parts(e)))


def rounded_from(e: Any) -> Any | None:
    """What an expression is `rounded_bits` of; None for others."""
    if not isinstance(e, P.Cast) or not isinstance(e.value, P.Select):
        return None
    x = _first_operand(e.value.true_value, 3)
    return x if x is not None and str(x.ty.dtype) == "float32" and _same(e, rounded_bits(x)) else None


def _first_operand(e: Any, depth: int) -> Any | None:
    """The first operand of the first operand ... of an expression; None where there is none."""
    for _ in range(depth):
        e = next(iter(_parts(e)), None)
    return e


def _same(a: Any, b: Any) -> bool:
    return bool(tvm_ffi.structural_equal(a, b))


def _parts(e: Any) -> list[Any]:
    parts = [getattr(e, name, None) for name in ("a", "b", "value", "condition", "true_value", "false_value")]
    return [p for p in parts if isinstance(p, tvm.ir.Expr)] + (list(e.args) if isinstance(e, tvm.ir.Call) else [])


def _short_name(call: Any) -> str:
    return str(call.op.name).rpartition(".")[2]


Source: TypeAlias = "Callable[[Sequence[Any]], Tree]"


class _Reader:
    """TIR expressions of one nest as trees. sources: what a load from each of its buffers is."""

    def __init__(self, nest: Nest, sources: Mapping[Any, Source], index: Mapping[Any, Any]) -> None:
        self.sources, self.index = sources, index
        self.nest = nest

    def tree(self, e: Any) -> Tree:
        dtype = str(e.ty.dtype) if hasattr(e.ty, "dtype") else str(e.ty)
        if dtype not in DTYPES:
            raise NotElementwise(f"it computes in {dtype}")
        if isinstance(e, TensorLoad):
            if e.source not in self.sources:
                raise NotElementwise("it reads what it does not have")
            return self.sources[e.source]([self.scalar(i) for i in e.indices])
        if isinstance(e, tirx.IntImm | tirx.FloatImm):
            value = float(e.value) if isinstance(e, tirx.FloatImm) else int(e.value)
            return Constant(value, dtype)
        kind = _BINARY.get(type(e))
        if kind is not None:
            kind = "truncdiv" if kind == "div" and dtype != "float32" else kind
            return Apply(kind, (self.tree(e.a), self.tree(e.b)), dtype)
        if isinstance(e, P.Not):
            return Apply("eq", (self.tree(e.a), Constant(0, "bool")), dtype)
        if isinstance(e, P.Select):
            parts = (self.tree(e.condition), self.tree(e.true_value), self.tree(e.false_value))
            return Apply("select", parts, dtype)
        if isinstance(e, P.Cast):
            if (x := rounded_from(e)) is not None:
                return Apply("round", (self.tree(x),), dtype)
            inner = self.tree(e.value)
            return inner if inner.dtype == dtype else Apply("cast", (inner,), dtype)
        if isinstance(e, tvm.ir.Call):
            return self.call(e, dtype)
        raise NotElementwise(f"it computes a {type(e).__name__}")

    def call(self, e: Any, dtype: str) -> Tree:
        name = _short_name(e) if isinstance(e.op, tvm.ir.Op) else ""
        if name == "reinterpret":
            return self.widened(e, dtype)
        if name == "pow" or name == "power":
            return self.power(e, dtype)
        if name not in FUNCTIONS or dtype != "float32" or len(e.args) != 1:
            raise NotElementwise(f"it calls {name or 'a function'}")
        return Apply(name, (self.tree(e.args[0]),), dtype)

    def widened(self, e: Any, dtype: str) -> Tree:
        """`widened_bits`."""
        bits = _first_operand(e, 2)
        if isinstance(bits, P.Cast) and _same(e, widened_bits(bits.value)):
            return Apply("widen", (self.tree(bits.value),), dtype)
        raise NotElementwise("it takes numbers for others of the same bits")

    def power(self, e: Any, dtype: str) -> Tree:
        base, exponent = (self.tree(a) for a in e.args)
        value = exponent.value if isinstance(exponent, Constant) else None
        if dtype != "float32" or value not in (0.5, 1, 2, 3, -1):
            raise NotElementwise("it raises to a power that varies")
        if value == 0.5:
            # Other than sqrt, the power of -0 is 0 and that of -infinity is infinity.
            zero, infinity = Constant(0.0, dtype), Constant(math.inf, dtype)
            lowest = Apply("eq", (base, Constant(-math.inf, dtype)), "bool")
            root = Apply("select", (Apply("eq", (base, zero), "bool"), zero, Apply("sqrt", (base,), dtype)), dtype)
            return Apply("select", (lowest, infinity, root), dtype)
        if value == -1:
            return Apply("div", (Constant(1.0, dtype), base), dtype)
        result = base
        for _ in range(int(value) - 1):
            result = Apply("mul", (result, base), dtype)
        return result

    def scalar(self, e: Any) -> Any:
        """An index with this nest's axes replaced by what they are in the output's axes."""
        if e in self.index:
            return self.index[e]
        if isinstance(e, tirx.IntImm):
            return e
        kind = {P.Add: lambda a, b: a + b, P.Sub: lambda a, b: a - b, P.Mul: lambda a, b: a * b}.get(type(e))
        if kind is None:
            raise NotElementwise("it reads at computed places")
        return kind(self.scalar(e.a), self.scalar(e.b))


def load_source(number: int, shape: Sequence[Size], dtype: str, axes: Sequence[Any]) -> Source:
    """Loads from a row-major tensor of that shape, as leaves over the output's axes."""

    def load(indices: Sequence[Any]) -> Tree:
        flat: Any = tirx.IntImm("int64", 0)
        for position, i in enumerate(indices):
            flat = flat + i.astype("int64") * expression(product(shape[position + 1 :]))
        terms = sym.detect_linear_equation(flat, list(axes)) if axes else [flat]
        if not terms:
            raise NotElementwise("it reads at computed places")
        *strides, base = (size_of(t) for t in terms)
        return Load(number, base, tuple(strides), dtype)

    return load


def nested_source(nest: Nest, sources: Sequence[Source]) -> Source:
    """Elements of another nest, computed where they are read. sources: of its inputs."""
    known = dict(zip(nest.parameters[:-1], sources, strict=True))

    def value(indices: Sequence[Any]) -> Tree:
        return _Reader(nest, known, dict(zip(nest.axes, indices, strict=True))).tree(nest.value)

    return value


def anchor_source(axes: Sequence[Any], shape: Sequence[Size], dtype: str) -> Source:
    """The value of the kernel whose epilogue this is: readable at the output's own place only."""

    def own(i: Any, axis: Any, extent: Size) -> bool:
        return i.same_as(axis) or extent == 1 or bool(sym.Analyzer().can_prove_equal(i, axis))

    def value(indices: Sequence[Any]) -> Tree:
        if len(indices) != len(axes) or not all(map(own, indices, axes, shape)):
            raise NotElementwise("the epilogue reads other elements than its own")
        return Anchor(dtype)

    return value


def axes_of(shape: Sequence[Size]) -> list[Any]:
    """Variables for the axes of an output."""
    return [tirx.Var(f"i{n}", "int64") for n in range(len(shape))]


# --- axes of trees ----------------------------------------------------------------------------------------------


def leaves(tree: Tree) -> list[Load]:
    """Every distinct load of a tree."""
    found: dict[Load, None] = {}
    stack: list[Tree] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, Load):
            found[node] = None
        elif isinstance(node, Apply):
            stack.extend(node.args)
    return list(found)


def functions(tree: Tree) -> int:
    """How many functions such as exp a tree computes."""
    if not isinstance(tree, Apply):
        return 0
    return (tree.op in FUNCTIONS) + sum(map(functions, tree.args))


def _divides_integers(tree: Tree) -> bool:
    return isinstance(tree, Apply) and (tree.op == "truncdiv" or any(map(_divides_integers, tree.args)))


def collapsed(tree: Tree, extents: Sequence[Size]) -> tuple[Tree, tuple[Size, ...], list[list[int]]]:
    """The tree over fewer axes: neighbours that every leaf and the output walk through as one are one.

    Returns the tree, the new extents, and for each new axis the old ones it stands for. Axes of one element vanish
    into their neighbours.
    """
    loads = leaves(tree)

    def representative(group: list[int]) -> int:
        return next((a for a in reversed(group) if extents[a] != 1), group[-1])

    groups: list[list[int]] = []
    for axis in range(len(extents)):
        last = representative(groups[-1]) if groups else None
        if last is not None and (
            extents[axis] == 1
            or extents[last] == 1
            or all(same(load.strides[last], product((load.strides[axis], extents[axis]))) for load in loads)
        ):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    chosen = [representative(g) for g in groups]

    def rebuilt(node: Tree) -> Tree:
        if isinstance(node, Load):
            return Load(node.source, node.base, tuple(node.strides[a] for a in chosen), node.dtype)
        if isinstance(node, Apply):
            return Apply(node.op, tuple(rebuilt(a) for a in node.args), node.dtype)
        return node

    return rebuilt(tree), tuple(product(extents[a] for a in g) for g in groups), groups


def check_vectors(tree: Tree, extents: Sequence[Size], lanes: int) -> None:
    """Raises NotElementwise when the last axis cannot be walked through in vectors."""
    last = extents[-1] if extents else 1
    filled = bool(extents) and isinstance(last, int) and last % lanes == 0
    if not filled and _divides_integers(tree):
        raise NotElementwise("lanes that do not exist would be divided by 0")
    if not filled and "int64" in (tree.dtype, *(load.dtype for load in leaves(tree))):
        # TVM's analysis of index sets fails on vectors of some int64 expressions.
        raise NotElementwise("its last axis does not fill vectors of int64")
    for load in leaves(tree):
        if load.strides and load.strides[-1] not in (0, 1) and last != 1:
            raise NotElementwise("its last axis is not contiguous in every input")
        if load.dtype == "bool":
            raise NotElementwise("it reads truth values")
    if tree.dtype == "bool":
        raise NotElementwise("it writes truth values")


def place_of(axes: Sequence[Expr], extents: Sequence[Size], groups: Sequence[Sequence[int]]) -> list[Expr]:
    """Values of collapsed axes from those of the axes they stand for."""
    analyzer = sym.Analyzer()
    place = []
    for group in groups:
        value: Expr = 0
        for axis in group:
            if extents[axis] != 1:
                value = value * expression(extents[axis]) if not isinstance(value, int) else value
                value = axes[axis] if isinstance(value, int) else value + axes[axis]
        place.append(value if isinstance(value, int) else analyzer.simplify(value))
    return place
