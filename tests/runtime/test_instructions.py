"""The machine code of compiled models: multiply-adds are fused and work on whole vector registers."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.tvm

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,16,12,12] x) => (float[1,10] y) {
  c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  d = Conv<pads=[1,1,1,1], group=32>(r, u)  p = GlobalAveragePool(d)
  f = Flatten(p)  y = MatMul(f, v)
}"""
SHAPES = {"w": (32, 16, 3, 3), "u": (32, 1, 3, 3), "v": (32, 10)}
# Target -> (fused multiply-adds of whole registers, products of whole registers, fused ones of single numbers)
INSTRUCTIONS = {
    "cpu-avx2": (r"vfn?m(?:add|sub)\d+ps\s.*%ymm", r"vmulps\s.*%ymm", r"vfn?m(?:add|sub)\d+ss\s"),
    "cpu-avx512": (r"vfn?m(?:add|sub)\d+ps\s.*%zmm", r"vmulps\s.*%zmm", r"vfn?m(?:add|sub)\d+ss\s"),
    "arm64": (r"fml[as]\s+v\d+\.4s", r"fmul\s+v\d+\.4s", r"fn?m(?:add|sub)\s+s\d+"),
}


@functools.cache
def assembly(name: str) -> dict[str, str]:
    """Name -> text of every function of the model above for a target, on one thread."""
    from graphwright.runtime import phases
    from graphwright.runtime.importer import import_model

    target = dataclasses.replace(Target.named(name), cores=1)
    model = parser.parse_model(MODEL)
    weights = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    executable, _ = phases.compile_module(import_model(model, target), target)
    text = "\n".join(module.inspect_source("s") for module in executable.mod.imports)
    _, *parts = re.split(r"\.type\s+([^,\s]+),[@%]function", text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_multiply_adds_are_fused_and_of_whole_registers(name: str) -> None:
    """In the dense convolution, the one of channels apart and the product."""
    fused, products, single = INSTRUCTIONS[name]
    kernels = {n: text for n, text in assembly(name).items() if ("conv" in n or "gemm" in n) and re.search(fused, text)}
    assert len(kernels) >= 3, list(assembly(name))
    for kernel, text in kernels.items():
        assert len(re.findall(fused, text)) > 10 * len(re.findall(products, text)), kernel
        assert not re.search(single, text) and "fmaf" not in text, kernel
