"""Keep one of several equal weights."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .. import graph
from ..base import Contract, Pass, PassContext, PassReport

CHUNK = 1 << 20
SAMPLES, SAMPLE = 16, 64  # places looked at first, bytes of each


@dataclass(frozen=True)
class DedupeInitializers(Pass):
    """Let nodes that read equal initializers read one of them; the others go.

        <float[2] a = {1, 2}, float[2] b = {1, 2}>  ->   <float[2] a = {1, 2}>
        {  Y = Add (X, a)                                {  Y = Add (X, a)
           Z = Mul (X, b)  }                                Z = Mul (X, a)  }

    Equal means type, shape and every byte. An initializer of a body (If, Loop, Scan) that equals one of the
    graph around it is taken from there. Weights in files are read in pieces of 1 MB, and only when a sample
    of their bytes agrees. Left alone: initializers that are inputs or outputs of a graph.
    """

    name: ClassVar[str] = "dedupe-initializers"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        report = self.report()
        saved = _dedupe(model.graph, [], report)
        report.stats["bytes"] = saved
        return report


def _dedupe(body: ir.Graph, outer: Sequence[ir.Value], report: PassReport) -> int:
    """Merge the initializers of `body`, then those of its subgraphs. Returns the bytes saved."""
    own = [
        value
        for value in body.initializers.values()
        if value.const_value is not None and not value.is_graph_input() and not value.is_graph_output()
    ]
    saved = 0
    kept = list(outer)
    for group in _equal([*outer, *own]):
        first, *others = group
        for value in others:
            assert value.name is not None and value.const_value is not None
            graph.replace_value(value, first)
            del body.initializers[value.name]
            saved += graph.nbytes(value.const_value)
            report.changed("dedupe", value.name, f"same as {first.name}")
    kept += [value for value in own if value.is_initializer()]
    for node in body:
        if node.attributes:
            for inner in graph.subgraphs(node):
                saved += _dedupe(inner, kept, report)
    return saved


def _equal(values: Sequence[ir.Value]) -> Iterator[list[ir.Value]]:
    """Groups of two or more values with equal tensors, in order of their first. Cheap questions go first."""
    for alike in _groups(values, _kind):
        for similar in _groups(alike, _sample):
            yield from _groups(similar, _digest)


def _groups(values: Sequence[ir.Value], key: Callable[[ir.TensorProtocol], Hashable]) -> Iterator[list[ir.Value]]:
    found: dict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in values:
        assert value.const_value is not None
        found[key(value.const_value)].append(value)
    return (group for group in found.values() if len(group) > 1)


def _kind(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.dtype, tensor.shape.numpy()


def _sample(tensor: ir.TensorProtocol) -> Hashable:
    """A few bytes from everywhere in the tensor; all of a small one."""
    size = graph.nbytes(tensor)
    if size <= SAMPLES * SAMPLE or tensor.dtype == ir.DataType.STRING:
        return b"".join(_pieces(tensor))
    offsets = np.linspace(0, size - SAMPLE, SAMPLES).astype(int).tolist()
    if isinstance(tensor, ir.ExternalTensor):
        with open(tensor.path, "rb") as file:
            start = tensor.offset or 0
            return b"".join(os.pread(file.fileno(), SAMPLE, start + at) for at in offsets)
    data = _memory(tensor)
    return b"".join(bytes(data[offset : offset + SAMPLE]) for offset in offsets)


def _digest(tensor: ir.TensorProtocol) -> bytes:
    """BLAKE2b of 256 bits: two different tensors with the same one have never been found."""
    state = hashlib.blake2b(digest_size=32)
    for piece in _pieces(tensor):
        state.update(piece)
    return state.digest()


def _pieces(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in order, at most CHUNK at a time."""
    if tensor.dtype == ir.DataType.STRING:
        for text in tensor.numpy().reshape(-1):
            data = text if isinstance(text, bytes) else str(text).encode()
            yield len(data).to_bytes(8, "little") + data
        return
    if isinstance(tensor, ir.ExternalTensor):
        left = graph.nbytes(tensor)
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset or 0)
            while left > 0 and (piece := file.read(min(CHUNK, left))):
                left -= len(piece)
                yield piece
        return
    memory = _memory(tensor)
    yield from (memory[start : start + CHUNK] for start in range(0, len(memory), CHUNK))


def _memory(tensor: ir.TensorProtocol) -> memoryview:
    """The bytes of a tensor in memory, without a copy where its layout allows."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8).data
