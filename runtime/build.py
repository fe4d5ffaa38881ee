"""A prepared ONNX model -> an artifact: partition, compile each region in the child, fall back where TVM cannot."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..passes import io, wire
from ..passes.base import PassReport
from ..passes.errors import CompileError, ModelError
from ..passes.graph import Names, site
from .artifact import (
    MODEL,
    WEIGHTS,
    Artifact,
    KernelWork,
    Manifest,
    Parameter,
    RegionSpec,
    TensorSpec,
    WeightStore,
    Workplace,
    file_hash,
    file_specs,
    read_range,
    write_manifest,
)
from .partition import ONNXRUNTIME, TVM, Region, cut, partition
from .pool import place_pool
from .reference import NoKernel, ort_session, with_own_bytes
from .spared import spared
from .state import mark_state
from .target import Target
from .work import Work, work_of
from .worker import Compiled, Compiler

log = logging.getLogger("graphwright")

PACKAGES = ("graphwright", "apache-tvm", "onnx", "onnx-ir", "onnxruntime", "numpy")
LIFT = 64  # bytes; smaller constants stay in the library


# --- the parent -------------------------------------------------------------------------------------------------


def build(
    model: ir.Model,
    target: Target,
    out: str | os.PathLike[str],
    *,
    source: str = "",
    pipeline: str = "",
    reports: Sequence[PassReport] = (),
    overwrite: bool = False,
    distrust: Callable[[ir.Node], str] = lambda node: "",
    check: Callable[[Artifact], dict[str, Any] | None] = lambda artifact: None,
    tuning: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Artifact:
    """Compile `model` (left untouched) for `target` into the folder `out`.

    Raises CompileError, naming the nodes, when a target other than a CPU cannot take all of them; OutputError when
    `out` cannot be written. On CPU targets such nodes run on onnxruntime inside the artifact; CompileError when it has
    no kernel for one.
    distrust: why a node is not to be compiled by TVM, "" where it may be; onnxruntime runs it inside the artifact.
    check: sees the finished artifact before it takes its place; what it returns is recorded as the verdict, and what
    it raises leaves nothing behind.
    tuning: what was found, for the manifest; the tiles are the target's.
    """
    model = model.clone()
    defaults = [value for value in model.graph.inputs if value.is_initializer()]
    names = [value.name for value in defaults]
    fix_outputs(model)
    ask_types(model)
    state = mark_state(model)
    with Workplace(Path(out), overwrite) as folder:
        store = WeightStore(folder / WEIGHTS)
        regions = _compile_regions(model, target, folder, store, progress, distrust)
        inputs = [tensor_spec(value) for value in model.graph.inputs]
        # Compiled code has the default values in it; a run that gives others is for onnxruntime and this file.
        model.graph.inputs.extend(
            value for value, name in zip(defaults, names, strict=True)
            if value.name == name and model.graph.initializers.get(name or "") is value
        )  # fmt: skip
        _write_model(model, folder, store)
        threaded = target.is_cpu and any(region.runtime == TVM for region in regions)
        pool = place_pool(target, folder) if threaded else ""
        manifest = Manifest(
            versions={name: metadata.version(name) for name in PACKAGES},
            target=target.to_json(),
            source=source,
            pipeline=pipeline,
            reports=[report.to_json() for report in reports],
            inputs=inputs,
            outputs=[tensor_spec(value) for value in model.graph.outputs],
            regions=regions,
            files=file_specs(folder),
            tuning=tuning,
            state=state,
            pool=pool,
        )
        manifest = write_manifest(manifest, folder)
        verdict = check(Artifact(manifest, folder))
        manifest = write_manifest(manifest.model_copy(update={"verdict": verdict}), folder)
    return Artifact.load(out, verify=False)


def fix_outputs(model: ir.Model) -> None:
    """Make every initializer a constant, every output that is one the result of a node, and leave out unused nodes.

    An output that is an input needs no node: `Session` hands it over. One that is named twice is made once.
    """
    from onnx_ir.passes import common

    common.RemoveInitializersFromInputsPass()(model)
    common.RemoveUnusedNodesPass()(model)  # a region of such nodes would have no outputs
    names = Names(model)
    graph = model.graph
    made: dict[ir.Value, ir.Value] = {}
    for index, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue
        if value not in made:
            name = value.name or ""
            value.name = names.fresh(f"{name}_constant")
            made[value] = ir.Value(name=name, type=value.type, shape=value.shape)
            graph.append(ir.Node("", "Identity", [value], outputs=[made[value]]))
        graph.outputs[index] = made[value]


def ask_types(model: ir.Model) -> None:
    """Types that ONNX's inference does not know, behind operators of other domains, as onnxruntime infers them."""
    unknown = [v for node in model.graph for v in node.outputs if v.name and v.type is None and v.uses()]
    if not unknown:
        return
    copy = model.clone()
    found = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.extend(found[v.name] for v in unknown)
    try:
        session = ort_session(copy)
    except ModelError as error:
        log.debug("types stay unknown: %s", error)
        return
    types = {o.name: o for o in session.get_outputs()}
    for value in unknown:
        kind, shape = types[value.name or ""].type, types[value.name or ""].shape
        name = kind.removeprefix("tensor(").removesuffix(")").upper()
        if name in ir.DataType.__members__:
            value.type = ir.TensorType(ir.DataType[name])
            if shape:  # [] is what onnxruntime says of a scalar and of an unknown rank alike
                value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in shape])


def _compile_regions(
    model: ir.Model, target: Target, folder: Path, store: WeightStore, progress: Callable[[str], None],
    distrust: Callable[[ir.Node], str],
) -> list[RegionSpec]:
    with tempfile.TemporaryDirectory(prefix="graphwright-") as name:
        work = Path(name)
        spare = _spared(model, target)
        refused = spare | {n: reason for n in model.graph if (reason := distrust(n) or _unknown_type(n))}
        while True:
            if refused and not target.is_cpu:
                raise CompileError(_cannot(target, refused))
            regions = partition(model, refused)
            models = cut(model, [region.nodes for region in regions])
            try:
                reason = _unloadable(regions, models)
            except NoKernel as error:
                if all(refused.get(node) != reason for node, reason in spare.items()):
                    raise CompileError(f"{error}, and TVM cannot take all of it: {_first(refused)}") from error
                refused = {node: reason for node, reason in refused.items() if spare.get(node) != reason}
                continue
            if reason and len(regions) > 1:
                refused.update({node: reason for node in model.graph if node not in refused})
                continue
            compiled = _compile_all(regions, models, target, work, progress, refused)
            if compiled is not None:
                break
        return [
            _place(index, region, part, result, folder, store)
            for index, (region, part, result) in enumerate(zip(regions, models, compiled, strict=True))
        ]


def _unloadable(regions: Sequence[Region], models: Sequence[ir.Model]) -> str | None:
    """Why onnxruntime cannot load one of its regions alone: some of its operators need shapes that only the whole
    model gives them. None when it can load all. Raises NoKernel when it has no kernel for one of them.
    """
    for region, part in zip(regions, models, strict=True):
        if region.runtime == ONNXRUNTIME and part.graph.outputs:
            try:
                ort_session(part, threads=1)
            except NoKernel:
                raise
            except ModelError as error:
                return f"onnxruntime takes the model only as a whole: {error}"
    return None


def _cannot(target: Target, refused: dict[ir.Node, str]) -> str:
    return f"target {target.name} cannot take {len(refused)} of the nodes: {_first(refused)}; see `doctor`"


def _first(refused: dict[ir.Node, str]) -> str:
    first = [f"{site(node)} ({node.op_type}): {reason}" for node, reason in list(refused.items())[:3]]
    return "; ".join(first) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")


def find_refused(model: ir.Model, target: Target, work: Path) -> dict[ir.Node, str]:
    """Nodes of the main graph that TVM cannot or need not take, by a look at each; nothing is compiled.

    work: an existing folder for files on the way.
    """
    refused = _spared(model, target)
    refused.update({node: reason for node in model.graph if (reason := _unknown_type(node))})
    regions = partition(model, refused)
    for index, (region, part) in enumerate(zip(regions, cut(model, [r.nodes for r in regions]), strict=True)):
        if region.runtime != TVM:
            continue
        path = work / f"look{index}.onnx"
        io.save(part, path, overwrite=True)
        refused.update(_refused_of(region.nodes, path, target))
    return refused


def _spared(model: ir.Model, target: Target) -> dict[ir.Node, str]:
    """Nodes that TVM can take and that onnxruntime, where it is at hand, runs faster."""
    return spared(model, max(4, target.isa.lanes())) if target.beside_onnxruntime else {}


def _refused_of(nodes: Sequence[ir.Node], path: Path, target: Target) -> dict[ir.Node, str]:
    found = Compiler.shared().refusals(path, target.to_json())
    return {nodes[index]: reason for index, reason in found.items()}


def _unknown_type(node: ir.Node) -> str | None:
    for value in (*node.inputs, *node.outputs):
        if value is None or not value.name:
            continue
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return f"{value.name!r} is a {type(value.type).__name__.removesuffix('Type').lower()}, not a tensor"
        if value.dtype is None:
            return f"the element type of {value.name!r} is not known after shape inference"
        if value.dtype == ir.DataType.STRING:
            return f"{value.name!r} holds strings"
    return None


def _compile_all(
    regions: Sequence[Region],
    models: Sequence[ir.Model],
    target: Target,
    work: Path,
    progress: Callable[[str], None],
    refused: dict[ir.Node, str],
) -> list[Compiled | None] | None:
    """One result a region. None: a region failed, and what is to blame was added to `refused`."""
    results: list[Compiled | None] = []
    for index, (region, part) in enumerate(zip(regions, models, strict=True)):
        if region.runtime == ONNXRUNTIME:
            results.append(None)
            continue
        progress(f"compile {len(region.nodes)} nodes for {target.name}")
        path, folder = work / f"in{index}.onnx", work / f"out{index}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        io.save(part, path, overwrite=True)
        try:
            results.append(Compiler.shared().compile(path, target.to_json(), folder))
        except CompileError as error:
            log.debug("region %d: %s", index, error)
            try:
                blamed = _refused_of(region.nodes, path, target)
            except CompileError as second:  # the look itself failed, or crashed
                log.debug("region %d: no look at its nodes: %s", index, second)
                blamed = {}
            blamed = blamed or _culprits(region.nodes, part, target, work, error)
            if not blamed and not target.is_cpu:
                raise
            refused.update(blamed or dict.fromkeys(region.nodes, str(error)))
            return None
        finally:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".data").unlink(missing_ok=True)
    return results


def _culprits(
    region: Sequence[ir.Node], part: ir.Model, target: Target, work: Path, error: CompileError
) -> dict[ir.Node, str]:
    """Which nodes of a region that failed do not compile alone; none when each does."""
    if len(region) == 1:
        return {region[0]: str(error)}
    log.info("looking for the nodes that do not compile: %s", error)
    probed: dict[tuple[Any, ...], str | None] = {}
    found: dict[ir.Node, str] = {}
    nodes = list(part.graph)
    for original, single in zip(region, cut(part, [[node] for node in nodes]), strict=True):
        key = _filling(original)
        if key not in probed:
            path, folder = work / "probe.onnx", work / "probe"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            io.save(single, path, overwrite=True)
            probed[key] = Compiler.shared().probe(path, target.to_json(), folder)
        reason = probed[key]
        if reason is not None:
            found[original] = reason
    return found


def _filling(node: ir.Node) -> tuple[Any, ...]:
    """What decides whether a node compiles: operator, attributes, types and shapes, and small constants."""
    inputs = tuple(
        None if v is None else (str(v.dtype), str(v.shape), v.const_value is not None and _small(v.const_value))
        for v in node.inputs
    )
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return node.domain, node.op_type, attributes, inputs


def _small(tensor: ir.TensorProtocol) -> bytes | bool:
    return tensor.tobytes() if tensor.nbytes <= 1024 and tensor.dtype != ir.DataType.STRING else True


def _place(
    index: int, region: Region, part: ir.Model, result: Compiled | None, folder: Path, store: WeightStore
) -> RegionSpec:
    inputs = [value.name or "" for value in part.graph.inputs]
    outputs = [value.name or "" for value in part.graph.outputs]
    if result is None:
        name = f"region{index}.onnx"
        _write_model(part, folder, store, name)
        return RegionSpec(
            runtime=ONNXRUNTIME, file=name, inputs=inputs, outputs=outputs, nodes=len(region.nodes),
            reasons=dict(region.reasons),
        )
    library = Path(result.library)
    # The hash makes the name new whenever the code is: a process keeps one library a path.
    name = f"region{index}-{file_hash(library)[:12]}{library.suffix}"
    shutil.move(library, folder / name)
    sources = []
    for source in map(Path, result.sources):
        sources.append(f"region{index}-{source.name}")
        shutil.move(source, folder / sources[-1])
    parameters = []
    weights = Path(result.weights)
    for parameter, dtype, shape, offset, nbytes in result.parameters:
        position = store.add(read_range(weights, offset, nbytes), nbytes)
        parameters.append(Parameter(name=parameter, dtype=dtype, shape=list(shape), offset=position, nbytes=nbytes))
    weights.unlink(missing_ok=True)
    return RegionSpec(
        runtime=TVM, file=name, inputs=inputs, outputs=outputs, nodes=len(region.nodes), parameters=parameters,
        sources=sources, activation_bytes=result.work.activation_bytes,
        kernels={kernel: KernelWork(**work) for kernel, work in result.work.kernels.items()},
        in_place={outputs[made]: inputs[where] for made, where in result.in_place.items()},
    )  # fmt: skip


def _write_model(model: ir.Model, folder: Path, store: WeightStore, name: str = MODEL) -> None:
    """Save a model, so that onnxruntime can multiply its bytes exactly, whose large weights are references into the
    artifact's weights file.
    """
    model = with_own_bytes(model)
    large = {
        value.name or "": value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes >= wire.LARGE
        and value.const_value.dtype != ir.DataType.STRING
    }
    proto = io._proto_without(model, large)
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            weight = large[tensor.name]
            offset = store.add(io.tensor_chunks(weight), weight.nbytes)
            io._refer(tensor, WEIGHTS, offset, weight.nbytes)
    (folder / name).write_bytes(proto.SerializeToString())


def tensor_spec(value: ir.Value) -> TensorSpec:
    """How the manifest describes an input or output."""
    shape = None
    if value.shape is not None:
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    kind = value.dtype.name.lower() if value.dtype is not None else "undefined"
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        kind = _onnx_type(value.type)
    if (declared := io.set_aside_type(value)) is not None:
        kind = _type_text(declared)
    return TensorSpec(name=value.name or "", dtype=kind, shape=shape)


def _type_text(kind: onnx.TypeProto) -> str:
    """A type with a map in it as onnxruntime spells it: seq(map(int64,tensor(float)))."""
    if kind.HasField("sequence_type"):
        return f"seq({_type_text(kind.sequence_type.elem_type)})"
    if kind.HasField("map_type"):
        key = ir.DataType(kind.map_type.key_type).name.lower()
        return f"map({key},{_type_text(kind.map_type.value_type)})"
    return f"tensor({ir.DataType(kind.tensor_type.elem_type).name.lower()})"


def _onnx_type(kind: ir.TypeProtocol) -> str:
    """A type as onnxruntime spells it: seq(tensor(float))."""
    if isinstance(kind, ir.SequenceType):
        return f"seq({_onnx_type(kind.elem_type)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_onnx_type(kind.elem_type)})"
    word = "sparse_tensor" if isinstance(kind, ir.SparseTensorType) else "tensor"
    return f"{word}({kind.dtype.name.lower()})"


# --- the child --------------------------------------------------------------------------------------------------


def compile_region(path: Path, target: Target, folder: Path) -> Compiled:
    """Import the ONNX file and compile it into `folder`. Runs in the child; raises whatever TVM raises."""
    from . import importer, phases
    from .link import export

    module = importer.import_model(onnx.load(path), target)
    in_place = importer.overwritten(module)
    seen: list[Work] = []
    executable, constants = phases.compile_module(module, target, lambda lowered: seen.append(work_of(lowered)))
    files = export(executable, target, folder)
    weights = folder / WEIGHTS
    parameters: list[tuple[str, str, tuple[int, ...], int, int]] = []
    with open(weights, "wb") as file:
        for index, tensor in enumerate(constants):
            array = np.ascontiguousarray(tensor.numpy())
            file.seek(-file.tell() % 64, os.SEEK_CUR)
            dtype = str(tensor.dtype)
            parameters.append((f"p{index}", dtype, tuple(map(int, tensor.shape)), file.tell(), array.nbytes))
            file.write(array.tobytes())
    return Compiled(str(files[0]), str(weights), parameters, [str(f) for f in files[1:]], seen[0], in_place)

