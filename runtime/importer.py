"""ONNX to Relax.

A node is converted by the first of: a registered lowering (custom domains), our own converter
(`runtime.importing`), TVM's converter, the body of its function (the model's or the standard's). TVM's graph walk is
not used: it looks operators up without their domain, hoists `If` branches and lets shape expressions stand where
tensors are expected. Every result is checked against the type and shape that ONNX's inference promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import tvm
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto
from tvm import relax, tirx

from .importing import CONVERTERS, bounds, frontend, protos
from .importing.integers import as_numbers, on_integers
from .importing.protos import STANDARD
from .importing.refused import UNSUPPORTED, ImportRefused, no_converter
from .importing.site import (
    PACKED,
    ByBody,
    Declared,
    Refuse,
    Site,
    Unfixed,
    Value,
    dtype_of,
    int64,
    made_by,
    number,
    onnx_dtype,
    shape_of,
)
from .importing.unify import unified
from .lowering import lowering_for
from .state import IN_PLACE
from .target import Target

# Sums whose terms are as many as the input has elements: a float16 sum of ones ends at 2048.
IN_FLOAT32 = frozenset({"AveragePool", "Einsum", "GlobalAveragePool", "GlobalLpPool", "LpPool"})
HALF = ("float16", "bfloat16")

# What WebGPU's shading language has no words for.
WIDE_TYPES = ("int64", "uint64", "float64")


def import_model(model: ModelProto, target: Target) -> tvm.IRModule:
    """The model as a Relax module with one public function `main`.

    Parameters of `main` are the graph's inputs in order, initializers excluded; it returns the graph's output, or a
    tuple of them when there are several. Weights are constants. Dimensions with the same `dim_param` share one
    symbolic variable; unknown ones get their own. Raises ImportRefused at the first node that cannot be compiled.
    """
    return _Importer(model, target).module()


def overwritten(module: tvm.IRModule) -> dict[int, int]:
    """Number of an output of an imported module's `main` -> number of the input in whose memory it is made."""
    attrs = module.attrs or {}
    return {int(made): int(where) for made, where in (attrs.get(IN_PLACE) or {}).items()}


def refusals(model: ModelProto, target: Target) -> dict[int, str]:
    """Index of a node of the main graph -> why it cannot be compiled. Converts every node, compiles nothing.

    A refused node's outputs are taken to be what ONNX's inference says of them, so one refusal does not hide the
    next. Deterministic. It costs about as much as an import.
    """
    return _Importer(model, target).refused()


def _half_type(inputs: list[Value | None]) -> str | None:
    """float16 or bfloat16, where the first input is that."""
    first = inputs[0] if inputs else None
    return dtype_of(first.expr) if first is not None and dtype_of(first.expr) in HALF else None


@dataclass
class _Scope:
    """Names of one graph or function body: values that are computed, types that are promised.

    attrs: the enclosing function's attributes. path: what leads to this body, for messages.
    """

    opsets: Mapping[str, int]
    values: dict[str, Value | None] = field(default_factory=dict)
    declared: dict[str, Declared] = field(default_factory=dict)
    attrs: Mapping[str, AttributeProto] = field(default_factory=dict)
    path: str = ""

    @property
    def opset(self) -> int:
        return max((self.opsets.get(domain, 1) for domain in STANDARD), default=1)


class _Importer:
    def __init__(self, model: ModelProto, target: Target) -> None:
        self.model = model
        self.target = target
        self.bb = relax.BlockBuilder()
        self.functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.symbols: dict[str, tirx.Var] = {}
        self.branches = 0

    # The main graph.

    def module(self) -> tvm.IRModule:
        """The whole model. Raises ImportRefused."""
        graph = self.model.graph
        with frontend.silence(), self.target.tvm():
            scope, params = self.main_scope()
            with self.bb.function("main", params=params):
                for node in graph.node:
                    self.node(node, scope)
                outputs = [self.result(scope, output.name) for output in graph.output]
                overwritten = self.overwritten(outputs, params)
                self.bb.emit_func_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            module = relax.transform.ConvertToDataflow(1)(self.bb.get())
            return module.with_attr(IN_PLACE, overwritten) if overwritten else module

    def overwritten(self, outputs: list[tvm.ir.Expr], params: list[tvm.ir.Expr]) -> dict[str, int]:
        """Number of an output -> number of the parameter in whose memory it is made."""
        found = {}
        for index, output in enumerate(outputs):
            made = made_by(self.bb, output, "relax.call_tir_inplace")
            if made is not None:
                found[str(index)] = next(i for i, param in enumerate(params) if param.same_as(made.args[1].fields[0]))
        return found

    def refused(self) -> dict[int, str]:
        """Node index -> reason, for every node that cannot be converted."""
        reasons: dict[int, str] = {}
        with frontend.silence(), self.target.tvm():
            scope, params = self.main_scope(tolerant=True)
            with self.bb.function("main", params=params):
                for index, node in enumerate(self.model.graph.node):
                    try:
                        self.node(node, scope)
                    except ImportRefused as error:
                        own = node.output and error.value == protos.site_of(node)
                        reasons[index] = error.reason if own else f"{error.op} at {error.value!r}: {error.reason}"
                        self.assume(node, scope)
                self.bb.emit_func_output(relax.Tuple([]))
        return reasons

    def main_scope(self, tolerant: bool = False) -> tuple[_Scope, list[tvm.ir.Expr]]:
        """The names known before the first node, and the parameters of `main`."""
        graph = self.model.graph
        scope = _Scope(self.opsets, declared=protos.declared_types(self.model))
        self.initializers(graph, scope)
        params = []
        for info in graph.input:
            if info.name in scope.values:
                continue
            try:
                param = relax.Var(protos.identifier(info.name), self.input_type(info))
            except Refuse as error:
                if not tolerant:
                    raise ImportRefused("input", info.name, str(error)) from error
                continue
            params.append(param)
            scope.values[info.name] = Value(param)
        return scope, params

    def initializers(self, graph: GraphProto, scope: _Scope) -> None:
        for tensor in graph.initializer:
            with contextlib.suppress(Refuse):  # a string: refused where it is read
                scope.values[tensor.name] = protos.constant(protos.array_of(tensor))

    def input_type(self, info: onnx.ValueInfoProto) -> tvm.ir.Expr:
        if not info.type.HasField("tensor_type"):
            raise Refuse("it is not a tensor")
        tensor = info.type.tensor_type
        if not tensor.HasField("shape"):
            raise Unfixed("its rank is not known")
        dims: list[Any] = []
        for index, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value"):
                dims.append(dim.dim_value)
            elif dim.dim_param:
                dims.append(self.symbols.setdefault(dim.dim_param, tirx.Var(protos.identifier(dim.dim_param), "int64")))
            else:
                dims.append(tirx.Var(protos.identifier(f"{info.name}_{index}"), "int64"))
        return relax.TensorType(dims, onnx_dtype(tensor.elem_type))

    def result(self, scope: _Scope, name: str) -> tvm.ir.Expr:
        value = scope.values.get(name)
        if value is None:
            raise ImportRefused("output", name, "nothing computes it")
        if value.packed is not None:
            raise ImportRefused("output", name, f"outputs of {value.packed} are not compiled")
        return value.expr

    def assume(self, node: NodeProto, scope: _Scope) -> None:
        """Stand-ins for a refused node's outputs, of the types that are declared for them."""
        for name in filter(None, node.output):
            declared = scope.declared.get(name)
            scope.values.pop(name, None)
            if declared is None or declared.dtype is None or declared.shape is None:
                continue
            dims = [d if isinstance(d, int) else tirx.Var(f"d{i}", "int64") for i, d in enumerate(declared.shape)]
            unknown = self.bb.emit(
                relax.call_pure_packed("unknown", relax.ShapeExpr([]), ty_args=relax.TensorType(None, declared.dtype))
            )
            scope.values[name] = Value(self.bb.match_cast(unknown, relax.TensorType(dims, declared.dtype)))

    # Nodes.

    def node(self, node: NodeProto, scope: _Scope) -> None:
        """Convert one node and bind its outputs. Raises ImportRefused."""
        try:
            inputs = [self.read(scope, name) for name in node.input]
            if node.domain in STANDARD and node.op_type == "If":
                results = self.if_node(node, inputs, scope)
            else:
                results = self.convert(node, inputs, scope)
            for index, name in enumerate(node.output):
                if name:
                    item = results[index] if index < len(results) else None
                    scope.values[name] = self.checked(item, scope.declared.get(name))
            self.check_device(node, inputs, scope)
        except ImportRefused:
            raise
        except Exception as error:  # converters and TVM raise errors of many classes
            raise ImportRefused(node.op_type, scope.path + protos.site_of(node), _first_line(error)) from error

    def check_device(self, node: NodeProto, inputs: list[Value | None], scope: _Scope) -> None:
        """Raises Refuse where the node computes with a type that the target's kernels cannot hold."""
        if self.target.kind != "webgpu":
            return
        outputs = [scope.values[name] for name in node.output if name]
        named = zip((*node.input, *filter(None, node.output)), (*inputs, *outputs), strict=True)
        for name, value in named:
            # Contents that are known are shapes: the host computes those.
            if value is None or value.content is not None or protos.is_constant(value.expr):
                continue
            if dtype_of(value.expr) in WIDE_TYPES:
                kind = dtype_of(value.expr)
                raise Refuse(f"{name!r} is {kind}, and WebGPU has no 64-bit types; give the model 32-bit ones")

    def read(self, scope: _Scope, name: str) -> Value | None:
        if name and name not in scope.values:
            raise Refuse(f"its input {name!r} is not compiled")
        return scope.values[name] if name else None

    def convert(self, node: NodeProto, inputs: list[Value | None], scope: _Scope) -> list[Any]:
        """The node's outputs, from the first source that knows the operator."""
        attrs = {a.name: a for a in protos.bound_attributes(node.attribute, scope.attrs)}
        local = self.functions.get((node.domain, node.op_type, node.overload))
        if node.domain not in STANDARD:
            lowering = lowering_for(node.domain, node.op_type, self.target.kind)
            if lowering is not None:
                exprs: list[Any] = [v.expr if v else None for v in inputs]
                with contextlib.suppress(ByBody):
                    return self.flat(lowering(self.bb, exprs, protos.python_values(attrs.values()), self.target))
        if local is not None:
            return self.body(local, inputs, attrs, scope, node)
        if node.domain not in STANDARD:
            raise Refuse(
                f"the domain {node.domain!r} has no lowering and the model has no body for it; export the model with "
                "its functions"
            )
        if node.op_type in UNSUPPORTED:
            raise Refuse(UNSUPPORTED[node.op_type])
        inputs = unified(self.bb, node.op_type, attrs, inputs)
        folded = protos.folded(node, list(attrs.values()), inputs, scope.opset)
        if folded is not None:
            return folded
        if node.op_type in IN_FLOAT32 and (half := _half_type(inputs)):
            wide = [v if v is None else self.widened(v) for v in inputs]
            results = self.converted(node, wide, attrs, scope)
            return [self.narrowed(result, half) for result in results]
        return self.converted(node, inputs, attrs, scope)

    def widened(self, value: Value) -> Value:
        if value.wide is not None:
            return Value(value.wide)
        return Value(self.bb.emit(relax.op.astype(value.expr, "float32")))

    def narrowed(self, result: Any, dtype: str) -> Value:
        """A float32 result as float16 or bfloat16, which a node that computes in float32 reads unrounded."""
        expr = self.bb.emit(result.expr if isinstance(result, Value) else result)
        return Value(relax.op.astype(expr, dtype), wide=expr if dtype == "float16" else None)

    def converted(
        self, node: NodeProto, inputs: list[Value | None], attrs: Mapping[str, AttributeProto], scope: _Scope
    ) -> list[Any]:
        """The outputs of a standard operator by our converter, TVM's, or the standard's body."""
        declared = [scope.declared.get(name) or protos.unknown() for name in node.output]
        site = Site(
            node.op_type, self.bb, self.target, scope.opset, inputs, protos.python_values(attrs.values()), declared,
            len(node.output), protos.in_place(node),
        )  # fmt: skip
        if node.op_type in bounds.CHECKS:
            bounds.CHECKS[node.op_type](site)
        if node.op_type in CONVERTERS:
            try:
                whole = on_integers(site)
                if whole is not None:
                    results = self.flat(CONVERTERS[node.op_type](whole[0]))
                    return [as_numbers(site, result, whole[1]) for result in results]
                return self.flat(CONVERTERS[node.op_type](site))
            except ByBody:
                return self.body(protos.standard_body(node, attrs, inputs, scope.opset), inputs, attrs, scope, node)
        converter = frontend.converter(node.op_type, scope.opset)
        if converter is not None:
            return self.flat(converter(self, node, inputs, list(attrs.values())))
        return self.body(protos.standard_body(node, attrs, inputs, scope.opset), inputs, attrs, scope, node)

    def flat(self, result: Any) -> list[Any]:
        """A converter's result as a list with one item for each output."""
        if isinstance(result, (list, tuple)):
            return list(result)
        if isinstance(result, Value):
            return [result]
        if isinstance(result, relax.Tuple):
            return list(result.fields)
        expr = self.bb.normalize(result)
        if isinstance(expr.ty, relax.TupleType):
            expr = self.bb.emit(expr)
            return [self.bb.emit(relax.TupleGetItem(expr, i)) for i in range(len(expr.ty.fields))]
        return [expr]

    def checked(self, item: Any, declared: Declared | None) -> Value:
        """Bind a converter's output after comparing it with what ONNX promises; unknown dimensions get names."""
        if item is None:
            raise Refuse("an output that the model reads is not produced")
        value = item if isinstance(item, Value) else Value(item)
        expr = value.expr
        if not (protos.is_constant(expr) or isinstance(expr, relax.Var)):
            expr = self.bb.emit(expr)
        if not isinstance(expr.ty, relax.TensorType):
            raise Refuse(f"the converter gave a {type(expr.ty).__name__}, not a tensor")
        declared = declared or protos.unknown()
        if value.packed is None and PACKED.get(declared.dtype or "") == dtype_of(expr):
            value = dataclasses.replace(value, packed=declared.dtype)
        if declared.dtype not in (None, value.packed, dtype_of(expr)):
            raise Refuse(f"the converter gave {dtype_of(expr)}, ONNX promises {declared.dtype}")
        known = [number(d) for d in expr.ty.shape.values] if isinstance(expr.ty.shape, relax.ShapeExpr) else None
        rank = len(known) if known is not None else int(expr.ty.ndim)
        promised = declared.shape
        if rank < 0:
            if promised is None:
                raise Unfixed("the rank of its output is not known")
            rank = len(promised)
        if promised is None:
            promised = (None,) * rank
        if len(promised) != rank:
            raise Refuse(f"the converter gave rank {rank}, ONNX promises {len(promised)}")
        dims: list[Any] = []
        for index, want in enumerate(promised):
            have = known[index] if known is not None else None
            if isinstance(have, int) and isinstance(want, int) and have != want:
                raise Refuse(f"the converter gave size {have} on axis {index}, ONNX promises {want}")
            # What follows from the inputs' sizes holds, whatever an exporter has declared.
            fixed = have if isinstance(have, int) or not isinstance(want, int) or self.follows(have) else want
            dims.append(tirx.Var(f"d{index}", "int64") if fixed is None else fixed)
        if known is None or any(
            isinstance(d, int) and not isinstance(k, int) for d, k in zip(dims, known, strict=True)
        ):
            expr = self.bb.match_cast(expr, relax.TensorType([int64(d) for d in dims], dtype_of(expr)))
        if protos.is_constant(expr) and value.content is None:
            return dataclasses.replace(protos.constant_value(expr), packed=value.packed)
        return dataclasses.replace(value, expr=expr)

    def follows(self, size: Any) -> bool:
        """Whether an expression is made of sizes of the model's inputs."""
        inputs = list(self.symbols.values())
        return size is not None and all(
            any(variable.same_as(symbol) for symbol in inputs) for variable in tirx.analysis.undefined_vars(size)
        )

    # Functions and branches.

    def body(
        self,
        function: onnx.FunctionProto | None,
        inputs: list[Value | None],
        attrs: Mapping[str, AttributeProto],
        outer: _Scope,
        node: NodeProto,
    ) -> list[Any]:
        """A node through its function's body, in place."""

        if function is None:
            raise Refuse(no_converter(node))
        defaults = {a.name: a for a in function.attribute_proto}
        opsets = {entry.domain: entry.version for entry in function.opset_import} or outer.opsets
        scope = _Scope(opsets, attrs={**defaults, **attrs}, path=f"{outer.path}{protos.site_of(node)}/")
        for index, name in enumerate(function.input):
            scope.values[name] = inputs[index] if index < len(inputs) else None
        for inner in function.node:
            self.node(inner, scope)
        wanted = zip(function.output, node.output, strict=False)  # the node may leave out optional outputs
        return [self.read(scope, name) if asked else None for name, asked in wanted]

    def if_node(self, node: NodeProto, inputs: list[Value | None], scope: _Scope) -> list[Any]:
        """Each branch as a private function that is called from a Relax If: one that is not taken costs nothing."""
        condition = inputs[0]
        if condition is None:
            raise Refuse("its condition is missing")
        flag = condition.expr
        if any(d != 1 for d in shape_of(flag)):
            raise Refuse("its condition is not a single element")
        branches = {a.name: a.g for a in node.attribute}
        then_branch, else_branch = branches["then_branch"], branches["else_branch"]
        fixed = None if condition.content is None else condition.content[0]
        if shape_of(flag):
            flag = self.bb.emit(relax.op.reshape(flag, []))
        if protos.is_constant(flag):
            fixed = bool(flag.value.numpy())
        if isinstance(fixed, (bool, int)):
            return self.branch_in_place(then_branch if fixed else else_branch, scope, node)
        calls = [
            self.branch(graph, name, scope, node) for name, graph in (("then", then_branch), ("else", else_branch))
        ]
        result = self.bb.emit(relax.If(flag, *(relax.SeqExpr([], self.bb.normalize(call)) for call in calls)))
        if len(node.output) == 1:
            return [result]
        return [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(node.output))]

    def branch_in_place(self, graph: GraphProto, outer: _Scope, node: NodeProto) -> list[Any]:
        """A branch that is always taken."""
        scope = _Scope(
            outer.opsets,
            dict(outer.values),
            protos.graph_types(graph, outer.declared),
            outer.attrs,
            f"{outer.path}{protos.site_of(node)}/",
        )
        self.initializers(graph, scope)
        for inner in graph.node:
            self.node(inner, scope)
        return [self.read(scope, output.name) for output in graph.output]

    def branch(self, graph: GraphProto, name: str, outer: _Scope, node: NodeProto) -> tvm.ir.Expr:
        """A call of a new private function with the branch's nodes; captured values are its parameters."""
        self.branches += 1
        label = f"{name}_{self.branches}"
        scope = _Scope(
            outer.opsets,
            {},
            protos.graph_types(graph, outer.declared),
            outer.attrs,
            f"{outer.path}{protos.site_of(node)}/{name}/",
        )
        captured = [n for n in protos.captures(graph) if n in outer.values]
        variables: dict[tirx.Var, tirx.Var] = {}
        params: list[tvm.ir.Expr] = []
        arguments: list[tvm.ir.Expr] = []

        def renamed(dim: Any) -> Any:
            if isinstance(dim, int):
                return dim
            analyzer = tvm.sym.Analyzer()
            for used in tirx.analysis.undefined_vars(dim):
                analyzer.bind(used, variables.setdefault(used, tirx.Var(used.name, "int64")))
            return analyzer.simplify(dim)

        for captured_name in captured:
            value = outer.values[captured_name]
            if value is None or protos.is_constant(value.expr):
                scope.values[captured_name] = value
                continue
            dims = [int64(renamed(d)) for d in value.expr.ty.shape.values]
            param = relax.Var(protos.identifier(captured_name), relax.TensorType(dims, value.expr.ty.dtype))
            content = None if value.content is None else tuple(renamed(c) for c in value.content)
            scope.values[captured_name] = Value(param, content)
            params.append(param)
            arguments.append(value.expr)
        if variables:
            params.insert(0, relax.Var("dims", relax.ShapeType(list(variables.values()))))
            arguments.insert(0, relax.ShapeExpr(list(variables)))
        self.initializers(graph, scope)
        with self.bb.function(label, params=params, private=True):
            try:
                for inner in graph.node:
                    self.node(inner, scope)
                results = [self.read(scope, output.name) for output in graph.output]
                if any(r is None for r in results):
                    raise Refuse("a branch gives no value")
            except Exception:
                self.bb._end_block()  # the builder's own unwinding forgets the open block and scope
                self.bb.end_scope()
                raise
            exprs = [r.expr for r in results if r is not None]
            function = self.bb.emit_func_output(exprs[0] if len(exprs) == 1 else relax.Tuple(exprs))
        return relax.Call(function, arguments)


def _first_line(error: BaseException) -> str:
    """The line of an error message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines and lines[0].startswith("Traceback") else (lines[0] if lines else type(error).__name__)
    return text[:300]
