"""Every file tests/cases/<pass>/*.onnxtxt: ONNX text before, ONNX text after.

    # A sentence: what this case shows.
    # passes: simplify                     the pipeline
    # pin: X=1x3x8                         optional, as --pin
    # target: cpu                          optional
    # another function                     optional: the passes change it, so only shapes and types are compared
    <ONNX text>
    ---
    <ONNX text>                            from here on rewritten by pytest --update-snapshots: review the diff
    # skip: fold: the reason               one a line, in order: the skips that the passes report; none else

Checked: the text, onnx's checker, every expected skip, and numbers: both halves run on onnxruntime with its own
optimizations off, on two shapes for models with free dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphwright.passes.base import PassContext
from graphwright.passes.pipeline import Pipeline

ROOT = Path(__file__).parent / "cases"
SEPARATOR = "\n---\n"


@dataclass(frozen=True)
class Case:
    intent: str
    passes: str
    before: str
    after: str
    skips: tuple[str, ...]
    pins: dict[str, tuple[int, ...]]
    target: str | None
    another: bool


def split(text: str) -> tuple[list[str], str]:
    """The comments and the rest of one half of a case."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    return comments, "\n".join(line for line in lines if not line.startswith("#"))


def read_case(path: Path) -> Case:
    upper, _, lower = path.read_text().partition(SEPARATOR)
    comments, before = split(upper)
    notes, after = split(lower)
    settings: dict[str, list[str]] = {"passes": [], "pin": [], "target": []}
    intent = []
    another = "another function" in comments
    for comment in comments:
        key, _, value = comment.partition(": ")
        if comment == "another function":
            continue
        if key in settings:
            settings[key].append(value)
        else:
            intent.append(comment)
    pins = [pin.partition("=") for pin in settings["pin"]]
    assert intent and len(settings["passes"]) == 1, f"{path}: needs a sentence of intent and '# passes: ...'"
    return Case(
        intent=" ".join(intent),
        passes=settings["passes"][0],
        before=before,
        after=after,
        skips=tuple(note.removeprefix("skip: ") for note in notes),
        pins={name: tuple(map(int, shape.split("x"))) for name, _, shape in pins},
        target=settings["target"][0] if settings["target"] else None,
        another=another,
    )


def to_text(model: ir.Model) -> str:
    return split(onnx.printer.to_text(ir.to_proto(model)))[1]


def rewrite(path: Path, after: str, skips: list[str]) -> None:
    """Replace the lower half of a case."""
    upper = path.read_text().partition(SEPARATOR)[0]
    path.write_text(upper + SEPARATOR + after + "\n" + "".join(f"# skip: {skip}\n" for skip in skips))


def feeds_for(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    """Random inputs. Free dimensions take another size for another seed; equal symbols the same one."""
    random = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None and value.dtype is not None and value.name is not None
        dims = [
            dim if isinstance(dim, int) else sizes.setdefault(str(dim), 2 + seed + len(sizes)) for dim in value.shape
        ]
        dtype = value.dtype.numpy()
        if dtype.kind == "b":
            feeds[value.name] = random.integers(0, 2, dims).astype(bool)
        elif dtype.kind in "iu":
            feeds[value.name] = random.integers(0, 3, dims).astype(dtype)
        else:
            feeds[value.name] = random.standard_normal(dims).astype(dtype)
    return feeds


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, feeds)


CASES = sorted(ROOT.glob("*/*.onnxtxt"))


@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}/{path.stem}" for path in CASES])
def test_case(path: Path, request: pytest.FixtureRequest) -> None:
    case = read_case(path)
    pipeline = Pipeline.parse(case.passes)
    before = ir.from_proto(onnx.parser.parse_model(case.before))
    original = to_text(before)
    after, reports = pipeline.run(before, PassContext(pins=case.pins, target=case.target))
    assert to_text(before) == original, "the pipeline changed the model it was given"

    text = to_text(after)
    skips = [f"{skip.rule}: {skip.reason}" for report in reports for skip in report.skips]
    if request.config.getoption("--update-snapshots"):
        rewrite(path, text, skips)
        case = read_case(path)
    assert text == case.after
    assert len(skips) == len(case.skips), skips
    for expected, found in zip(case.skips, skips, strict=True):
        assert expected in found
    onnx.checker.check_model(ir.to_proto(after), full_check=True)

    limit = pipeline.contract.limit
    assert (limit is None) == case.another, "only a learned pass gives another function"
    if limit is not None and any(value.dtype == ir.DataType.FLOAT16 for value in before.graph.inputs):
        limit = max(limit, 2 * float(np.finfo(np.float16).eps))  # the original rounds what it is made of
    for seed in (0, 1):
        feeds = feeds_for(after if case.pins else before, seed)
        for expected_array, got in zip(run(before, feeds), run(after, feeds), strict=True):
            assert got.dtype == expected_array.dtype and got.shape == expected_array.shape
            if case.another:
                assert np.isfinite(got).all()
            elif got.dtype.kind == "f":
                assert limit is not None
                scale = float(np.abs(expected_array[np.isfinite(expected_array)]).max(initial=1.0))
                np.testing.assert_allclose(got, expected_array, rtol=0, atol=limit * scale)
            else:
                np.testing.assert_array_equal(got, expected_array)


def test_cases_are_found() -> None:
    """A collector that finds nothing passes silently; this one must not."""
    assert len(CASES) >= 30
