"""Dequantizations are repeated for each of their users.

Relax fuses an operator into its user only where that is the only one. A dequantized tensor that several read would lie
in memory in float32, four times as large as what it is computed from in three instructions.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from .importing.quantized import DEQUANTIZE


def repeated(module: tvm.IRModule) -> tvm.IRModule:
    """The module with a call of its own for each use of a dequantized tensor. Runs before fusion."""
    marked = {
        variable
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and DEQUANTIZE in (function.attrs or {})
    }
    if not marked:
        return module
    return relax.transform.DeadCodeElimination()(_Repeater(module, marked).run())


@relax.expr_functor.mutator
class _Repeater(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, marked: set[Any]) -> None:
        super().__init__(module)
        self.module, self.marked = module, marked

    def run(self) -> tvm.IRModule:
        for variable, function in self.module.functions_items():
            if isinstance(function, relax.Function):
                self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        arguments = [self.own(argument) for argument in call.args]
        if all(new is old for new, old in zip(arguments, call.args, strict=True)):
            return call
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def own(self, argument: Any) -> Any:
        """An argument; a dequantized tensor anew."""
        if isinstance(argument, relax.Tuple):
            fields = [self.own(field) for field in argument.fields]
            same = all(new is old for new, old in zip(fields, argument.fields, strict=True))
            return argument if same else relax.Tuple(fields)
        made = self.builder_.lookup_binding(argument) if isinstance(argument, relax.Var) else None
        if not isinstance(made, tvm.ir.Call) or getattr(made.op, "name", "") != "relax.call_tir":
            return argument
        return self.builder_.emit(made) if made.args[0] in self.marked else argument
