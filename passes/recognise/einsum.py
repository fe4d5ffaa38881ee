"""Einsum as a product of matrices, where attention is written so."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters

import onnx_ir as ir

from .. import graph
from .matching import Writer

# What may stand between a product and the softmax of its scores, or between the softmax and the product of its weights.
BETWEEN = ("Add", "Cast", "Div", "IsNaN", "Mul", "Softmax", "Where")
DEEPEST = 8


@dataclass(frozen=True)
class Product:
    """Orders of axes: of A as (batch ..., rows, depth), of B as (batch ..., depth, columns), of the result from (batch
    ..., rows, columns)."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    result: tuple[int, ...]


def product_of(equation: str) -> Product | None:
    """What an equation like bqhd,bkhd->bhqk says: two operands, one letter each for rows, columns and depth, batches in
    both. None for another equation."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    letters = "".join([*operands, out])
    if not arrow or len(operands) != 2 or not letters.isalpha():
        return None
    a, b = operands
    if any(len(set(part)) != len(part) for part in (a, b, out)):
        return None
    batch = [c for c in out if c in a and c in b]
    rows, columns = [c for c in out if c not in b], [c for c in out if c not in a]
    depth = [c for c in a if c in b and c not in out]
    if not len(rows) == len(columns) == len(depth) == 1:
        return None
    if set(a) != {*batch, *rows, *depth} or set(b) != {*batch, *columns, *depth}:
        return None
    whole = [*batch, *rows, *columns]
    return Product(
        tuple(a.index(c) for c in [*batch, *rows, *depth]),
        tuple(b.index(c) for c in [*batch, *depth, *columns]),
        tuple(whole.index(c) for c in out),
    )


def spelled_out(equation: str, ranks: list[int]) -> str:
    """The equation with letters for "...", where it stands for as many axes of every operand; else as it is."""
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    if len(operands) != len(ranks) or any("..." not in part for part in operands):
        return equation
    counts = {rank + 3 - len(part) for part, rank in zip(operands, ranks, strict=True)}
    free = [letter for letter in ascii_letters if letter not in equation]
    count = counts.pop()
    return equation if counts or not 0 <= count <= len(free) else equation.replace("...", "".join(free[:count]))


def attention_products(softmax: ir.Node) -> list[ir.Node]:
    """The Einsum nodes that make what a softmax is of, or take its weights."""
    found: dict[ir.Node, None] = {}
    edge = [softmax]
    for _ in range(DEEPEST):
        before = [value.producer() for node in edge for value in node.inputs if value is not None]
        found.update(dict.fromkeys(node for node in before if node is not None and graph.is_op(node, "Einsum")))
        edge = list(dict.fromkeys(node for node in before if node is not None and graph.is_op(node, *BETWEEN)))
    edge = [softmax]
    for _ in range(DEEPEST):
        behind = [node for last in edge for node, _ in last.outputs[0].uses()]
        found.update(dict.fromkeys(node for node in behind if graph.is_op(node, "Einsum")))
        edge = list(dict.fromkeys(node for node in behind if graph.is_op(node, "Cast", "IsNaN", "Where")))
    return list(found)


def write_product(node: ir.Node, scope: graph.Scope, names: graph.Names) -> bool:
    """Put transpositions and a MatMul in the place of an Einsum. Returns whether it is a product of matrices."""
    if graph.has_references(node) or len(node.inputs) != 2:
        return False
    a, b = node.inputs
    ranks = [graph.rank(a), graph.rank(b)]
    equation = str(graph.attribute(node, "equation", ""))
    product = product_of(spelled_out(equation, [rank for rank in ranks if rank is not None]))
    if product is None or a is None or b is None:
        return False
    output, writer = node.outputs[0], Writer(scope, node, names)
    back = [product.result.index(axis) for axis in range(len(product.result))]
    shape = None if output.shape is None else [output.shape[axis] for axis in back]
    left, right = writer.transpose(a, product.a), writer.transpose(b, product.b)
    made = writer.op("MatMul", left, right, dtype=output.dtype, shape=shape)
    made = writer.transpose(made, product.result)
    graph.replace_value(output, made, keep_name=True)
    graph.remove_node(node)
    return True
