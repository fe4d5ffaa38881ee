"""Templates of convolutions and poolings over blocks of channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm import relax, te, tirx

from ..blocked import blocked_shape
from ..elements import expression, renamed
from ..target import Target
from ..templates import Body, anchor, template
from . import conv as kernels
from . import conv_transposed, moves
from .channels import joined
from .conv import ConvSpec, ConvTile, Sizes
from .conv_spec import NOMINAL
from .conv_transposed import TransposedSpec
from .narrow_floats import NARROW
from .vectors import Expr, Vectors


@template("conv", per_item=True)
def conv(parameters: dict[str, Any], body: Body) -> None:
    """parameters: the fields of ConvSpec and of ConvTile, and whether rows are the spec's columns. Of 8-bit numbers the
    third input is what sums start at."""
    spec, tile = ConvSpec(**tuples(parameters["spec"])), ConvTile(**parameters["tile"])
    x, w, *first = body.inputs
    lanes = body.vectors.lanes
    drop = 3 - (len(body.out_shape) - 2)  # 1 where the convolution has one spatial axis

    def finish(value: Expr, place: Sequence[Expr]) -> None:
        batch, block, *at = place
        at = at[::-1] if parameters["swapped"] else at[drop:]
        body.store(value, [batch, block, *at, tirx.const(0, body.index)], None)

    assert lanes == body.out_shape[-1]
    sizes = None
    if spec.free:
        one_row = any({2, 3} <= set(group) for group in body.merged)
        sizes = Sizes.of(body.vectors, image_sizes(body), one_row)
    kernels.emit(
        body.vectors, spec, tile, x, w, finish, body.target.cores, body.index, body.target.caches,
        first[0] if first else None, sizes,
    )  # fmt: skip


def image_sizes(body: Body) -> list[Expr]:
    """Rows and columns of an image and of the result."""
    return [expression(size, body.index) for size in (*body.shapes[0][2:4], *body.out_shape[2:4])]


def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a spec as they were before JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@template("conv-transposed", per_item=True)
def transposed(parameters: dict[str, Any], body: Body) -> None:
    """parameters: the fields of TransposedSpec, and of the ConvTile of each convolution in it."""
    spec = TransposedSpec(**tuples(parameters["spec"]))
    tiles = [ConvTile(**tile) for tile in parameters["tiles"]]
    x, *weights = body.inputs
    common, sizes = (body.target.cores, body.index), image_sizes(body) if spec.free else None
    if conv_transposed.narrow(spec, body.vectors.isa):
        drop = 4 - len(body.out_shape)  # 1 where there is one spatial axis

        def store(value: Expr, place: Sequence[Expr], count: int | Expr | None) -> None:
            n, channel, *at = place
            body.store(value, [n, channel, *at[drop:]], count)

        conv_transposed.emit_narrow(body.vectors, spec, x, weights[0], store, *common, sizes)
        return
    drop = 5 - len(body.out_shape)

    def finish(value: Expr, place: Sequence[Expr]) -> None:
        n, block, *at = place
        body.store(value, [n, block, *at[drop:], tirx.const(0, body.index)], None)

    conv_transposed.emit(body.vectors, spec, tiles, x, weights, finish, *common, body.target.caches, sizes)


Pack = Callable[[Any], Any]  # a tensor (N, C, ...) -> in blocks


@dataclass(frozen=True)
class _Sizes:
    """What a Relax convolution over one or two axes says, with two axes. given, out: the shapes of its input and its
    result. fields: those that all specs share; a batch that is known only at run time is one item there.
    """

    weight: np.ndarray
    given: list[Any]
    out: list[Any]
    fields: dict[str, Any]


def dims_of(kind: Any) -> list[Any] | None:
    """A shape of which all but the first axis, the batch, are numbers; None for others."""
    dims = image_of(kind)
    return dims if dims is not None and all(isinstance(d, int) for d in dims[1:]) else None


def image_of(kind: Any) -> list[Any] | None:
    """A shape of channels whose number is known; None for others."""
    if not isinstance(kind, relax.TensorType) or not isinstance(kind.shape, relax.ShapeExpr):
        return None
    dims = [int(d) if isinstance(d, tirx.IntImm) else d for d in kind.shape.values]
    return dims if len(dims) > 1 and isinstance(dims[1], int) else None


def _sizes(call: Any, blocked: Any | None) -> _Sizes | None:
    """None for data of other types than float32, empty images, weights that are not constant."""
    x, w = call.args
    if not isinstance(w, tvm.ir.GenericConst) or str(x.ty.dtype.dtype) != "float32":
        return None
    shape, out = image_of(x.ty), image_of(call.ty)
    if shape is None or out is None:
        return None
    attrs = call.attrs
    rank = len(shape) - 2
    free = not all(isinstance(d, int) for d in (*shape[2:], *out[2:]))
    if rank not in (1, 2) or (free and rank == 1) or 0 in [d for d in (*shape, *out) if isinstance(d, int)]:
        return None

    def pair(values: Any, fill: int) -> tuple[int, int]:
        numbers = [int(v) for v in values][:rank]
        return (fill, numbers[0]) if rank == 1 else (numbers[0], numbers[1])

    weight = np.asarray(w.value.numpy())
    if rank == 1:
        weight = weight[:, :, None, :]
    kernel, strides, dilations = weight.shape[2:], pair(attrs.strides, 1), pair(attrs.dilation, 1)
    given, made = shape[2:], out[2:]
    if free:
        # What an image of one place lacks for one place of the result; below zero where padding is wider.
        lacking = [
            (k - 1) * d - int(attrs.padding[i]) - int(attrs.padding[rank + i])
            for i, (k, d) in enumerate(zip(kernel, dilations, strict=True))
        ]
        made = [max(NOMINAL, 1 - missing // s) for missing, s in zip(lacking, strides, strict=True)]
        given = [(size - 1) * s + missing + 1 for size, s, missing in zip(made, strides, lacking, strict=True)]
        if hasattr(attrs, "output_padding"):  # a transposed one makes the larger image of the two
            given, made = made, [size + int(more) for size, more in zip(given, attrs.output_padding, strict=True)]
    fields = {
        "batch": shape[0] if isinstance(shape[0], int) else 1, "in_channels": shape[1], "out_channels": out[1],
        "in_size": pair(given, 1), "out_size": pair(made, 1), "kernel": kernel, "strides": strides,
        "dilations": dilations, "pads": pair(attrs.padding, 0), "groups": int(attrs.groups),
        "blocked_input": shape[1] > 4 or blocked is not None or int(attrs.groups) > 1, "free": free,
    }  # fmt: skip
    return _Sizes(weight, shape, out, fields)


def chosen_tile(spec: ConvSpec, target: Target) -> ConvTile:
    """The tuned one; by rule where there is none."""
    tuned = None if spec.free else target.tuning.find("conv", vars(spec))
    return ConvTile(**tuned) if tuned else kernels.choose_tile(spec, target.isa, target.caches)


def one_column(fields: Mapping[str, Any]) -> bool:
    """Whether all places lie in one column."""
    sizes = (fields["in_size"], fields["out_size"], fields["kernel"], fields["strides"])
    return all(size[1] == 1 for size in sizes) and fields["pads"][1] == 0


def turned(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's fields with rows and columns exchanged."""
    return {name: value[::-1] if isinstance(value, tuple) else value for name, value in fields.items()}


def convolution(
    bb: relax.BlockBuilder, call: Any, blocked: Any | None, into_blocks: Pack, target: Target, packed: dict[Any, Any]
) -> Any | None:
    """A Relax convolution with constant weights as a template over blocks; the result in blocks, or None.

    blocked: the input in blocks, None where it is not; `into_blocks` brings it there. Convolutions that take few
    channels read them unblocked. packed: weights that were packed before, so that those of several convolutions are
    held once.
    """
    sizes = _sizes(call, blocked)
    if sizes is None:
        return None
    swapped = len(sizes.out) == 4 and not sizes.fields["free"] and one_column(sizes.fields)
    if swapped:
        # Kernels work along rows. Columns of one place lie in memory as a row does.
        sizes = dataclasses.replace(sizes, weight=sizes.weight.swapaxes(2, 3), fields=turned(sizes.fields))
    spec = ConvSpec(**sizes.fields, stored=str(call.args[1].ty.dtype.dtype))

    def one(source: Any, spec: ConvSpec, weight: np.ndarray, out: Sequence[Any], key: Any) -> Any:
        lanes, tile = Vectors(target.isa).lanes, chosen_tile(spec, target)
        if (key, spec, tile) not in packed:
            weights = kernels.pack_weights(weight, spec, target.isa, tile)
            packed[key, spec, tile] = relax.const(weights, str(weights.dtype))
        kind = relax.TensorType(blocked_shape(out, lanes), "float32")
        places = math.prod(d for d in out[1:] if isinstance(d, int))
        flops = 2 * (spec.batch or 1) * places * spec.taps * spec.each
        parameters = {"spec": vars(spec), "tile": vars(tile), "swapped": swapped}
        return anchor(bb, "conv", parameters, [source, packed[key, spec, tile]], kind, flops)

    if kernels.supported(spec, target.isa) is None:
        source = into_blocks(call.args[0]) if spec.blocked_input else call.args[0]
        return one(source, spec, sizes.weight, sizes.out, call.args[1])
    alone = _of_one_group(spec)
    if alone is None or kernels.supported(alone, target.isa) is not None:
        return None
    weights = np.split(sizes.weight, spec.groups)

    def part(group: int, source: Any, out: Sequence[Any]) -> Any:
        return one(source, alone, weights[group], out, (call.args[1], group))

    return _joined_groups(bb, into_blocks(call.args[0]), spec, sizes.given, sizes.out, part, target)


def widened(call: Any) -> Any:
    """A Relax convolution that no template takes, with weights of 16 bits as float32; others as they are."""
    weight, kind = call.args[1], str(call.args[1].ty.dtype.dtype)
    if kind not in NARROW or not isinstance(weight, tvm.ir.GenericConst):
        return call
    wide = relax.const(np.asarray(weight.value.numpy()).astype(np.float32), "float32")
    return tvm.ir.Call(call.op, [call.args[0], wide], call.attrs, call.ty_args)


def transposed_convolution(
    bb: relax.BlockBuilder, call: Any, blocked: Any | None, into_blocks: Pack, target: Target
) -> tuple[Any, bool] | None:
    """A transposed one: the result, and whether it is in blocks; None where there is no template."""
    sizes = _sizes(call, blocked)
    if sizes is None:
        return None
    spec = TransposedSpec(**sizes.fields)
    if conv_transposed.supported(spec, target.isa) is None:
        source = into_blocks(call.args[0]) if spec.blocked_input else call.args[0]
        narrow = conv_transposed.narrow(spec, target.isa)
        return _transposed(bb, source, spec, sizes.weight, sizes.out, target), not narrow
    alone = _of_one_group(spec)
    if alone is None or conv_transposed.supported(alone, target.isa) is not None:
        return None
    weights = np.split(sizes.weight, spec.groups)

    def part(group: int, source: Any, out: Sequence[Any]) -> Any:
        value = _transposed(bb, source, alone, weights[group], out, target)
        return pack(bb, value, target) if conv_transposed.narrow(alone, target.isa) else value

    return _joined_groups(bb, into_blocks(call.args[0]), spec, sizes.given, sizes.out, part, target), True


def _transposed(
    bb: relax.BlockBuilder, source: Any, spec: TransposedSpec, weight: np.ndarray, out: Sequence[Any], target: Target
) -> Any:
    """The anchor of a transposed convolution; its result is plain in the narrow form and in blocks otherwise."""
    lanes = Vectors(target.isa).lanes
    tiles = [chosen_tile(each, target) for each in conv_transposed.convolutions(spec, target.isa)]
    weights = conv_transposed.pack(weight, spec, target.isa, tiles)
    narrow = conv_transposed.narrow(spec, target.isa)
    kind = relax.TensorType(list(out) if narrow else blocked_shape(out, lanes), "float32")
    inputs = [source, *(relax.const(w, "float32") for w in weights)]
    parameters = {"spec": vars(spec), "tiles": [vars(tile) for tile in tiles]}
    flops = 2 * spec.multiply_adds
    if spec.free:  # of one place of the result
        flops = 2 * spec.batch * spec.out_channels * (spec.in_channels // spec.groups) * math.prod(spec.kernel)
        flops //= math.prod(spec.strides)
    return anchor(bb, "conv-transposed", parameters, inputs, kind, flops)


# --- groups that share vectors ----------------------------------------------------------------------------------

GROUPS = 32  # up to which each has a kernel call of its own; more go to TVM's general code

S = TypeVar("S", ConvSpec, TransposedSpec)


def _of_one_group(spec: S) -> S | None:
    """The convolution of one of its groups; None where there is one group, or too many."""
    if not 1 < spec.groups <= GROUPS or spec.in_channels % spec.groups or spec.out_channels % spec.groups:
        return None
    given, made = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    return dataclasses.replace(spec, in_channels=given, out_channels=made, groups=1)


def _joined_groups(
    bb: relax.BlockBuilder, source: Any, spec: ConvSpec | TransposedSpec, shape: Sequence[Any], out: Sequence[Any],
    part: Callable[[int, Any, Sequence[Any]], Any], target: Target,
) -> Any:  # fmt: skip
    """Groups that begin inside vectors one by one: their channels are moved to vectors of their own and back.

    source: (N, C, ...) of that shape in blocks; out: the result's plain shape. part(group, its channels in blocks, the
    plain shape of its result): a call whose result is in blocks.
    """
    lanes, groups = Vectors(target.isa).lanes, spec.groups
    given, made = spec.in_channels // groups, spec.out_channels // groups
    kind = relax.TensorType(blocked_shape([shape[0], given, *shape[2:]], lanes), "float32")
    parts = [
        part(group, joined(bb, [source], [(0, group * given, given)], kind), [out[0], made, *out[2:]])
        for group in range(groups)
    ]
    whole = relax.TensorType(blocked_shape(out, lanes), "float32")
    return joined(bb, parts, [(group, 0, made) for group in range(groups)], whole)


# --- layouts ----------------------------------------------------------------------------------------------------

UNPACK = "graphwright.unpack"


def pack(bb: relax.BlockBuilder, x: Any, target: Target) -> Any:
    """(N, C, ...) -> blocks."""
    lanes = Vectors(target.isa).lanes
    shape = image_of(x.ty)
    assert shape is not None, "the number of channels is known"
    out = blocked_shape(shape, lanes)
    known = all(isinstance(d, int) for d in shape[2:])
    if known and shape[1] % lanes == 0 and math.prod(shape[2:]) == 1:
        return bb.emit(relax.op.reshape(x, out))
    if known and shape[1] % lanes == 0:
        # Blocks of rows are transposed; the rest is another view of the same memory.
        rows = bb.emit(relax.op.reshape(x, [shape[0], out[1], lanes, math.prod(shape[2:])]))
        return bb.emit(relax.op.reshape(bb.emit(relax.op.permute_dims(rows, [0, 1, 3, 2])), out))
    dtype = str(x.ty.dtype.dtype)
    function = moves.blocks(shape, target, True, dtype) if dtype in moves.ELEMENTS else _packing(shape, out, dtype)
    return bb.emit(relax.call_tir(bb.add_func(function, "pack"), [x], relax.TensorType(out, dtype)))


def _packing(shape: Sequence[Any], out: Sequence[Any], dtype: str) -> tirx.PrimFunc:
    """A loop nest from (N, C, ...) to blocks; lanes beyond C repeat the last channel."""
    symbols: dict[Any, Any] = {}
    data = te.placeholder([d if isinstance(d, int) else renamed(d, symbols) for d in shape], dtype, "x")

    def element(n: Any, block: Any, *rest: Any) -> Any:
        *place, lane = rest
        return data(n, tirx.min(block * out[-1] + lane, shape[1] - 1), *place)

    sizes = tuple(d if isinstance(d, int) else renamed(d, symbols) for d in out)
    function = te.create_prim_func([data, te.compute(sizes, element, name="pack")], "int64")
    return function.without_attr("global_symbol")


def unpack(bb: relax.BlockBuilder, blocked: Any, shape: Sequence[Any], target: Target) -> Any:
    """Blocks -> (N, C, ...)."""
    lanes = Vectors(target.isa).lanes
    known = all(isinstance(d, int) for d in shape[2:])
    if known and shape[1] % lanes == 0 and math.prod(shape[2:]) == 1:
        return relax.op.reshape(blocked, list(shape))
    if known and shape[1] % lanes == 0:
        rows = bb.emit(relax.op.reshape(blocked, [shape[0], shape[1] // lanes, math.prod(shape[2:]), lanes]))
        return relax.op.reshape(bb.emit(relax.op.permute_dims(rows, [0, 1, 3, 2])), list(shape))
    dtype = str(blocked.ty.dtype.dtype)
    if dtype in moves.ELEMENTS:
        function = moves.blocks(shape, target, False, dtype)
    else:
        symbols: dict[Any, Any] = {}
        data = te.placeholder([renamed(d, symbols) for d in blocked.ty.shape.values], dtype, "x")

        def element(n: Any, channel: Any, *place: Any) -> Any:
            return data(n, tirx.floordiv(channel, lanes), *place, tirx.floormod(channel, lanes))

        sizes = tuple(d if isinstance(d, int) else renamed(d, symbols) for d in shape)
        function = te.create_prim_func([data, te.compute(sizes, element, name="unpack")], "int64")
        function = function.without_attr("global_symbol")
    kernel = bb.add_func(function.with_attr(UNPACK, True), "unpack")
    return relax.call_tir(kernel, [blocked], relax.TensorType(list(shape), dtype))
