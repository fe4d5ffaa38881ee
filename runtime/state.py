"""What a model keeps from one run to the next: inputs whose new value it computes, such as the caches of a decoder.

A TensorScatter that takes an input of the model and gives one of its outputs replaces a few rows. Where nothing else
reads that input, compiled code writes the rows where the input lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

IN_PLACE = "graphwright.in_place"  # metadata of a node that may write its result where its first input lies


@dataclass(frozen=True)
class State:
    """Arrays by the names of inputs. A run that is given a state reads them and leaves in them what it computes.

    tensors: the same memory as a runtime takes it, by input.
    """

    arrays: Mapping[str, np.ndarray]
    tensors: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def mark_state(model: ir.Model) -> dict[str, str]:
    """Input -> output of the model that is its new value. Marks the nodes that may write it in place, and only those.
    """
    for node in model.graph.all_nodes():
        node.metadata_props.pop(IN_PLACE, None)
    outputs, found = list(model.graph.outputs), {}
    for node in model.graph:
        if node.op_type != "TensorScatter" or node.domain not in ("", "ai.onnx"):
            continue
        cache, result = node.inputs[0], node.outputs[0]
        if cache is None or not cache.is_graph_input() or cache.is_initializer() or cache in outputs:
            continue
        if len(cache.uses()) == 1 and outputs.count(result) == 1:
            node.metadata_props[IN_PLACE] = "1"
            found[cache.name or ""] = result.name or ""
    return found
