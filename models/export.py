"""A torch module as an ONNX model: opset 20, named axes, no trace of the machine it was exported on."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

OPSET = 20  # the first with Gelu
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules around it and its own name, as a Python list


def from_torch(
    name: str,
    module: torch.nn.Module,
    example: tuple[torch.Tensor | tuple[torch.Tensor, ...], ...],
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: tuple[str, ...],
    largest: Mapping[str, int] | None = None,
    *,
    opset: int = OPSET,
    translations: Mapping[Any, Any] | None = None,
    by_module: bool = False,
) -> ir.Model:
    """The module in evaluation mode as ONNX.

    `inputs` gives the shapes, tuples of the example flattened; a word in one is a dynamic axis of that name, and
    `largest` its bound, if it has one. `example` must have a size of at least 2 there, because a size of 1 is taken
    to be constant.
    `translations` gives operators of torch that the exporter does not know, each as a function of onnxscript.
    `by_module` names values after the module that computes them, such as decoder.layers.0.norm.Mul, so that two graphs
    of the same modules agree in the names of what they share.
    """
    import torch
    from torch.utils._pytree import tree_map

    bounds = largest or {}
    words = {d for shape in inputs.values() for d in shape if isinstance(d, str)}
    dims = {word: torch.export.Dim(word, max=bounds.get(word)) for word in words}
    axes = iter({i: dims[d] for i, d in enumerate(s) if isinstance(d, str)} for s in inputs.values())
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tree_map(torch.Tensor.clone, example),  # one tensor given twice would become one input
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tree_map(lambda _: next(axes), example),
            opset_version=opset,
            custom_translation_table=dict(translations or {}),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    if by_module:
        _name_by_module(program.model)
    return _cleaned(program.model, name)


def _name_by_module(model: ir.Model) -> None:
    """MODULE.OPERATOR for what a node computes, with a number behind it from the second such node of a module on."""
    outputs = set(model.graph.outputs)
    seen: Counter[str] = Counter()
    module = ""
    for node in model.graph:
        scopes = node.metadata_props.get(SCOPES)
        if scopes is not None:  # the exporter's own rewriting leaves some without; they follow what they are made for
            module = ([""] + [m for m in ast.literal_eval(scopes)[:-1] if not m.startswith("_")])[-1]
        stem = f"{module}.{node.op_type}" if module else node.op_type
        name = f"{stem}_{seen[stem]}" if seen[stem] else stem
        seen[stem] += 1
        node.name = name
        for i, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{name}.{i}" if i else name


def _cleaned(model: ir.Model, name: str) -> ir.Model:
    """Without stack traces and paths of the exporting machine, which the exporter stores with every node."""
    model.graph.name = name
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes about optional packages and its own deprecations; errors still show."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
