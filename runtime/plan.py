"""Which kernel computes what: products and convolutions of a Relax module become anchors of templates.

A convolution's tensors are kept in blocks of one vector of channels, (N, C, H, W) as (N, C / L, H, W, L), from one
operator to the next; operators between convolutions that keep channels apart follow. Where something else reads such
a tensor, it is unpacked; unpackings that nobody needs vanish as dead code.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from .blocked import blocked_elementwise, blocked_shape
from .elements import NotElementwise
from .kernels import convolutions, products
from .kernels.vectors import Vectors
from .target import Target
from .templates import anchor, spec_of

# Operators that are looked at here before they are turned into loops.
CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d")
LOOKED_AT = ["relax.matmul", "relax.concat", *CONVOLUTIONS]


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

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.packed = {}
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
            source = self.in_blocks(call.args[0])
            blocks = convolutions.convolution(self.builder_, call, source, self.target, self.weights)
            result = None if blocks is None else self.unpacked(blocks, original.ty)
        elif name == "relax.concat":
            result = self.concat(call, original.ty)
        elif name == "relax.call_tir":
            result = self.call_tir(call, original.ty)
        return call if result is None else result

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

    def function(self, variable: Any) -> tirx.PrimFunc | None:
        functions = self.builder_.get().functions
        found = functions.get(variable) if hasattr(functions, "get") else functions[variable]
        return found if isinstance(found, tirx.PrimFunc) else None

    def unpacked(self, blocks: Any, kind: Any) -> Any:
        """The plain form of a result in blocks, bound so that its users find the blocks."""
        shape = [int(d) for d in kind.shape.values]
        plain = self.builder_.emit(convolutions.unpack(self.builder_, blocks, shape, self.lanes))
        self.packed[plain] = blocks
        return plain

    def call_tir(self, call: Any, kind: Any) -> Any | None:
        """Operators between convolutions, in blocks where one of their inputs is."""
        function = self.function(call.args[0])
        if function is None or len(call.args) > 2 or not isinstance(kind, relax.TensorType):
            return None
        arguments = list(call.args[1].fields)
        blocked = [self.in_blocks(a) for a in arguments]
        spec = spec_of(function)
        if spec is not None and spec["template"] in ("pool", "global-mean", "upsample"):
            (source,) = blocked
            if source is None:
                source = convolutions.pack(self.builder_, arguments[0], self.lanes)
            shape = [int(d) for d in kind.shape.values]
            out = relax.TensorType(blocked_shape(shape, self.lanes), "float32")
            flops = int(function.attrs["graphwright.flops"])
            result = anchor(self.builder_, spec["template"], spec["parameters"], [source], out, flops)
            return self.unpacked(result, kind)
        if not any(b is not None for b in blocked) or spec is not None or convolutions.UNPACK in (function.attrs or {}):
            return None
        try:
            result = blocked_elementwise(self.builder_, function, arguments, blocked, self.lanes)
        except NotElementwise:
            return None
        return self.unpacked(result, kind)

    def concat(self, call: Any, kind: Any) -> Any | None:
        """Channels behind each other, where every tensor but the last fills its blocks."""
        if not isinstance(call.args[0], relax.Tuple) or not isinstance(kind, relax.TensorType):
            return None
        fields = list(call.args[0].fields)
        if len(kind.shape.values) < 3 or int(call.attrs.axis) % len(kind.shape.values) != 1:
            return None
        blocked = [self.in_blocks(f) for f in fields]
        channels = [f.ty.shape.values[1] for f in fields]
        if any(b is None for b in blocked) or any(int(c) % self.lanes for c in channels[:-1]):
            return None
        return self.unpacked(self.builder_.emit(relax.op.concat(blocked, axis=1)), kind)


