"""Bring a model to a newer version of the standard operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport
from .bodies import inline_call
from .evaluate import Refusal
from .protobuf import INLINE

if TYPE_CHECKING:
    import onnx
    import onnx.defs


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Rewrite the model for opset `version` of the standard operators, if it is older.

        <opset_import: ["" : 11]>                  ->   <opset_import: ["" : 21]>
        {  Y = ReduceSum <axes = [1]> (X)  }            {  Y_axes = Constant <value = int64[1] {1}> ()
                                                           Y = ReduceSum (X, Y_axes)  }

    Node by node, with onnx's version converter where an operator changed, so that weights, functions, bodies,
    names and metadata stay as they are. Functions are converted too. Upsample, Resize 10,
    RoiAlign 10 and GroupNormalization 18, which that converter gets wrong, are written out here.
    Left alone: models that are newer already; and, with the reason, the whole model when one operator in it
    cannot be converted, since graph and functions must agree on the meaning of an operator.
    """

    name: ClassVar[str] = "convert-opset"
    contract: ClassVar[Contract] = Contract.EXACT

    version: int = 21  # of the domain ai.onnx

    def __post_init__(self) -> None:
        import onnx.defs

        newest = onnx.defs.onnx_opset_version()
        if not 13 <= self.version <= newest:
            raise ValueError(f"version {self.version} is not between 13 and {newest}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        run = _Run(self.version, model, self.report())
        tops = [graph.Scope(model.graph, model.graph.opset_imports)]
        tops += [graph.Scope(f.graph, f.opset_imports, f) for f in model.functions.values()]
        plans = [(top, run.plan(top)) for top in tops]
        if not run.report.skips:
            for top, plan in plans:
                run.apply(top, plan)
            opset = model.graph.opset_imports.get("", self.version)
            model.ir_version = max(model.ir_version, _ir_version(opset))
        return run.report


def convert_function(function: ir.Function, version: int, report: PassReport) -> None:
    """Convert one function that is in no model yet. A Skip in the report says why it is left as it was."""
    alone = ir.Model(ir.Graph([], [], nodes=[], name=function.name), ir_version=10, functions=[function])
    run = _Run(version, alone, report)
    top = graph.Scope(function.graph, function.opset_imports, function)
    plan = run.plan(top)
    if not report.skips:
        run.apply(top, plan)


Plan = list[tuple[ir.Node, "onnx.FunctionProto"]]


@dataclass
class _Run:
    version: int
    model: ir.Model
    report: PassReport
    known: dict[bytes, onnx.FunctionProto] = field(default_factory=dict)
    names: graph.Names | None = None

    def plan(self, top: graph.Scope) -> Plan:
        """What each node that must change becomes. A Skip in the report says why it cannot be done."""
        current = top.opsets.get("")
        plan: Plan = []
        if current is None or current >= self.version:
            return plan
        for scope in graph.nested(top):
            for node in scope.graph:
                if node.domain != "" or not _changes(node.op_type, current, self.version):
                    continue
                try:
                    plan.append((node, self._converted(node, current)))
                except Refusal as refusal:
                    reason = f"{node.op_type} cannot go from opset {current} to {self.version}: {refusal}"
                    self.report.skipped("opset", graph.site(node), reason)
        return plan

    def apply(self, top: graph.Scope, plan: Plan) -> None:
        current = top.opsets.get("", self.version)
        for node, body in plan:
            self.names = self.names or graph.Names(self.model)
            detail = f"{node.op_type}: {' '.join(n.op_type for n in body.node)}"
            self.report.changed("convert", graph.site(node), detail)
            outputs = [value for value in node.outputs if value.name]
            inline_call(node, ir.serde.deserialize_function(body), self.names, outputs)
        if current < self.version:
            top.opsets[""] = self.version
            self.report.changed("opset", _what(top), f"{current} -> {self.version}")

    def _converted(self, node: ir.Node, current: int) -> onnx.FunctionProto:
        """What the node becomes, as the body of a function of its inputs. Raises Refusal."""
        if graph.has_references(node):
            raise Refusal("its attributes are parameters of the function; run inline-functions first")
        if any(True for _ in graph.subgraphs(node)):
            raise Refusal("it owns a body")
        proto = ir.to_proto(node)
        proto.ClearField("name")
        del proto.metadata_props[:]
        proto.input[:] = [f"input{i}" if value is not None else "" for i, value in enumerate(node.inputs)]
        proto.output[:] = [f"output{i}" if value.name else "" for i, value in enumerate(node.outputs)]
        for first, fix in FIXES.get(node.op_type, {}).items():
            if current < first <= self.version:
                return _function(node, fix(node, proto, current, self.version), [], self.version)
        single = _one_node_model(node, proto, current)
        key = single.SerializeToString()
        if key not in self.known:
            self.known[key] = _by_converter(node, single, self.version)
        return self.known[key]


def _what(top: graph.Scope) -> str:
    return top.function.name if top.function else top.graph.name or "graph"


def _ir_version(opset: int) -> int:
    """The oldest file format that may carry this opset."""
    import onnx.helper

    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


@functools.cache
def _changes(op_type: str, current: int, version: int) -> bool:
    """Whether the operator must be rewritten: its signature differs in more than accepted types and additions
    that default to the old behaviour, or its meaning is known to differ."""
    import onnx.defs

    try:
        old, new = (onnx.defs.get_schema(op_type, v, "") for v in (current, version))
    except onnx.defs.SchemaError:
        return True
    if old.since_version == new.since_version and not new.deprecated:
        return False
    changed = [*FIXES.get(op_type, {}), *([18] if op_type == "Split" else [])]
    return new.deprecated or any(current < first <= version for first in changed) or not _compatible(old, new)


def _compatible(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """Whether every old node is a new node with the same meaning, as far as the signatures tell."""
    import onnx.defs

    option = onnx.defs.OpSchema.FormalParameterOption
    for before, after in ((old.inputs, new.inputs), (old.outputs, new.outputs)):
        if len(after) < len(before) or any(p.option != option.Optional for p in after[len(before) :]):
            return False
        for a, b in zip(before, after, strict=False):
            relaxed = a.option == option.Single and b.option == option.Optional
            if a.option != b.option and not relaxed:
                return False
    for name, attribute in old.attributes.items():
        kept = new.attributes.get(name)
        if kept is None or kept.type != attribute.type:
            return False
        if kept.default_value.SerializeToString() != attribute.default_value.SerializeToString():
            return False
    return not any(a.required for name, a in new.attributes.items() if name not in old.attributes)


def _function(
    node: ir.Node, nodes: Iterable[onnx.NodeProto], tensors: Iterable[onnx.TensorProto], version: int
) -> onnx.FunctionProto:
    """A body over input0, input1 ... with `tensors` as constants in it."""
    from onnx import helper

    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
    return helper.make_function(
        "graphwright.converted",
        node.op_type,
        [f"input{i}" for i in range(len(node.inputs))],
        [f"output{i}" for i in range(len(node.outputs)) if node.outputs[i].name],
        [*constants, *nodes],
        [helper.make_opsetid("", version)],
    )


def _one_node_model(node: ir.Node, proto: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    """A model that is only this node. Small constants are in it, since converters look at them."""
    from onnx import helper

    inputs, initializers = [], []
    for name, value in zip(proto.input, node.inputs, strict=True):
        if value is None:
            continue
        tensor = graph.constant_tensor(value)
        if tensor is not None and graph.nbytes(tensor) <= INLINE:
            small = ir.to_proto(ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name))
            initializers.append(small)
        inputs.append(_declared(name, value))
    outputs = [_declared(name, value) for name, value in zip(proto.output, node.outputs, strict=True) if name]
    body = helper.make_graph([proto], "node", inputs, outputs, initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def _declared(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    """The value's type under another name; in function bodies, where it is not known, float."""
    return ir.to_proto(ir.Value(name=name, type=value.type or ir.TensorType(ir.DataType.FLOAT), shape=value.shape))


def _by_converter(node: ir.Node, single: onnx.ModelProto, version: int) -> onnx.FunctionProto:
    import onnx.version_converter

    try:
        result = onnx.version_converter.convert_version(single, version).graph
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError for what it cannot do
        message = " ".join(str(error).split())
        raise Refusal(message.split("Assertion")[-1][:160] or "onnx's converter cannot") from error
    wanted = [name for name in single.graph.node[0].output if name]
    if [output.name for output in result.output] != wanted:
        raise Refusal("onnx's converter lost an output")
    given = {value.name for value in single.graph.input}
    return _function(node, result.node, [t for t in result.initializer if t.name not in given], version)


# --- operators that onnx's converter gets wrong


def _resize(node: ir.Node, proto: onnx.NodeProto, current: int, version: int) -> list[onnx.NodeProto]:
    """Upsample and Resize before 11 map coordinates as y/scale and round down when they enlarge."""
    from onnx import helper

    mode = graph.attribute(node, "mode", "nearest")
    before: list[onnx.NodeProto] = []
    scales: list[float] | None
    if node.op_type == "Upsample" and current < 9:
        scales = list(graph.attribute(node, "scales") or [])
        before.append(helper.make_node("Constant", [], ["scales"], value_floats=scales))
    else:
        array = graph.constant_value(graph.input_of(node, 1))
        scales = None if array is None else array.tolist()
    source = "scales" if before else "input1"
    if mode == "nearest" and node.op_type == "Resize" and (scales is None or min(scales) < 1):
        raise Refusal("a nearest Resize that may shrink rounds in a way newer opsets do not have")
    resize = helper.make_node(
        "Resize",
        ["input0", "", source],
        ["output0"],
        mode="linear" if mode in ("linear", "bilinear") else mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    return [*before, resize]


def _roi_align(node: ir.Node, proto: onnx.NodeProto, current: int, version: int) -> list[onnx.NodeProto]:
    """Before 16 there was no half-pixel shift of the regions."""
    from onnx import helper

    proto.attribute.append(helper.make_attribute("coordinate_transformation_mode", "output_half_pixel"))
    return [proto]


def _groups(node: ir.Node, proto: onnx.NodeProto, current: int, version: int) -> list[onnx.NodeProto]:
    """Before 21 scale and bias had one number a group, then one a channel."""
    from onnx import helper

    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    groups = graph.attribute(node, "num_groups")
    if not isinstance(channels, int):
        raise Refusal("the number of channels is not known; run infer-shapes first")
    nodes = [
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1]),
        helper.make_node("Constant", [], ["repeat"], value_ints=[1, channels // groups]),
        helper.make_node("Constant", [], ["flat"], value_ints=[-1]),
    ]
    for index, name in ((1, "scale"), (2, "bias")):
        nodes += [
            helper.make_node("Reshape", [f"input{index}", "column"], [f"{name}_column"]),
            helper.make_node("Tile", [f"{name}_column", "repeat"], [f"{name}_tiled"]),
            helper.make_node("Reshape", [f"{name}_tiled", "flat"], [name]),
        ]
    proto.input[:] = ["input0", "scale", "bias"]
    return [*nodes, proto]


Fix = Callable[[ir.Node, "onnx.NodeProto", int, int], "list[onnx.NodeProto]"]
FIXES: dict[str, dict[int, Fix]] = {
    "Upsample": {10: _resize},
    "Resize": {11: _resize},
    "RoiAlign": {16: _roi_align},
    "GroupNormalization": {21: _groups},
}
