"""Which of TVM's passes a loop nest goes through on its way to machine code."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from graphwright.runtime.target import Target

pytestmark = pytest.mark.tvm


def nest(general: bool) -> Any:
    """y = 2 · (x + 1) over 8 elements, by way of a buffer of 1000."""
    from graphwright.runtime.codegen import GENERAL
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name("nest")
        x, y = (T.match_buffer(T.arg(name, T.handle()), (8,), "float32") for name in "xy")
        with T.sblock("root"):
            T.reads()
            T.writes()
            held = T.alloc_buffer((1000,), "float32", scope="global")
            with T.serial(tirx.const(8, "int32")) as i:
                T.buffer_store(held, x[i] + T.float32(1), [i])
            with T.serial(tirx.const(8, "int32")) as i:
                T.buffer_store(y, held[i] * T.float32(2), [i])
    return builder.get().with_attr(GENERAL, True) if general else builder.get()


@pytest.mark.parametrize(("general", "size"), [(True, 8), (False, 1000)])
def test_buffers_are_cut_down_in_loop_nests_of_the_general_road_only(general: bool, size: int) -> None:
    import tvm
    from graphwright.runtime.codegen import machine_code

    sizes: list[int] = []

    @tvm.instrument.pass_instrument
    class Allocations:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name == "tirx.FlattenBuffer":
                (function,) = module.functions.values()
                sizes.extend(map(int, re.findall(r"alloc_buffer\(\((\d+),", function.script())))

    with tvm.transform.PassContext(opt_level=3, instruments=[Allocations()]):
        built = machine_code(tvm.IRModule({"nest": nest(general)}), Target.named("cpu"))["nest"]
    assert sizes == [size]
    y = tvm.runtime.tensor(np.zeros(8, np.float32))
    built(tvm.runtime.tensor(np.arange(8, dtype=np.float32)), y)
    np.testing.assert_array_equal(y.numpy(), 2 * np.arange(1, 9))


def test_the_general_schedule_marks_what_it_sees() -> None:
    import tvm
    from graphwright.runtime.codegen import GENERAL
    from graphwright.runtime.schedule import default_schedule

    target = Target.named("cpu")
    unscheduled = tvm.IRModule({"nest": nest(False)})
    (function,) = default_schedule(unscheduled, target).functions.values()
    assert GENERAL in function.attrs
    ours = tvm.IRModule({"nest": nest(False).with_attr("tirx.is_scheduled", True)})
    (function,) = default_schedule(ours, target).functions.values()
    assert GENERAL not in function.attrs


def test_a_gpu_keeps_the_pipeline_of_tvm() -> None:
    from graphwright.runtime.codegen import pipeline_of

    assert pipeline_of(Target.named("cuda")) == "default"
    assert pipeline_of(Target.named("arm64")) == pipeline_of(Target.named("cpu")) == "graphwright"
