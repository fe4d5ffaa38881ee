"""What a converter sees of one ONNX node, and the table of converters.

A converter is a function `Site -> Result` registered under the operators it converts:

    @converts("ReduceL1")
    def reduce_l1(site: Site) -> Result:
        return relax.op.sum(relax.op.abs(site.x(0)), ...)

It raises `Refuse` for a form it cannot convert exactly: the node then runs in onnxruntime. Its result is checked
against the type and shape that ONNX promises, so a converter never has to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import tvm
from tvm import relax, te, tirx

from ..kernels.rows import OPAQUE
from ..target import Target

Dim: TypeAlias = "int | tirx.Expr"

NARROW_FLOATS = ("float16", "bfloat16")
# Types of less than 8 bits, and those that their elements are kept in.
PACKED = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
CONTENT_LIMIT = 64  # elements up to which a small integer tensor's content is followed symbolically


class Refuse(Exception):
    """A node that a converter cannot take; the message is the reason."""


class Unfixed(Refuse):
    """A node that a converter cannot take as long as a size or rank is only known at run time."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; fixed input shapes (--pin NAME=SHAPE) may cure it")


class ByBody(Refuse):
    """A form of an operator that is left to its body in the standard."""


@dataclass(frozen=True)
class Value:
    """One ONNX tensor during the import.

    expr: the tensor. content: the elements of an integer tensor of rank 0 or 1 where they are known during the
    import, as numbers or as expressions of the symbolic dimensions; this is what keeps computed shapes symbolic.
    wide: the float32 tensor that a float16 one was rounded from; operators that compute in float32 read it, as
    onnxruntime does, and so round once less. packed: its type in ONNX, where that has less than the 8 bits that an
    element of `expr` has. bits: uint16, the bits of the bfloat16 numbers that it was rounded to, for kernels that take
    these.
    """

    expr: tvm.ir.Expr
    content: tuple[Dim, ...] | None = None
    wide: tvm.ir.Expr | None = None
    packed: str | None = None
    bits: tvm.ir.Expr | None = None


@dataclass(frozen=True)
class Declared:
    """Type of a value as ONNX's inference knows it; None where it does not. Unknown dimensions are None or names."""

    dtype: str | None = None
    shape: tuple[int | str | None, ...] | None = None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape when every dimension is a number."""
        if self.shape is None or not all(isinstance(d, int) for d in self.shape):
            return None
        return tuple(d for d in self.shape if isinstance(d, int))


Item: TypeAlias = "tvm.ir.Expr | Value | None"
Result: TypeAlias = "Item | Sequence[Item]"
Converter: TypeAlias = "Callable[[Site], Result]"

CONVERTERS: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter for operators of the standard domain."""

    def register(function: Converter) -> Converter:
        for name in names:
            CONVERTERS[name] = function
        return function

    return register


def dtype_of(expr: tvm.ir.Expr) -> str:
    """Element type of a tensor expression, in NumPy's words."""
    return str(expr.ty.dtype.dtype)


def number(dim: Any) -> Dim:
    """An int where the dimension is a constant, else the expression."""
    if isinstance(dim, (int, np.integer)):
        return int(dim)
    return int(dim.value) if isinstance(dim, tirx.IntImm) else dim


def shape_of(expr: tvm.ir.Expr) -> tuple[Dim, ...]:
    """Dimensions of a tensor expression. Raises Refuse where Relax does not know them."""
    shape = expr.ty.shape
    if not isinstance(shape, relax.ShapeExpr):
        raise Unfixed("its input's shape is not known")
    return tuple(number(d) for d in shape.values)


def constant_of(expr: tvm.ir.Expr) -> np.ndarray | None:
    """The array of a constant, else None."""
    return np.asarray(expr.value.numpy()) if isinstance(expr, tvm.ir.GenericConst) else None


def made_by(bb: relax.BlockBuilder, expr: tvm.ir.Expr, *ops: str) -> Any | None:
    """The call that gives an expression, where it is one of the operators `ops`."""
    made = bb.lookup_binding(expr) if isinstance(expr, relax.Var) else None
    return made if isinstance(made, tvm.ir.Call) and getattr(made.op, "name", "") in ops else None


def const(array: Any, dtype: str) -> tvm.ir.Expr:
    """A Relax constant of exactly that element type."""
    return relax.const(np.asarray(array).astype(np_dtype(dtype)), dtype)


def np_dtype(name: str) -> np.dtype[Any]:
    """NumPy's type of a TVM type name, ml_dtypes' for those NumPy lacks."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        if hasattr(ml_dtypes, name):
            return np.dtype(getattr(ml_dtypes, name))
        raise Refuse(f"element type {name} has no equivalent") from None


def onnx_dtype(elem_type: int) -> str:
    """TVM's name of an ONNX element type. Raises Refuse for strings and undefined types."""
    if elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise Refuse("strings are not compiled")
    if elem_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        raise Refuse("complex numbers are not compiled")
    return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def is_unsigned(dtype: str) -> bool:
    return dtype.startswith("uint")


def product(dims: Sequence[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = dim if isinstance(result, int) and result == 1 else result * dim
    return result


def same(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(tvm.sym.Analyzer().can_prove_equal(a, b))


@dataclass
class Site:
    """One node: its inputs, attributes and what is promised of its outputs.

    in_place: its first input is one of the model's that nothing else reads, whose memory may hold the result.
    """

    op: str
    bb: relax.BlockBuilder
    target: Target
    opset: int
    inputs: list[Value | None]
    attrs: dict[str, Any]
    declared: list[Declared] = field(default_factory=list)
    outputs: int = 1
    in_place: bool = False

    # Inputs.

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise Refuse(f"input {index} is missing")
        return value

    def x(self, index: int = 0) -> tvm.ir.Expr:
        """Input `index` as a tensor."""
        return self.value(index).expr

    def dtype(self, index: int = 0) -> str:
        return dtype_of(self.x(index))

    def shape(self, index: int = 0) -> tuple[Dim, ...]:
        return shape_of(self.x(index))

    def rank(self, index: int = 0) -> int:
        ndim = int(self.x(index).ty.ndim)
        if ndim < 0:
            raise Unfixed(f"the rank of input {index} is not known")
        return ndim

    def static(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an input as numbers. Raises Refuse where a dimension is not one."""
        shape = self.shape(index)
        if not all(isinstance(d, int) for d in shape):
            raise Unfixed(f"input {index} has a dynamic shape {[str(d) for d in shape]}")
        return tuple(int(d) for d in shape)

    def array(self, index: int) -> np.ndarray | None:
        """Content of an input that is constant during the import, else None."""
        value = self.value(index)
        array = constant_of(value.expr)
        if array is None and value.content is not None and all(isinstance(c, int) for c in value.content):
            array = np.array(value.content, np_dtype(dtype_of(value.expr))).reshape(self.static(index))
        return array

    def content(self, index: int) -> tuple[Dim, ...] | None:
        """Elements of a small integer input, numbers or symbolic expressions, where they are known."""
        return self.value(index).content

    def ints(self, index: int) -> list[int] | None:
        """Elements of an integer input as numbers, where they are known."""
        array = self.array(index)
        return None if array is None else [int(v) for v in array.reshape(-1)]

    # Attributes and promises.

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)

    def axis(self, default: int = 0, index: int = 0, name: str = "axis") -> int:
        """Attribute `axis` as a number from 0."""
        return normal_axis(int(self.attr(name, default)), self.rank(index))

    def promised(self, index: int = 0) -> Declared:
        return self.declared[index] if index < len(self.declared) else Declared()

    # Emission.

    def emit(self, expr: tvm.ir.Expr) -> tvm.ir.Expr:
        """Bind an expression to a variable, so that its type is known and it is computed once."""
        if isinstance(expr, (relax.Var, tvm.ir.GenericConst)):
            return expr
        return self.bb.emit(expr)

    def te(
        self, function: Callable[..., Any], *args: tvm.ir.Expr, name: str, attrs: Mapping[str, Any] | None = None
    ) -> tvm.ir.Expr:
        """A tensor expression over inputs as a TIR function called `name` with attributes `attrs`.

        Symbolic dimensions may be used in it freely: those that no argument's shape gives are passed along.
        (`BlockBuilder.emit_te` renames the dimensions of its arguments and so loses those in a closure.)
        """
        tensors = [
            te.placeholder([int64(d) for d in shape_of(arg)], dtype_of(arg), f"x{i}") for i, arg in enumerate(args)
        ]
        made = function(*tensors)
        outs = [made] if isinstance(made, te.Tensor) else list(made)
        bound = {d for t in tensors for d in t.shape if isinstance(d, tirx.Var)}
        passed = [v for v in _free_variables([*tensors, *outs]) if v not in bound]
        kernel = te.create_prim_func([*tensors, *passed, *outs], "int64").without_attr("global_symbol")
        if passed:
            kernel = kernel.with_attr("op_pattern", OPAQUE)
        for key, value in (attrs or {}).items():
            kernel = kernel.with_attr(key, value)
        types = [relax.TensorType(list(out.shape), out.dtype) for out in outs]
        call = relax.call_tir(self.bb.add_func(kernel, name), [*args, *passed], types[0] if len(types) == 1 else types)
        return self.bb.emit(call)

    def cast(self, expr: tvm.ir.Expr, dtype: str) -> tvm.ir.Expr:
        """`expr` in another element type; itself when it has it."""
        expr = self.emit(expr)
        return expr if dtype_of(expr) == dtype else self.emit(relax.op.astype(expr, dtype))

    def widened(self, index: int = 0) -> tvm.ir.Expr:
        """A small floating-point input in float32, before rounding where that is known; others as they are."""
        value = self.value(index)
        if value.wide is not None:
            return value.wide
        return self.cast(value.expr, "float32") if self.dtype(index) in NARROW_FLOATS else value.expr

    def narrowed(self, expr: tvm.ir.Expr, dtype: str) -> Value:
        """A float32 result in the element type of the operator, remembered in both."""
        expr = self.emit(expr)
        return Value(self.cast(expr, dtype), wide=expr if dtype in NARROW_FLOATS else None)

    def like(self, number: float | int, index: int = 0) -> tvm.ir.Expr:
        """A scalar constant of the element type of input `index`."""
        return const(number, self.dtype(index))

    def shape_tensor(self, dims: Sequence[Dim]) -> tvm.ir.Expr:
        """An int64 vector of dimensions."""
        if all(isinstance(d, int) for d in dims):
            return const(np.array(dims, np.int64).reshape(len(dims)), "int64")
        return self.emit(relax.op.shape_to_tensor(relax.ShapeExpr([int64(d) for d in dims])))

    def require(self, condition: tvm.ir.Expr) -> None:
        """Make the program fail at run time where a boolean tensor is not true everywhere."""
        number = self.cast(condition, "int64")
        number = self.emit(relax.op.reshape(self.emit(relax.op.min(number)), [1]))
        shape = self.emit(relax.op.tensor_to_shape(number))
        self.bb.match_cast(shape, relax.ShapeType([1]))

    def require_content(self, index: int, expected: Sequence[Dim]) -> None:
        """Make the program fail at run time where the integers of an input are not the expected ones."""
        content = self.content(index)
        if content is not None and all(same(a, b) for a, b in zip(content, expected, strict=True)):
            return
        actual = self.cast(self.x(index), "int64")
        if self.rank(index) != 1:
            actual = self.emit(relax.op.reshape(actual, [len(expected)]))
        shape = self.emit(relax.op.tensor_to_shape(actual))
        self.bb.match_cast(shape, relax.ShapeType([int64(d) for d in expected]))

    def require_dims(self, actual: Sequence[Dim], expected: Sequence[Dim]) -> None:
        """Make the program fail at run time where sizes are not the expected ones."""
        if any(not same(a, b) for a, b in zip(actual, expected, strict=True)):
            shape = self.emit(relax.ShapeExpr([int64(d) for d in actual]))
            self.bb.match_cast(shape, relax.ShapeType([int64(d) for d in expected]))

    def require_source(self, size: Dim, made: Dim) -> None:
        """Refuse to read an axis of no elements for a result that has some, when the model runs where sizes are known
        only then."""
        if isinstance(size, int) and isinstance(made, int):
            if size == 0 < made:
                raise Refuse("it reads elements of an axis that has none")
        elif not ((isinstance(size, int) and size > 0) or (isinstance(made, int) and made == 0)):
            self.require_dims([tirx.min(int64(size) - tirx.min(int64(made), int64(1)), int64(0))], [0])

    def runtime_dims(self, tensor: tvm.ir.Expr, name: str) -> list[Dim]:
        """New symbolic dimensions that take the values of an int64 vector of known length at run time."""
        tensor = self.cast(tensor, "int64")
        (length,) = shape_of(tensor)
        if not isinstance(length, int):
            raise Unfixed("a shape of unknown length is computed at run time")
        dims: list[Dim] = [tirx.Var(f"{name}_{i}", "int64") for i in range(length)]
        if not dims:
            return []
        shape = self.emit(relax.op.tensor_to_shape(tensor))
        self.bb.match_cast(shape, relax.ShapeType(dims))
        return dims


def _free_variables(tensors: Sequence[te.Tensor]) -> list[tirx.Var]:
    """Symbolic dimensions in the shapes and bodies of tensor expressions, in order of first use."""
    found: dict[tirx.Var, None] = {}
    seen: set[Any] = set()
    stack = list(reversed(tensors))
    while stack:
        tensor = stack.pop()
        for dim in tensor.shape:
            found.update(dict.fromkeys(tirx.analysis.undefined_vars(dim)))
        if tensor.op in seen:
            continue
        seen.add(tensor.op)
        if isinstance(tensor.op, te.ComputeOp):
            axes = [axis.var for axis in (*tensor.op.axis, *tensor.op.reduce_axis)]
            for body in tensor.op.body:
                if isinstance(body, tirx.Reduce):
                    axes += [*body.combiner.lhs, *body.combiner.rhs]
                found.update(dict.fromkeys(v for v in tirx.analysis.undefined_vars(body, axes) if v not in axes))
            for axis in tensor.op.reduce_axis:
                found.update(dict.fromkeys(tirx.analysis.undefined_vars(axis.dom.extent)))
        stack.extend(tensor.op.input_tensors)
    return list(found)


def int64(dim: Dim) -> tirx.Expr:
    """A dimension as Relax wants it."""
    if isinstance(dim, int):
        return tirx.IntImm("int64", dim)
    return dim if str(dim.ty) == "int64" else dim.astype("int64")


def normal_axis(axis: int, rank: int) -> int:
    """An axis counted from 0. Raises Refuse when it is outside the rank."""
    if not -rank <= axis < rank and not (rank == 0 and axis in (0, -1)):
        raise Refuse(f"axis {axis} is outside rank {rank}")
    return axis + rank if axis < 0 else axis
