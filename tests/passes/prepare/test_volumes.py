"""Convolutions and pools along three axes give the numbers of onnxruntime's own kernels when they are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

HEAD = '<ir_version: 10, opset_import: ["" : 17]> '
OPERATORS = ("Conv", "Conv grouped", "ConvTranspose", "MaxPool", "AveragePool")


def attributes(**given: Any) -> str:
    lists = {name: value if isinstance(value, int) else [int(v) for v in value] for name, value in given.items()}
    return ", ".join(f"{name} = {value}" for name, value in lists.items())


def constant(name: str, array: np.ndarray) -> str:
    sizes = ", ".join(map(str, array.shape))
    return f"float[{sizes}] {name} = {{{', '.join(map(str, array.reshape(-1)))}}}"


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.integers(-8, 9, shape).astype(np.float32) / 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_window(operator: str, seed: int, check) -> None:
    """Strides, dilations, padding, groups and a batch of any; taps that overlap, that do not, and that leave gaps."""
    random = np.random.default_rng([seed, OPERATORS.index(operator)])
    kind, pool = operator.split()[0], "Pool" in operator
    kernel, strides = random.integers(1, 4, 3), random.integers(1, 4, 3)
    dilations = np.ones(3, int) if pool else random.integers(1, 3, 3)
    if seed == 0:
        kernel, dilations = strides.copy(), np.ones(3, int)  # no overlap
    span = dilations * (kernel - 1) + 1
    pads = [0] * 6 if seed == 0 else [int(random.integers(0, (kernel[i % 3] + 1) // 2 + 1 - pool)) for i in range(6)]
    groups = 2 if operator == "Conv grouped" else 1
    channels, outputs = 2 * groups, 3 * groups
    # A window inside of the volume, and a transposed one with something left of it.
    sizes = np.maximum(span, 2) + random.integers(0, 4, 3)
    given: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    constants, inputs = [], "x"
    if pool:
        given |= {"count_include_pad": 1} if kind == "AveragePool" else {}
    else:
        given |= {"dilations": dilations, "group": groups}
        shape = (channels, outputs) if kind == "ConvTranspose" else (outputs, channels // groups)
        constants.append(constant("w", draw(random, *shape, *kernel)))
        inputs += ", w"
        if seed % 2:
            constants.append(constant("b", draw(random, outputs)))
            inputs += ", b"
        if kind == "ConvTranspose" and seed % 3 == 1:
            given["output_padding"] = np.minimum(strides - 1, 1)
    body = f"y = {kind} <{attributes(**given)}> ({inputs})"
    shape = ", ".join(map(str, (channels, *sizes)))
    text = f"{HEAD} g (float[n, {shape}] x) => (float[n, c, d, h, w0] y) <{', '.join(constants)}> {{ {body} }}"
    text = text.replace("<>", "")
    model, reports = check(text, "infer-shapes,decompose,infer-shapes", {"x": draw(random, 3, channels, *sizes)}, 1e-6)
    assert not reports[1].skips, reports[1].skips
    left = [node for node in model.graph if node.op_type == kind]
    assert left and all(len(node.outputs[0].shape) == 4 for node in left)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_name(auto_pad: str, check) -> None:
    random = np.random.default_rng(0)
    weights = constant("w", draw(random, 3, 2, 2, 3, 2))
    body = f'y = Conv <auto_pad = "{auto_pad}", strides = [2, 1, 1]> (x, w)'
    text = f"{HEAD} g (float[1, 2, 5, 6, 7] x) => (float[1, 3, d, h, w0] y) <{weights}> {{ {body} }}"
    _, reports = check(text, "infer-shapes,decompose", {"x": draw(random, 1, 2, 5, 6, 7)}, 1e-6)
    assert not reports[1].skips


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("y = Conv <kernel_shape = [1, 1, 1]> (x, v)", "its weights are computed at run time"),
        ("y = Conv <kernel_shape = [1, 1, 1]> (f, w)", "its channels, depth, height or width are not known; pin them"),
        ("y = MaxPool <kernel_shape = [2, 2, 2], ceil_mode = 1> (x)", "ceil_mode"),
        ("y, i = MaxPool <kernel_shape = [2, 2, 2]> (x)", "its places are read"),
        ("y = AveragePool <kernel_shape = [3, 3, 3], pads = [1, 1, 1, 1, 1, 1]> (x)",
         "its padding in depth does not count"),
    ],
)  # fmt: skip
def test_what_stays_says_why(node: str, reason: str) -> None:
    import onnx
    import onnx_ir as ir
    from graphwright.passes.base import PassContext
    from graphwright.passes.pipeline import Pipeline

    outputs = "float[n, c, d, h, w0] y" + (", int64[n, c, d, h, w0] i" if "i =" in node else "")
    inputs = "float[1, 2, 4, 5, 6] x, float[1, 2, d1, 5, 6] f, float[2, 2, 1, 1, 1] v"
    text = f"{HEAD} g ({inputs}) => ({outputs}) <float[2, 2, 1, 1, 1] w = {{1, 2, 3, 4}}> {{ {node} }}"
    model = ir.from_proto(onnx.parser.parse_model(text))
    _, reports = Pipeline.parse("infer-shapes,decompose").run(model, PassContext(target="cpu"))
    assert [skip.reason for skip in reports[1].skips] == [f"{node.partition('= ')[2].split()[0]}: {reason}"]


def test_pictures_stay_pictures_between_convolutions(check) -> None:
    """Transposes between two convolutions cancel, whatever elementwise operators stand there."""
    random = np.random.default_rng(0)
    weights = ", ".join(constant(name, draw(random, 2, 2, 3, 3, 3)) for name in ("w", "v"))
    body = """a = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, w)  b = Relu (a)
        c = Conv <pads = [1, 1, 1, 1, 1, 1]> (b, v)  d = Add (c, b)  y = Relu (d)"""
    text = f"{HEAD} g (float[n, 2, 4, 5, 6] x) => (float[n, 2, 4, 5, 6] y) <{weights}> {{ {body} }}"
    passes = "infer-shapes,decompose,infer-shapes,fold-constants,simplify,cancel-transposes,dead-code"
    model, _ = check(text, passes, {"x": draw(random, 3, 2, 4, 5, 6)}, 1e-6)
    assert sum(node.op_type == "Transpose" for node in model.graph) == 2
