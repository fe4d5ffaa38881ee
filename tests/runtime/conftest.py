"""Small artifacts, made of ONNX text, and of Relax modules: devices and the linker are tested without the importer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphwright.runtime.artifact import Artifact
from graphwright.runtime.target import Target
from onnx import numpy_helper, parser

DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip


def compiled(module: Any, target: Target) -> Any:
    """A Relax module compiled for a target; GPU kinds get TVM's default schedules."""
    import tvm
    from graphwright.runtime.codegen import machine_code
    from tvm import relax
    from tvm.s_tir import dlight

    if target.is_cpu:
        return machine_code(module, target)
    where = target.tvm()
    rules = (dlight.gpu.Matmul(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    with where:
        steps = [relax.transform.LegalizeOps(), dlight.ApplyDefaultSchedule(*rules)]
        module = tvm.transform.Sequential(steps)(module)
    return tvm.compile(module, where)


@dataclass(frozen=True)
class Dense:
    """c = (x + y) @ w + b and d = softmax(c): two inputs, two parameters, two outputs, one call into libm."""

    module: Any
    weights: dict[str, np.ndarray]
    feeds: dict[str, np.ndarray]
    expected: list[np.ndarray]
    outputs: tuple[str, ...] = ("c", "d")


@pytest.fixture(scope="session")
def dense() -> Dense:
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Module:
        @R.function
        def main(
            x: R.Tensor((5, 16), "float32"),
            y: R.Tensor((5, 16), "float32"),
            p: R.Tuple(R.Tensor((16, 7), "float32"), R.Tensor((7,), "float32")),
        ):
            with R.dataflow():
                c = R.add(R.matmul(R.add(x, y), p[0]), p[1])
                d = R.nn.softmax(c)
                R.output(c, d)
            return (c, d)

    random = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    weights = {"w": draw(16, 7), "b": draw(7)}
    feeds = {"x": draw(5, 16), "y": draw(5, 16)}
    wide = {name: array.astype(np.float64) for name, array in (weights | feeds).items()}
    c = (wide["x"] + wide["y"]) @ wide["w"] + wide["b"]
    e = np.exp(c - c.max(-1, keepdims=True))
    return Dense(Module, weights, feeds, [c, e / e.sum(-1, keepdims=True)])


@dataclass(frozen=True)
class Transposes:
    """Every input and parameter comes back transposed: each element type, an empty tensor, a scalar."""

    module: Any
    weights: dict[str, np.ndarray]
    feeds: dict[str, np.ndarray]
    expected: list[np.ndarray]
    outputs: tuple[str, ...]


@pytest.fixture(scope="session")
def transposes() -> Transposes:
    from tvm import relax

    random = np.random.default_rng(11)

    def draw(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return random.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)

    shapes: dict[str, tuple[str, tuple[int, ...]]] = {name: (name, (3, 5)) for name in DTYPES}
    shapes |= {"empty": ("float32", (0, 4)), "scalar": ("int64", ())}
    feeds = {name: draw(dtype, shape) for name, (dtype, shape) in shapes.items()}
    weights = {f"weight_{name}": draw(dtype, shape) for name, (dtype, shape) in shapes.items()}
    builder = relax.BlockBuilder()
    inputs = [
        relax.Var(name, relax.TensorType(array.shape, array.dtype.name)) for name, array in feeds.items()
    ]
    types = [relax.TensorType(array.shape, array.dtype.name) for array in weights.values()]
    constants = relax.Var("weights", relax.TupleType(types))
    with builder.function("main", [*inputs, constants]):
        with builder.dataflow():
            results = [builder.emit(relax.op.permute_dims(value)) for value in inputs]
            for index in range(len(types)):
                item = builder.emit(relax.TupleGetItem(constants, index))
                results.append(builder.emit(relax.op.permute_dims(item)))
            whole = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(whole)
    arrays = [*feeds.values(), *weights.values()]
    names = tuple(f"out{index}" for index in range(len(arrays)))
    return Transposes(builder.get(), weights, feeds, [array.T for array in arrays], names)


@pytest.fixture(scope="session")
def make_artifact() -> Callable[[Any, str, Path], Any]:
    """Write a `Dense` or `Transposes` as an artifact for the named target into a new folder."""
    from graphwright.runtime import link
    from graphwright.runtime.artifact import (
        WEIGHTS,
        Artifact,
        Manifest,
        Parameter,
        RegionSpec,
        TensorSpec,
        WeightStore,
        file_specs,
        write_manifest,
    )  # fmt: skip

    def specs(arrays: Mapping[str, np.ndarray]) -> list[TensorSpec]:
        onnx = {"float32": "float", "float64": "double"}
        return [
            TensorSpec(name=name, dtype=onnx.get(array.dtype.name, array.dtype.name), shape=list(array.shape))
            for name, array in arrays.items()
        ]

    def stored(weights: Mapping[str, np.ndarray], folder: Path) -> list[Parameter]:
        (folder / WEIGHTS).touch()
        store = WeightStore(folder / WEIGHTS)
        return [
            Parameter(
                name=name, dtype=array.dtype.name, shape=list(array.shape),
                offset=store.add([array.tobytes()], array.nbytes), nbytes=array.nbytes,
            )
            for name, array in weights.items()
        ]  # fmt: skip

    def make(model: Any, name: str, folder: Path) -> Artifact:
        folder.mkdir(parents=True)
        target = Target.named(name)
        files = link.export(compiled(model.module, target), target, folder)
        library = files[0].rename(folder / "region0.so")
        region = RegionSpec(
            runtime="tvm", file=library.name, inputs=list(model.feeds), outputs=list(model.outputs), nodes=1,
            parameters=stored(model.weights, folder),
        )  # fmt: skip
        (folder / "model.onnx").touch()
        outputs = dict(zip(model.outputs, _narrow(model.expected, model.feeds), strict=True))
        manifest = Manifest(
            versions={}, target=target.to_json(), source="", pipeline="", reports=[],
            inputs=specs(model.feeds), outputs=specs(outputs), regions=[region], files=file_specs(folder),
        )  # fmt: skip
        write_manifest(manifest, folder)
        return Artifact.load(folder)

    return make


def _narrow(expected: Sequence[np.ndarray], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The reference results, which may be computed in double precision, as a float32 model gives them."""
    wide = all(array.dtype == np.float32 for array in feeds.values())
    return [array.astype(np.float32) if wide else array for array in expected]


HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


@dataclass(frozen=True)
class Built:
    """A model file and the artifact made of it."""

    model: Path
    artifact: Artifact

    @property
    def runtimes(self) -> list[tuple[str, int]]:
        """Runtime and number of nodes of each region."""
        return [(region.runtime, region.nodes) for region in self.artifact.manifest.regions]


@pytest.fixture(scope="session")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """`optimized(TEXT or ModelProto, w=array, ...)`: optimized for this machine, each model once a test run.

    Arrays are initializers; `options` are those of `optimize`.
    """
    from graphwright.runtime.driver import optimize

    done: dict[bytes, Built] = {}

    def make(model: Any, options: dict[str, Any] | None = None, **weights: np.ndarray) -> Built:
        proto = onnx.ModelProto()
        proto.CopyFrom(parser.parse_model(f"{HEADER}\n{model}") if isinstance(model, str) else model)
        proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
        key = proto.SerializeToString(deterministic=True) + repr(options).encode()
        if key not in done:
            folder = tmp_path_factory.mktemp("optimized")
            path = folder / "model.onnx"
            path.write_bytes(proto.SerializeToString())
            result = optimize(path, out=folder / "artifact", **{"target": "cpu", **(options or {})})
            done[key] = Built(path, Artifact.load(result.path))
        return done[key]

    return make


@pytest.fixture(scope="session")
def runnable() -> Callable[[str], Target]:
    """The target of a name; skips the test where this processor cannot run its code."""

    def named(name: str) -> Target:
        target = Target.named(name)
        if not target.runs_here:
            pytest.skip(f"this processor cannot run {name}")
        return target

    return named


@dataclass(frozen=True)
class Compiled:
    """A model compiled through every phase, without a partition. lowered: the module before code generation."""

    proto: onnx.ModelProto
    lowered: Any
    constants: list[Any]
    machine: Any
    executable: Any

    def run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import tvm

        inputs = [tvm.runtime.tensor(np.asarray(feeds[i.name], order="C")) for i in self.proto.graph.input]
        result = self.machine["main"](*inputs, tuple(self.constants))
        return [tensor.numpy() for tensor in (result if not hasattr(result, "numpy") else [result])]

    def kernels(self, word: str = "") -> list[str]:
        """Names of the lowered module's kernels that contain a word."""
        from tvm import tirx

        functions = self.lowered.functions_items()
        return sorted(g.name_hint for g, f in functions if isinstance(f, tirx.PrimFunc) and word in g.name_hint)

    def check(self, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
        """Every output is onnxruntime's, its optimizations off: floats up to `tolerance` of the output's scale."""
        import onnx_ir as ir
        from graphwright.runtime.reference import Reference

        expected = Reference(ir.from_proto(self.proto), threads=1).run(feeds)
        for (name, wanted), got in zip(expected.items(), self.run(feeds), strict=True):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype, name
            if wanted.dtype.kind != "f":
                np.testing.assert_array_equal(got, wanted, name)
                continue
            scale = max([1.0, *np.abs(wanted[np.isfinite(wanted)]).reshape(-1)])
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, equal_nan=True, err_msg=name)


@pytest.fixture(scope="session")
def compile_model() -> Callable[..., Compiled]:
    """`compile_model(TEXT or ModelProto, target name, w=array, ...)` through the Relax pipeline; arrays are
    initializers."""

    def make(model: Any, target: str = "cpu", **weights: np.ndarray) -> Compiled:
        import tvm
        from graphwright.runtime import importer, phases
        from tvm import relax

        proto = onnx.ModelProto()
        proto.CopyFrom(parser.parse_model(f"{HEADER}\n{model}") if isinstance(model, str) else model)
        proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
        where, seen = Target.named(target), []
        executable, constants = phases.compile_module(importer.import_model(proto, where), where, seen.append)
        return Compiled(proto, seen[0], constants, relax.VirtualMachine(executable, tvm.cpu()), executable)

    return make
