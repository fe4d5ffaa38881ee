"""TIR -> machine code on CPUs: the passes of TVM that loop nests on a CPU need.

TVM's own pipeline is made for GPUs first. Most of what it spends on a large kernel of ours goes into
`CompactBufferAllocation`, which looks for buffers that are larger than what is used of them. Our kernels need none of
that, so only loop nests of the general road go through it, and through the search for conditions to move out of loops;
and recurrent kernels, whose second direction binds variables of the first again.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes

from .target import Target

PIPELINE = "graphwright"
GENERAL = "graphwright.general"  # attribute of a loop nest that no template has written


def pipeline_of(target: Target) -> str:
    """The name by which TVM knows the passes for a target."""
    return PIPELINE if target.is_cpu else "default"


def machine_code(module: tvm.IRModule, target: Target) -> Any:
    """A module, of kernels or with a Relax `main`, compiled in this process."""
    return tvm.compile(module, target.tvm(), tir_pipeline=pipeline_of(target))


def _of_general(*passes: tvm.transform.Pass) -> tvm.transform.Pass:
    """Passes for the functions that are marked as GENERAL; the others stay as they are."""
    steps = tvm.transform.Sequential(passes)

    @tvm.transform.module_pass(opt_level=0, name="graphwright.general")
    def apply(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        general = {v: f for v, f in module.functions_items() if GENERAL in (f.attrs or {})}
        changed = dict(steps(tvm.IRModule(general, attrs=module.attrs)).functions_items()) if general else {}
        return tvm.IRModule({**dict(module.functions_items()), **changed}, attrs=module.attrs)

    return apply


def _passes() -> tvm.transform.Pass:
    return tvm.transform.Sequential(
        [
            s_tir.transform.CanonicalizeLoop(),
            s_tir.transform.LowerInitBlock(),
            s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
            s_tir.transform.ConvertBlocksToOpaque(),
            _of_general(s_tir.transform.CompactBufferAllocation()),
            s_tir.transform.LowerMatchBuffer(),
            s_tir.transform.StmtSimplify(),
            s_tir.transform.AnnotateIrregularLoop(),
            s_tir.transform.LowerOpaqueBlock(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.BF16ComputeLegalize(),
            tirx.transform.NarrowDataType(32),
            s_tir.transform.LoopPartition(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.StorageRewrite(),
            _of_general(s_tir.transform.HoistIfThenElse()),
            tirx.transform.UnrollLoop(),
            _of_general(s_tir.transform.RenormalizeSplitPattern()),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            s_tir.transform.RewriteUnsafeSelect(),
            tirx.transform.CommonSubexprElim(),
            tirx.transform.FP8ComputeLegalize(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            tirx.transform.FP8StorageLegalize(),
            tirx.transform.BF16StorageLegalize(),
        ]
    )


tirx.register_tir_pipeline(PIPELINE, lambda: (_passes(), finalize_host_passes, finalize_device_passes))
