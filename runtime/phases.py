"""The Relax pipeline in named phases: from an imported module to an executable and its lifted constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax

from .codegen import pipeline_of
from .target import Target

LIFT = 64  # bytes; smaller constants stay inside the library
MAIN = "main"


def compile_module(
    module: tvm.IRModule, target: Target, observe: Callable[[tvm.IRModule], None] = lambda lowered: None
) -> tuple[Any, list[tvm.runtime.Tensor]]:
    """Compile a Relax module whose `main` takes the graph inputs.

    Returns the executable, whose `main` takes one more argument, the tuple of the returned constants. observe: sees
    the lowered module before code is generated.
    """
    tvm_target = target.tvm()
    with tvm_target, tvm.transform.PassContext(opt_level=3):
        module = legalize(module, target)
        module = fuse(module, target)
        module = schedule(module, target)
        module, constants = lift_constants(module)
        module = lower()(module)
    observe(module)
    executable = relax.build(module, tvm_target, relax_pipeline=None, tir_pipeline=pipeline_of(target))
    return executable, constants


def legalize(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Operators -> loop nests, and on a CPU anchors of kernel templates."""
    dispatch = [relax.backend.DispatchSampling(), relax.backend.DispatchSortScan()]
    if target.is_cpu:
        from .plan import LOOKED_AT, plan
        from .repeat import repeated

        # Before constants are folded: products read narrow weights before they are widened.
        dispatch.insert(0, relax.transform.DeadCodeElimination())
        module = repeated(module)
    module = _folded(tvm.transform.Sequential(dispatch)(module))
    if target.is_cpu:
        module = relax.transform.LegalizeOps(skip_ops=LOOKED_AT, enable_warning=False)(module)
        module = plan(module, target)
    rest = [relax.transform.LegalizeOps(enable_warning=False), relax.transform.AnnotateTIROpPattern()]
    return _folded(tvm.transform.Sequential(rest)(module))


def _folded(module: tvm.IRModule) -> tvm.IRModule:
    """Calls of loop nests with nothing but constants become their results. Stubs of anchors have no loops yet: what
    cannot be folded stands for them meanwhile."""
    from .templates import spec_of

    functions = dict(module.functions_items())
    stubs = {
        name: function
        for name, function in functions.items()
        if isinstance(function, tvm.tirx.PrimFunc) and spec_of(function) is not None
    }
    hidden = {name: relax.ExternFunc(name.name_hint) for name in stubs}
    folded = relax.transform.FoldConstant()(tvm.IRModule({**functions, **hidden}, attrs=module.attrs))
    return tvm.IRModule({**dict(folded.functions_items()), **stubs}, attrs=module.attrs)


def fuse(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Loop nests -> fewer loop nests, and on a CPU kernels for those that a template takes."""
    if target.is_cpu:
        from .claiming import annotate, claim

        module = claim(relax.transform.FuseOps()(annotate(module)), target)
    else:
        module = relax.transform.FuseOps()(module)
    module = relax.transform.FuseTIR()(module)
    if "gpu" in target.tvm().keys:
        module = tvm.s_tir.dlight.ApplyDefaultSchedule(*_gpu_rules())(module)
    return module


def _gpu_rules() -> list[Any]:
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    return [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]


def schedule(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Loop nests that nothing else has scheduled get the target's default schedule."""
    if not target.is_cpu:
        return module
    from .schedule import default_schedule

    return default_schedule(module, target)


def lower() -> tvm.transform.Pass:
    """Values -> memory: explicit calls, planned buffers, VM instructions."""
    return tvm.transform.Sequential(
        [
            relax.transform.RewriteDataflowReshape(),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


@relax.expr_functor.mutator
class _Lifter(relax.PyExprMutator):
    """Replaces every constant of `main` above LIFT bytes by an element of one tuple parameter."""

    def __init__(self, module: tvm.IRModule, constants: Sequence[tvm.ir.GenericConst], params: relax.Var) -> None:
        super().__init__(module)
        self.index = {constant: position for position, constant in enumerate(constants)}
        self.params = params

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        if op not in self.index:
            return op
        return self.builder_.emit(relax.TupleGetItem(self.params, self.index[op]))


def _nbytes(constant: tvm.ir.GenericConst) -> int:
    array = constant.value
    size = 1
    for dim in array.shape:
        size *= int(dim)
    return size * (tvm.DataType(str(array.dtype)).bits + 7) // 8


def _lifted(constant: tvm.ir.GenericConst) -> bool:
    """Large ones, and empty ones: TVM writes them into a library but cannot load them from it."""
    return _nbytes(constant) > LIFT or _nbytes(constant) == 0


def lift_constants(module: tvm.IRModule) -> tuple[tvm.IRModule, list[tvm.runtime.Tensor]]:
    """Move the large constants of `main` out of the module: they become the elements of its last parameter."""
    function = module[MAIN]
    constants: list[tvm.ir.GenericConst] = []
    seen: set[tvm.ir.GenericConst] = set()

    def collect(expression: relax.Expr) -> None:
        if isinstance(expression, tvm.ir.GenericConst) and expression not in seen and _lifted(expression):
            seen.add(expression)
            constants.append(expression)

    relax.analysis.post_order_visit(function, collect)
    params = relax.Var("params", relax.TupleType([constant.ty for constant in constants]))
    lifter = _Lifter(module, constants, params)
    body = lifter.visit_expr(function.body)
    attrs = dict(function.attrs) if function.attrs else {}
    lifted = relax.Function([*function.params, params], body, function.ret_ty, function.is_pure)
    lifted = lifted.with_attrs({key: value for key, value in attrs.items() if key != "params"})
    module = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    module[MAIN] = lifted
    return relax.transform.Normalize()(module), [constant.value for constant in constants]
