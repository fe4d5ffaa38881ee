"""The cases of the ONNX wheel's backend suite: a model, feeds and expected outputs each."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    from onnx.backend.test.case.test_case import TestCase

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


@dataclass(frozen=True)
class Case:
    """data: pairs of inputs and expected outputs, in the order of the graph's inputs (initializers excluded)."""

    name: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float

    def feeds(self, inputs: list[Any]) -> dict[str, Any]:
        """Input name -> value."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        names = [info.name for info in self.model.graph.input]
        return {
            name: np.asarray(value) if isinstance(value, np.generic) else value
            for name, value in zip(names, inputs, strict=False)
            if not (name in weights and value is None)
        }

    def difference(self, expected: list[Any], actual: list[Any]) -> str:
        """What the suite's own comparison finds wrong, in one line; empty when nothing."""
        from onnx.backend.test.runner import Runner

        try:
            Runner.assert_similar_outputs(expected, actual, rtol=self.rtol, atol=self.atol)
        except (AssertionError, TypeError, AttributeError, ValueError) as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        return ""


def names(kind: str) -> list[str]:
    """Names of the cases of one kind, or of all, like "node/test_add"."""
    kinds = KINDS if kind == "all" else (kind,)
    return [f"{k}/{name}" for k in kinds for name in _cases(k)]


def load(name: str) -> Case:
    """One case with its data."""
    kind, _, short = name.partition("/")
    if kind == "light":
        return _light(name, _cases(kind)[short])
    case: TestCase = _cases(kind)[short]
    if case.model is not None:
        pairs = [(_arrays(i), _arrays(o)) for i, o in case.data_sets or []]
        return Case(name, case.model, pairs, case.rtol, case.atol)
    import onnx

    folder = Path(case.model_dir or "")
    model = onnx.load(folder / "model.onnx")
    pairs = [
        (list(_read(data, "input", model.graph.input)), list(_read(data, "output", model.graph.output)))
        for data in sorted(folder.glob("test_data_set*"))
    ]
    return Case(name, model, pairs, case.rtol, case.atol)


@functools.cache
def _cases(kind: str) -> dict[str, Any]:
    import warnings

    from onnx.backend.test import loader

    if kind == "light":
        return {path.stem: path for path in sorted(Path(loader.DATA_DIR, "light").glob("light_*.onnx"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = loader.load_model_tests(kind=kind)
    return {case.name: case for case in found if case.model is not None or case.model_dir is not None}


def _light(name: str, path: Path) -> Case:
    """Networks with weights of one value: the input is a ramp, the expected output is stored."""
    import onnx

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for info in model.graph.input:
        if info.name not in weights:
            shape = [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]
            count = int(np.prod(shape))
            inputs.append((np.arange(count).reshape(shape) / count).astype(np.float32))
    expected = [
        onnx.numpy_helper.to_array(onnx.load_tensor(path.with_name(f"{path.stem}_output_{i}.pb")))
        for i in range(len(model.graph.output))
    ]
    return Case(name, model, [(inputs, expected)], 1e-3, 1e-7)


def _arrays(values: Any) -> list[Any]:
    import onnx

    return [onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]


def _read(folder: Path, stem: str, infos: Any) -> Iterator[Any]:
    import onnx

    for index, info in enumerate(infos):
        path = folder / f"{stem}_{index}.pb"
        if not path.exists():
            return
        content = path.read_bytes()
        if info.type.HasField("sequence_type"):
            yield onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(content))
        elif info.type.HasField("optional_type"):
            yield onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
        else:
            yield onnx.numpy_helper.to_array(onnx.TensorProto.FromString(content))


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
