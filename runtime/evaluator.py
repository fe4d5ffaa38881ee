"""Values inside a model, by onnxruntime: what passes calibrate with, which may not import a runtime themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..passes.base import PassContext
from ..passes.errors import PassError
from ..passes.prepare.dead_code import DeadCode
from .feeds import Feeds
from .reference import Reference

GROUP_BYTES = 512 << 20  # of the values that one run hands out
UNKNOWN_DIM = 128  # what a size that the inputs do not tell is taken for


def evaluate(
    model: ir.Model, names: Sequence[str], feeds: Sequence[Feeds], threads: int = 0
) -> Iterator[tuple[int, str, np.ndarray]]:
    """(number of the sample, name, array) for every named value of the main graph and every sample.

    The model is left as it is. Values are taken in groups of GROUP_BYTES, so that memory is bounded whatever is asked
    for; with several groups the samples run once for each. A value that is an input is read from the feeds. Raises
    PassError for a name that the main graph does not have, InputError when onnxruntime refuses a sample.
    """
    if not feeds:
        return
    inputs = {value.name or "" for value in model.graph.inputs}
    for name in (name for name in names if name in inputs):
        for number, one in enumerate(feeds):
            yield number, name, np.asarray(one[name])
    wanted = [name for name in dict.fromkeys(names) if name not in inputs]
    for group in _groups(model, wanted, feeds[0]):
        reference = Reference(_with_outputs(model, group), threads=threads, optimized=True)
        for number, one in enumerate(feeds):
            found = reference.run(one)
            for name in group:
                yield number, name, found.pop(name)


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that computes these values of the main graph and nothing else."""
    copy = model.clone()
    known = {value.name: value for node in copy.graph for value in node.outputs}
    missing = [name for name in names if name not in known]
    if missing:
        raise PassError(f"the model has no value {missing[0]!r}")
    copy.graph.outputs.clear()
    for name in names:
        if known[name].type is None:  # onnxruntime corrects it
            known[name].type = ir.TensorType(ir.DataType.FLOAT)
        copy.graph.outputs.append(known[name])
    DeadCode().run(copy, PassContext())
    return copy


def _groups(model: ir.Model, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    """The names in groups whose values take up to GROUP_BYTES together on these inputs, or one name each."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        given = feeds.get(value.name or "")
        if value.shape is not None and given is not None:
            pairs = zip(value.shape, np.asarray(given).shape, strict=False)
            sizes.update({dim.value: size for dim, size in pairs if isinstance(dim, ir.SymbolicDim) and dim.value})
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    group: list[str] = []
    held = 0
    for name in names:
        dims = list(shapes.get(name) or [UNKNOWN_DIM] * 3)
        nbytes = 4 * math.prod(dim if isinstance(dim, int) else sizes.get(dim.value or "", UNKNOWN_DIM) for dim in dims)
        if group and held + nbytes > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += nbytes
    if group:
        yield group
