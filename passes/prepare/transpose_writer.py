"""Writes into a graph which of its operators work in another order of axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import graph
from .axes import Editor, Perm, compose, identity, inverse
from .transpose_regions import RULE, Body, Root

Source = tuple[Root, Perm, tuple[int, ...]]  # the root, the order, axes of size 1 to add


class Writer:
    """Writes the decisions of a body into its graph."""

    def __init__(self, body: Body, names: graph.Names) -> None:
        self.body, self.names, self.scope = body, names, body.scope
        self.place = {node: i for i, node in enumerate(self.scope.graph)}
        self.made: dict[tuple[Root, Perm], ir.Value] = {}
        self.spread: dict[tuple[ir.Value, Perm, tuple[int, ...]], ir.Value] = {}

    def write(self) -> None:
        body = self.body
        touched = dict.fromkeys(root for node in body.label for root, _, _ in body.ports(node))
        plan = {node: self._sources(node) for node in body.label}
        shapes = [found for node in self.scope.graph if (found := self._lost_shape(node, touched)) is not None]
        sites = {node: graph.site(node) for node in body.label}
        plain = {root: self._lay(root) for root in touched if root.order != identity(root.rank)}
        for node in sorted(plan, key=self.place.__getitem__):
            for index, source in enumerate(plan[node]):
                if source is not None:
                    node.replace_input_with(index, self._given(*source, node))
            body.layouts[node].rewrite(Editor(node, self.scope, self.names), body.label[node])
            detail = f"{node.op_type} works in the order {list(body.label[node])}"
            body.report.changed(RULE, sites[node], detail)
        for node, root, before in shapes:
            self._write_shape(node, root, before)
        for root in touched:
            self._write_aliases(root)
        for root, value in plain.items():
            self._drop_unused(root, value)

    def _sources(self, node: ir.Node) -> list[Source | None]:
        """What each input is to be."""
        body = self.body
        sources: list[Source | None] = []
        for value, port in zip(node.inputs, body.layouts[node].inputs, strict=False):
            root = body.root(value) if port is not None else None
            if root is None or port is None or value is None:
                sources.append(None)
                continue
            perm = body.label[node]
            order = compose(body.before(value, root), port.order(perm))
            sources.append((root, order, port.missing(perm)))
        return sources

    def _lay(self, root: Root) -> ir.Value:
        """Let the root lie in its new order. What read it reads a Transpose of it for now, which has its name."""
        value, maker = root.value, root.value.producer()
        assert maker is not None
        back = ir.Node("", "Transpose", [None], [ir.AttrInt64s("perm", list(inverse(root.order)))], name="")
        plain, name = back.outputs[0], value.name
        self.scope.graph.insert_after(maker, back)
        graph.replace_value(value, plain, keep_name=True)
        back.replace_input_with(0, value)
        value.name = self.names.fresh(f"{name}_transposed")
        if value.shape is not None:
            dims = list(value.shape)
            value.shape = ir.Shape([dims[axis] for axis in root.order])
        self.made[root, identity(root.rank)] = plain
        return plain

    def _given(self, root: Root, order: Perm, missing: tuple[int, ...], node: ir.Node) -> ir.Value:
        """The root in that order, with axes of size 1 where they are missing."""
        if root.free:
            return self._constant(root, order, missing, node)
        value = self._ordered(root, order, node)
        if not missing:
            return value
        key = value, order, missing
        if key not in self.spread:
            inputs: list[ir.Value | None] = [value]
            attributes = []
            if self.scope.opset >= 13:
                name = self.names.fresh(f"{value.name}_axes")
                inputs.append(graph.add_constant(self.scope, node, name, np.array(missing, np.int64)))
            else:
                attributes.append(ir.AttrInt64s("axes", list(missing)))
            new = ir.Node("", "Unsqueeze", inputs, attributes, name="")
            out = new.outputs[0]
            out.name, out.type = self.names.fresh(f"{value.name}_unsqueezed"), value.type
            if value.shape is not None:
                out.shape = ir.Shape(_with_ones(list(value.shape), missing))
            self.scope.graph.insert_before(node, new)
            self.spread[key] = out
        return self.spread[key]

    def _constant(self, root: Root, order: Perm, missing: tuple[int, ...], node: ir.Node) -> ir.Value:
        """A constant stored in that order."""
        if order == identity(root.rank) and not missing:
            return root.value
        key = root.value, order, missing
        if key not in self.spread:
            tensor = graph.constant_tensor(root.value)
            assert tensor is not None
            dims = _with_ones([tensor.shape.numpy()[axis] for axis in order], missing)
            name = self.names.fresh(f"{root.value.name}_transposed")

            def stored() -> ir.Tensor:
                array = np.ascontiguousarray(tensor.numpy().transpose(order)).reshape(dims)
                return ir.Tensor(array, dtype=tensor.dtype, name=name)

            lazy = graph.nbytes(tensor) > graph.SMALL
            new = ir.LazyTensor(stored, dtype=tensor.dtype, shape=ir.Shape(dims), name=name) if lazy else stored()
            self.spread[key] = graph.add_constant(self.scope, node, name, new)
        return self.spread[key]

    def _ordered(self, root: Root, order: Perm, node: ir.Node) -> ir.Value:
        """The root in that order: itself, a Transpose that is there before `node`, or a new one."""
        if order == root.order:
            return root.value
        if (root, order) in self.made:
            return self.made[root, order]
        there = root.first.get(order) if root.order == identity(root.rank) else None
        maker = None if there is None else there.producer()
        if there is not None and maker is not None and self.place[maker] < self.place[node]:
            return there
        perm = compose(inverse(root.order), order)
        new = ir.Node("", "Transpose", [root.value], [ir.AttrInt64s("perm", list(perm))], name="")
        value = new.outputs[0]
        value.name, value.type = self.names.fresh(f"{root.value.name}_transposed"), root.value.type
        if root.value.shape is not None:
            dims = list(root.value.shape)
            value.shape = ir.Shape([dims[axis] for axis in perm])
        maker = root.value.producer()
        if maker is not None and maker.graph is self.scope.graph:
            self.scope.graph.insert_after(maker, new)
        else:
            self.scope.graph.insert_before(node, new)
        self.made[root, order] = value
        return value

    def _lost_shape(self, node: ir.Node, touched: dict[Root, None]) -> tuple[ir.Node, Root, Perm] | None:
        """A Shape of a value that nothing else needs in that order."""
        if not graph.is_op(node, "Shape") or graph.has_references(node):
            return None
        value = node.inputs[0]
        root = self.body.root(value)
        if root is None or value is None or root not in touched or root.free:
            return None
        before = self.body.before(value, root)
        return None if before == root.order or root.wants[before] else (node, root, before)

    def _write_shape(self, node: ir.Node, root: Root, before: Perm) -> None:
        """The shape from that of the root, in the order in which it lies."""
        start, end = graph.attribute(node, "start", 0), graph.attribute(node, "end")
        picked = compose(inverse(root.order), before)[start:end]
        name = graph.site(node)
        whole = ir.Node("", "Shape", [root.value], name="")
        indices = graph.add_constant(self.scope, node, self.names.fresh(f"{name}_order"), np.array(picked, np.int64))
        gather = ir.Node("", "Gather", [whole.outputs[0], indices], [ir.AttrInt64("axis", 0)], name="")
        for new, stem, count in ((whole, "whole", root.rank), (gather, "ordered", len(picked))):
            new.outputs[0].name = self.names.fresh(f"{name}_{stem}")
            new.outputs[0].type, new.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([count])
        self.scope.graph.insert_before(node, [whole, gather])
        graph.keep_metadata(node, gather)
        graph.replace_value(node.outputs[0], gather.outputs[0], keep_name=True)
        graph.remove_node(node)

    def _write_aliases(self, root: Root) -> None:
        """Transposes of the root: those that nothing reads go, the others read it in the order in which it lies."""
        self._remove_unused(root)
        for value, before in root.aliases:
            maker = value.producer()
            if maker is None or maker.graph is None:
                continue
            if not value.is_graph_output() and all(user in self.body.perms for user, _ in value.uses()):
                continue  # its users are aliases, which come to read the root
            if before == root.order:
                graph.replace_value(value, root.value)
            elif (root, before) in self.made:
                graph.replace_value(value, self.made[root, before])
            elif root.order != identity(root.rank):
                maker.replace_input_with(0, root.value)
                maker.attributes.add(ir.AttrInt64s("perm", list(compose(inverse(root.order), before))))
                self.made[root, before] = value
        self._remove_unused(root)

    def _remove_unused(self, root: Root) -> None:
        for value, _ in reversed(root.aliases):
            maker = value.producer()
            if maker is not None and maker.graph is not None and not graph.is_used(value):
                graph.remove_node(maker)

    def _drop_unused(self, root: Root, plain: ir.Value) -> None:
        """The Transpose that gave back the root in its old order, when nothing reads that."""
        maker = plain.producer()
        if maker is None or graph.is_used(plain):
            return
        name, plain.name = plain.name, None
        graph.remove_node(maker)
        if not root.value.is_graph_output():
            root.value.name = name


def _with_ones(dims: list, missing: tuple[int, ...]) -> list:
    for axis in missing:
        dims.insert(axis, 1)
    return dims
