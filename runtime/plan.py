"""Which kernel computes what: products and convolutions of a Relax module become anchors of templates.

A convolution's tensors are kept in blocks of one vector of channels, (N, C, H, W) as (N, C / L, H, W, L), from one
operator to the next; operators between convolutions that keep channels apart follow. Where something else reads such
a tensor, it is unpacked; unpackings that nobody needs vanish as dead code.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from .kernels import products
from .target import Target

# Operators that are looked at here before they are turned into loops.
LOOKED_AT = ["relax.matmul"]


def plan(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Replace what templates take by their anchors. Runs after LegalizeOps has left the operators of LOOKED_AT."""
    return relax.transform.DeadCodeElimination()(_Planner(module, target).run())


@relax.expr_functor.mutator
class _Planner(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        super().__init__(module)
        self.module, self.target = module, target

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") == "relax.matmul":
            product = products.matmul(self.builder_, *call.args, self.target)
            return call if product is None else product
        return call
