"""Cutting a model into regions: what TVM compiles, and what onnxruntime runs inside the same artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..passes.graph import is_constant, site, subgraphs
from .artifact import ONNXRUNTIME, TVM


@dataclass(frozen=True)
class Region:
    """Nodes that one runtime executes in one call, in topological order.

    reasons: for nodes that TVM cannot take, site (first output name) -> why.
    """

    runtime: str
    nodes: tuple[ir.Node, ...]
    reasons: Mapping[str, str]


def reads(node: ir.Node) -> list[ir.Value]:
    """Values of the enclosing graph that a node reads, those its subgraphs capture included."""
    values = [v for v in node.inputs if v is not None]
    for graph in subgraphs(node):
        own = set(graph.inputs) | set(graph.initializers.values())
        inner = list(graph.all_nodes())
        own |= {v for n in inner for v in n.outputs}
        for n in inner:
            for nested in subgraphs(n):
                own |= set(nested.inputs) | set(nested.initializers.values())
        captured = [v for n in inner for v in n.inputs if v is not None]
        captured += [v for g in (graph, *(s for n in inner for s in subgraphs(n))) for v in g.outputs if v is not None]
        values += [v for v in captured if v not in own]
    return list(dict.fromkeys(values))


def partition(model: ir.Model, refused: Mapping[ir.Node, str]) -> list[Region]:
    """Regions in an order in which they can run. `refused`: nodes TVM cannot take -> why.

    A node's level counts the changes of runtime on the way to it, so the nodes of one runtime and level form a
    convex region: no path leaves it and comes back. A node of constants alone, such as the Cast of a narrow weight,
    goes where all its readers are: what it gives is not handed over at every run, and a kernel may read the constant.
    """
    place: dict[ir.Node, tuple[int, str]] = {}
    constant: set[ir.Node] = set()
    for node in model.graph:
        runtime = ONNXRUNTIME if node in refused else TVM
        parity = 0 if runtime == TVM else 1  # even levels are TVM's, odd ones onnxruntime's
        start = parity
        values = reads(node)
        for value in values:
            source = value.producer()
            if source in place:
                level = place[source][0]
                start = max(start, level + (level - parity) % 2)
        place[node] = start, runtime
        if runtime == TVM and values and all(is_constant(v) or v.producer() in constant for v in values):
            constant.add(node)
    for node in reversed(model.graph):
        if node in constant and not any(value.is_graph_output() for value in node.outputs):
            readers = {place.get(user) for value in node.outputs for user, _ in value.uses()}
            if len(readers) == 1 and (where := readers.pop()) is not None:
                place[node] = where
    groups: dict[tuple[int, str], list[ir.Node]] = {}
    for node in model.graph:
        groups.setdefault(place[node], []).append(node)
    return [
        Region(runtime, tuple(nodes), {site(n): refused[n] for n in nodes if n in refused})
        for (_, runtime), nodes in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def cut(model: ir.Model, runs: Sequence[Sequence[ir.Node]]) -> list[ir.Model]:
    """One model for each run of nodes. Its inputs are the values it reads from outside, its outputs those that
    another run or the caller reads; initializers go with every run that reads them.
    """
    run_of = {node: index for index, run in enumerate(runs) for node in run}
    wanted: list[dict[ir.Value, None]] = [{} for _ in runs]
    sources: list[dict[ir.Value, None]] = [{} for _ in runs]
    weights: list[dict[ir.Value, None]] = [{} for _ in runs]
    for node, index in run_of.items():
        for value in reads(node):
            producer = value.producer()
            if value.is_initializer() and value.const_value is not None:
                weights[index][value] = None
            elif producer is None or run_of[producer] != index:
                sources[index][value] = None
                if producer is not None:
                    wanted[run_of[producer]][value] = None
    for value in model.graph.outputs:
        producer = value.producer()
        if producer is not None:
            wanted[run_of[producer]][value] = None
    return [
        _model(model, list(run), list(sources[i]), list(wanted[i]), list(weights[i])) for i, run in enumerate(runs)
    ]


def _model(
    model: ir.Model, nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], weights: list[ir.Value]
) -> ir.Model:
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=weights,
        opset_imports=dict(model.graph.opset_imports),
        name=model.graph.name or "region",
    )
    return ir.Model(
        view.clone(), ir_version=model.ir_version, functions=[f.clone() for f in model.functions.values()]
    )
