"""Which kernel computes what: products and convolutions of a Relax module become anchors of templates.

A convolution's tensors are kept in blocks of one vector of channels, (N, C, H, W) as (N, C / L, H, W, L), from one
operator to the next; operators between convolutions that keep channels apart follow. Where something else reads such
a tensor, it is unpacked; unpackings that nobody needs vanish as dead code.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from .blocked import IMAGES, blocked_elementwise, blocked_shape, first_channel
from .elements import NotElementwise, size_of
from .kernels import channels, convolutions, integers, pooling, products
from .kernels.vectors import Vectors
from .target import Target
from .templates import anchor, spec_of
from .work import FLOPS

# Operators that are looked at here before they are turned into loops.
CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d")
TRANSPOSED = ("relax.nn.conv1d_transpose", "relax.nn.conv2d_transpose")
LOOKED_AT = ["relax.matmul", "relax.concat", *CONVOLUTIONS, *TRANSPOSED]


def plan(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Replace what templates take by their anchors. Runs after LegalizeOps has left the operators of LOOKED_AT."""
    # A second name of a value would keep Relax from fusing its users.
    module = relax.transform.CanonicalizeBindings()(_Planner(module, target).run())
    return relax.transform.DeadCodeElimination()(module)


@relax.expr_functor.mutator
class _Planner(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module, self.target = module, target
        self.lanes = Vectors(target.isa).lanes
        self.packed: dict[Any, Any] = {}
        self.weights: dict[Any, Any] = {}  # packed ones by what they were
        self.copies: dict[Any, Any] = {}  # plain tensors that have been packed

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.packed, self.copies = {}, {}
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        original = call
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        result = None
        if name == "relax.matmul":
            result = products.matmul(self.builder_, call.args[0], call.args[1], self.target, self.weights)
        elif name in CONVOLUTIONS:
            call = self.builder_.normalize(call)
            blocked = self.in_blocks(call.args[0])
            into, weights = self.into_blocks, self.weights
            blocks = convolutions.convolution(self.builder_, call, blocked, into, self.target, weights)
            result = convolutions.widened(call) if blocks is None else self.unpacked(blocks, original.ty)
        elif name in TRANSPOSED:
            call = self.builder_.normalize(call)
            blocked = self.in_blocks(call.args[0])
            found = convolutions.transposed_convolution(self.builder_, call, blocked, self.into_blocks, self.target)
            if found is not None:
                value, in_blocks = found
                result = self.unpacked(value, original.ty) if in_blocks else value
        elif name == "relax.concat":
            result = self.concat(call, original.ty)
        elif name == "relax.call_tir":
            result = self.call_tir(call, original.ty)
        return call if result is None else result

    def visit_match_cast_(self, binding: Any) -> None:
        """A check of sizes that were to be found out; of an image in blocks it checks the blocks."""
        blocks = self.in_blocks(self.visit_expr(binding.value))
        dims = convolutions.image_of(binding.ty)
        if blocks is None or dims is None or len(dims) != len(blocks.ty.shape.values) - 1:
            super().visit_match_cast_(binding)
            return
        kind = relax.TensorType(blocked_shape(dims, self.lanes), binding.ty.dtype)
        self.set_var_remap(binding.var, self.unpacked(self.builder_.match_cast(blocks, kind), binding.ty))

    def in_blocks(self, value: Any) -> Any | None:
        """The tensor in blocks that `value` was unpacked from; None where it was not."""
        made = value
        while isinstance(made, relax.Var):
            if made in self.packed:
                return self.packed[made]
            made = self.builder_.lookup_binding(made)
        if not isinstance(made, tvm.ir.Call):
            return None
        if getattr(made.op, "name", "") == "relax.call_tir":
            function = self.function(made.args[0])
            if function is not None and convolutions.UNPACK in (function.attrs or {}):
                return made.args[1].fields[0]
        if getattr(made.op, "name", "") == "relax.reshape" and made.args[0] in self.packed.values():
            return made.args[0]
        return None

    def into_blocks(self, value: Any) -> Any:
        """A plain tensor in blocks, packed once."""
        blocks = self.in_blocks(value)
        if blocks is None:
            blocks = self.copies.get(value)
        if blocks is None:
            blocks = convolutions.pack(self.builder_, value, self.target)
            if isinstance(value, relax.Var):
                self.copies[value] = blocks
        return blocks

    def function(self, variable: Any) -> tirx.PrimFunc | None:
        functions = self.builder_.get().functions
        found = functions.get(variable) if hasattr(functions, "get") else functions[variable]
        return found if isinstance(found, tirx.PrimFunc) else None

    def unpacked(self, blocks: Any, kind: Any) -> Any:
        """The plain form of a result in blocks, bound so that its users find the blocks."""
        shape = convolutions.image_of(kind)
        assert shape is not None, "the number of channels is known"
        plain = self.builder_.emit(convolutions.unpack(self.builder_, blocks, shape, self.target))
        self.packed[plain] = blocks
        return plain

    def call_tir(self, call: Any, kind: Any) -> Any | None:
        """Operators between convolutions, in blocks where one of their inputs is."""
        function = self.function(call.args[0])
        if function is None or len(call.args) > 2 or not isinstance(kind, relax.TensorType):
            return None
        arguments = [a for a in call.args[1].fields if isinstance(a.ty, relax.TensorType)]
        blocked = [self.in_blocks(a) for a in arguments]
        spec = spec_of(function)
        if spec is not None and spec["template"] in (*pooling.NAMES, "interpolate"):
            source = self.into_blocks(arguments[0])
            shape = convolutions.image_of(kind)
            assert shape is not None, "the number of channels is known"
            out = relax.TensorType(blocked_shape(shape, self.lanes), kind.dtype)
            flops = int(function.attrs[FLOPS])
            result = anchor(self.builder_, spec["template"], spec["parameters"], [source, *arguments[1:]], out, flops)
            return self.unpacked(result, kind)
        if spec is not None and spec["template"] == integers.PLAN:
            return self.unpacked(
                integers.planned(
                    self.builder_, spec["parameters"], arguments, kind, blocked[0], self.into_blocks, self.target,
                    self.weights,
                ),
                kind,
            )  # fmt: skip
        dims = convolutions.image_of(kind)
        if dims is None or not any(b is not None for b in blocked):
            return None
        if spec is not None or convolutions.UNPACK in (function.attrs or {}):
            return None
        if len(arguments) == 1 and relax.analysis.has_reshape_pattern(function):
            return self.reshaped(arguments[0], blocked[0], dims, kind)
        if len(arguments) == 1 and (first := first_channel(function)) is not None:
            return self.channels([blocked[0]], [(0, first, int(kind.shape.values[1]))], kind)
        blocked = [self.copies.get(a) if b is None else b for a, b in zip(arguments, blocked, strict=True)]
        try:
            result = blocked_elementwise(self.builder_, function, arguments, blocked, dims, self.lanes)
        except NotElementwise:
            return None
        return self.unpacked(result, kind)

    def reshaped(self, plain: Any, blocks: Any, dims: list[Any], kind: Any) -> Any | None:
        """Another view of an image, where channels stay and one axis of several is long: the blocks lie alike."""
        source = convolutions.image_of(plain.ty)
        if source is None or len(dims) < 3 or source[1] != dims[1] or size_of(source[0]) != size_of(dims[0]):
            return None
        long = [[size_of(d) for d in sizes[2:] if size_of(d) != 1] for sizes in (source, dims)]
        if long[0] != long[1]:
            return None
        return self.unpacked(self.builder_.emit(relax.op.reshape(blocks, blocked_shape(dims, self.lanes))), kind)

    def concat(self, call: Any, kind: Any) -> Any | None:
        """Channels behind each other, where at least half of them are in blocks."""
        if not isinstance(call.args[0], relax.Tuple) or not isinstance(kind, relax.TensorType):
            return None
        fields = list(call.args[0].fields)
        rank = len(kind.shape.values)
        if rank < 3 or int(call.attrs.axis) % rank != 1 or str(kind.dtype.dtype) not in IMAGES:
            return None
        dims = [convolutions.image_of(f.ty) for f in fields]
        if convolutions.image_of(kind) is None or any(d is None or 0 in map(size_of, d[1:]) for d in dims):
            return None
        blocked = [self.in_blocks(f) for f in fields]
        counts = [int(f.ty.shape.values[1]) for f in fields]
        if 2 * sum(c for c, b in zip(counts, blocked, strict=True) if b is not None) < sum(counts):
            return None
        sources = [self.into_blocks(f) for f in fields]
        return self.channels(sources, [(i, 0, c) for i, c in enumerate(counts)], kind)

    def channels(self, sources: list[Any], ranges: list[tuple[int, int, int]], kind: Any) -> Any:
        """Ranges of channels of tensors in blocks behind each other."""
        shape = convolutions.image_of(kind)
        assert shape is not None, "the number of channels is known"
        out = relax.TensorType(blocked_shape(shape, self.lanes), kind.dtype)
        return self.unpacked(channels.joined(self.builder_, sources, ranges, out), kind)
