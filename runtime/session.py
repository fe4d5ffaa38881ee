"""Running an artifact: a drop-in for `onnxruntime.InferenceSession`."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..passes.errors import InputError, TargetError, did_you_mean, first_line
from .artifact import MODEL, TVM, Artifact, RegionSpec, TensorSpec
from .ort import OrtStep, default_threads
from .state import State
from .target import host_flags
from .tvm_step import Refused, TvmStep, aligned, load_tvm, numpy_type

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class NodeArg:
    """An input or output of a model, as onnxruntime describes it: `type` is like "tensor(float)"."""

    name: str
    type: str
    shape: list[int | str | None]


@dataclass(frozen=True)
class ModelMeta:
    """What a model says of itself, as onnxruntime's `ModelMetadata` does."""

    producer_name: str
    graph_name: str
    domain: str
    description: str
    graph_description: str
    version: int
    custom_metadata_map: dict[str, str]


@dataclass(frozen=True)
class SessionOptions:
    """The settings of onnxruntime's `SessionOptions` that a session has: a run uses so many threads."""

    intra_op_num_threads: int
    inter_op_num_threads: int = 1


def node_arg(spec: TensorSpec) -> NodeArg:
    kind = spec.dtype if "(" in spec.dtype else f"tensor({spec.dtype})"
    return NodeArg(spec.name, kind, list(spec.shape or []))


class Step(Protocol):
    """One region, ready to run: values by name in, values by name out. Arrays of `state` may be written in place."""

    def __call__(self, values: Mapping[str, Any], state: State | None = None) -> dict[str, Any]: ...


log = logging.getLogger("graphwright")


class Session:
    """An artifact, loaded. `run` and what begins with `get_` are those of onnxruntime; there is no `io_binding`.

    A symbol in the shapes of inputs is one size in a run: where two inputs share it, arrays of different sizes are an
    InputError.

    Inputs with a default value are compiled in and may be left out. A run that gives one is done by onnxruntime on the
    artifact's model: right, but not by the compiled code. So is a run with sizes that the model takes and the compiled
    code does not, such as a dynamic dimension of 1 that is to be broadcast.

    threads: how many a run uses, onnxruntime's regions included; None for all processors this process may use.
    rescue: False has such sizes refused with an InputError.
    Raises ArtifactError when the folder is damaged or altered, TargetError when this machine cannot run it.
    """

    _rescue = False

    def __init__(
        self,
        artifact: str | os.PathLike[str] | Artifact,
        *,
        threads: int | None = None,
        verify: bool = True,
        rescue: bool = True,
    ) -> None:
        if not isinstance(artifact, Artifact):
            artifact = Artifact.load(artifact, verify=verify)
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}; expected at least 1")
        self.artifact = artifact
        self.threads = threads or default_threads()
        self._inputs = {spec.name: spec for spec in artifact.manifest.inputs}
        self._outputs = [spec.name for spec in artifact.manifest.outputs]
        self._passing = [name for name in self._outputs if name not in artifact.manifest.state.values()]
        self._steps = _steps(artifact, self.threads)
        self._rescue = rescue and artifact.target.beside_onnxruntime
        self.left_to_onnxruntime = ""  # why it did the last run that the compiled code did not

    def get_inputs(self) -> list[NodeArg]:
        return [node_arg(spec) for spec in self.artifact.manifest.inputs]

    def get_outputs(self) -> list[NodeArg]:
        return [node_arg(spec) for spec in self.artifact.manifest.outputs]

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Inputs that have a default value."""
        return [node_arg(spec) for spec in self._optional.values()]

    def get_modelmeta(self) -> ModelMeta:
        """What the model that was compiled says of itself."""
        model = self._model
        return ModelMeta(
            producer_name=model.producer_name or "",
            graph_name=model.graph.name or "",
            domain=model.domain or "",
            description=model.doc_string or "",
            graph_description=model.graph.doc_string or "",
            version=model.model_version or 0,
            custom_metadata_map=dict(model.metadata_props),
        )

    def get_session_options(self) -> SessionOptions:
        return SessionOptions(intra_op_num_threads=self.threads)

    @functools.cached_property
    def _model(self) -> ir.Model:
        from ..passes import io

        return io.load(self.artifact.root / MODEL)

    @functools.cached_property
    def _optional(self) -> dict[str, TensorSpec]:
        from .build import tensor_spec

        return {value.name or "": tensor_spec(value) for value in self._model.graph.inputs if value.is_initializer()}

    @functools.cached_property
    def _whole(self) -> OrtStep:
        """The whole model on onnxruntime, for runs that the compiled code cannot do."""
        inputs = [*self._inputs, *self._optional]
        region = RegionSpec(runtime="onnxruntime", file=MODEL, inputs=inputs, outputs=self._outputs, nodes=0)
        return OrtStep(self.artifact, region, self.threads)

    def get_providers(self) -> list[str]:
        """The runtimes that take part, in onnxruntime's manner of naming them."""
        used = {region.runtime for region in self.artifact.manifest.regions}
        return [name for key, name in (("tvm", "TVMExecutionProvider"), ("onnxruntime", "CPUExecutionProvider"))
                if key in used]  # fmt: skip

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Of each of `get_providers`: TVM compiled for a target, onnxruntime has no options."""
        target = {"target": self.artifact.target.name}
        return {name: target if name.startswith("TVM") else {} for name in self.get_providers()}

    def new_state(self, sizes: Mapping[str, int] | None = None) -> State:
        """Zeros for the inputs whose new value the model computes, such as the caches of a decoder. Sessions of models
        with the same such inputs may share a state. sizes: of the dimensions that have names.

        Raises InputError for a size that is missing.
        """
        arrays = {}
        for name in self.artifact.manifest.state:
            spec = self._inputs[name]
            dims = [(sizes or {}).get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape or ()]
            if not all(isinstance(dim, int) for dim in dims):
                raise InputError(f"input {name!r} has shape {spec.shape}; give `sizes` for its names")
            arrays[name] = aligned(tuple(int(dim or 0) for dim in dims), numpy_type(spec.dtype))
        return State(arrays)

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None, *,
        state: State | None = None,
    ) -> list[Any]:  # fmt: skip
        """The named outputs (all for None or []), in that order, as NumPy arrays.

        input_feed: input name -> array of the declared type and shape; aligned contiguous arrays are not copied.
        run_options is accepted for compatibility and has no effect. state: takes the place of the inputs that it has,
        and of their new values among the outputs; one run at a time. Raises InputError when feeds do not fit.
        """
        if isinstance(output_names, str):
            raise InputError(f"output_names is the text {output_names!r}; expected a list of names")
        outputs = self._outputs if state is None else self._passing
        names = list(output_names or outputs)
        for name in names:
            if name not in outputs:
                raise InputError(f"unknown output {name!r}; {did_you_mean(name, outputs)}")
        feeds = self._check(input_feed if state is None else self._with_state(input_feed, state))
        values = self._values(feeds, state)
        results = []
        for index, name in enumerate(names):
            # What is an input too, or is asked for twice, must not share its memory.
            shared = name in feeds or name in names[:index]
            results.append(copy.deepcopy(values[name]) if shared else values[name])
        return results

    def _with_state(self, feeds: Mapping[str, Any], state: State) -> dict[str, Any]:
        wanted = self.artifact.manifest.state
        if state.arrays.keys() != wanted.keys():
            raise InputError(f"the state has {', '.join(state.arrays) or 'nothing'}; expected {', '.join(wanted)}")
        if twice := [name for name in feeds if name in wanted]:
            raise InputError(f"input {twice[0]!r} is in the state already; leave it out")
        return {**feeds, **state.arrays}

    def _values(self, feeds: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        """The feeds and what is computed from them, the outputs included; what belongs to the state is left there."""
        values = self._computed(feeds, state)
        if state is not None:
            for name, made in self.artifact.manifest.state.items():
                if values[made] is not state.arrays[name]:
                    np.copyto(state.arrays[name], values[made])
        return values

    def _computed(self, feeds: Mapping[str, Any], state: State | None) -> dict[str, Any]:
        if not feeds.keys() <= self._inputs.keys():
            self.left_to_onnxruntime = "a value is given for an input that has a default"
            return {**feeds, **self._whole(feeds)}
        values = dict(feeds)
        try:
            for step in self._steps:
                values.update(step(values, state))
        except Refused as error:
            if not self._rescue:
                raise
            results = self._whole(feeds)
            self.left_to_onnxruntime = str(error)
            log.info("onnxruntime ran these inputs: %s", error)
            return {**feeds, **results}
        return values

    def _check(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(feeds, (dict, Mapping)):  # to ask for a dict first is faster
            raise InputError(f"input_feed is a {type(feeds).__name__}; expected a dict of arrays by input name")
        given = self._inputs if feeds.keys() == self._inputs.keys() else self._given(feeds)
        symbols: dict[str, tuple[int, str]] = {}
        return {name: _fit(feeds[name], spec, symbols) for name, spec in given.items()}

    def _given(self, feeds: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """What is known of each of the feeds, which are not the inputs without a default."""
        given = dict(self._inputs)
        for name in feeds:
            if name in self._inputs:
                continue
            if name not in self._optional:
                raise InputError(f"unknown input {name!r}; {did_you_mean(name, [*self._inputs, *self._optional])}")
            given[name] = self._optional[name]
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing; expected {', '.join(self._inputs)}")
        return given


def _fit(value: Any, spec: TensorSpec, symbols: dict[str, tuple[int, str]]) -> Any:
    """The feed as an array of the declared type. `symbols`: dimension name -> (size, input that set it)."""
    if "(" in spec.dtype:
        return value  # a sequence or optional: onnxruntime's to check
    expected = numpy_type(spec.dtype)
    if type(value) is np.ndarray and value.dtype == expected and list(value.shape) == spec.shape:
        return value  # as usual; what follows would find the same, later
    array = _typed(value, spec, expected)
    if spec.shape is None:
        return array
    if array.ndim != len(spec.shape):
        raise InputError(f"input {spec.name!r} has shape {list(array.shape)}; expected rank {len(spec.shape)}"
                         f" {spec.shape}")  # fmt: skip
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int) and size != dim:
            raise InputError(f"input {spec.name!r} has shape {list(array.shape)}; expected {spec.shape}")
        if isinstance(dim, str):
            known, source = symbols.setdefault(dim, (size, spec.name))
            if known != size:
                raise InputError(
                    f"dimension {dim!r} is {size} in input {spec.name!r} and {known} in input {source!r}; "
                    "expected one size"
                )
    return array


def _typed(value: Any, spec: TensorSpec, expected: np.dtype[Any]) -> np.ndarray:
    """The feed as an array of type `expected`. Python numbers and lists take it on; arrays must have it already."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"input {spec.name!r} is not an array ({first_line(error)})") from error
    if array.dtype == expected or (expected.kind == "O" and array.dtype.kind in "US"):
        return array
    if hasattr(value, "dtype"):
        fits = array.dtype.newbyteorder("=") == expected
    else:
        numbers = value is not None and array.dtype.kind in "biuf"
        # An empty list has no type of its own.
        fits = numbers and (not array.size or np.can_cast(array.dtype, expected, "same_kind"))
    if fits:
        return array.astype(expected)
    raise InputError(f"input {spec.name!r} has type {array.dtype}; expected {expected}")


def _steps(artifact: Artifact, threads: int) -> list[Step]:
    target = artifact.target
    if target.runs_here:
        return [
            TvmStep(artifact, region, threads) if region.runtime == TVM else OrtStep(artifact, region, threads)
            for region in artifact.manifest.regions
        ]
    if target.is_cpu and target.machine == _this_machine():
        missing = f"{target.isa.name} is not among this processor's {len(host_flags())} features"
        raise TargetError(f"{artifact.root}: built for {target.name}, which this machine cannot run ({missing})")
    if target.is_cpu:
        from .device import emulated_step

        return [emulated_step(artifact, region, threads) for region in artifact.manifest.regions]
    if target.kind == "cuda":
        tvm = load_tvm()
        if tvm.cuda(0).exist:
            return [TvmStep(artifact, region, threads, tvm.cuda(0)) for region in artifact.manifest.regions]
    raise TargetError(f"{artifact.root}: built for {target.name}; this machine has no such device to run it on")


def _this_machine() -> str:
    import platform

    return platform.machine()
