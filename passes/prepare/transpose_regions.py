"""Which operators of a graph work in another order of axes, so that transpositions are spared.

A value that no Transpose made is a root; what Transposes make of it are aliases, which it takes one transposition of
the root to have, and none where the root itself lies that way. A node is relaid when it works on transposed inputs.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from .. import graph
from ..base import PassReport
from .axes import Layout, Perm, Port, Ranks, Unknown, compose, identity, inverse, layout_of

RULE = "transposes"
MOST_ORDERS = 4  # orders that are tried for a region
MOST_LOOKS = 8  # how often a node is asked whether it goes back to its old order
LAUNCH = 4 << 10  # bytes that a transposition costs besides its own
CONSTANT = 16 << 20  # bytes of a constant that may be stored in another order
VIEWS = ("Attention", "RotaryEmbedding")  # read transposed heads where they are, for nothing


@dataclass(eq=False)
class Root:
    """A value that no Transpose of this graph made, and everything that reads it or an alias of it."""

    value: ir.Value
    rank: int
    dims: tuple[int | str, ...] | None = None
    itemsize: float = 4
    free: bool = False  # a constant: stored in any order
    made_by: tuple[ir.Node, int] | None = None  # a node that may be relaid, and which output
    readers: list[tuple[ir.Node, int, Perm]] = field(default_factory=list)  # nodes that may be relaid, input, alias
    aliases: list[tuple[ir.Value, Perm]] = field(default_factory=list)
    first: dict[Perm, ir.Value] = field(default_factory=dict)  # of the aliases in each order
    order: Perm = ()  # in which it lies
    wants: Counter[Perm] = field(default_factory=Counter)  # orders in which it is read
    views: Counter[Perm] = field(default_factory=Counter)  # of these, what costs no bytes

    def bytes_of(self, perm: Perm) -> int:
        """Bytes of its transposition into the order `perm`: none when only axes of size 1 move."""
        if self.dims is None or self.views[perm] == self.wants[perm]:
            return 0
        long = [[axis for axis in order if self.dims[axis] != 1] for order in (self.order, perm)]
        return 0 if long[0] == long[1] else self.size

    @property
    def size(self) -> int:
        return 0 if self.dims is None else int(self.itemsize * math.prod(d for d in self.dims if isinstance(d, int)))

    @property
    def symbols(self) -> tuple[str, ...] | None:
        """Sizes that are not numbers; None when one has no name. Bytes compare between values of equal symbols."""
        if self.dims is None or "" in self.dims:
            return None
        return tuple(sorted(d for d in self.dims if isinstance(d, str)))

    def ends(self) -> list[ir.Node]:
        """The nodes at it that may be relaid."""
        return [reader for reader, _, _ in self.readers] + ([self.made_by[0]] if self.made_by else [])

    def cost(self) -> tuple[int, int]:
        """Transpositions, and their bytes."""
        if self.free:
            return 0, 0
        other = [perm for perm, count in self.wants.items() if count and perm != self.order]
        return len(other), sum(self.bytes_of(perm) for perm in other)

    def want(self, perm: Perm, count: int) -> None:
        self.wants[perm] += count
        if not self.wants[perm]:
            del self.wants[perm]


def _live(body: ir.Graph) -> set[ir.Node]:
    """The nodes that an output depends on; others are no reason to transpose anything."""
    live: set[ir.Node] = set()
    for node in reversed(body):
        for value in node.outputs:
            if value.is_graph_output() or any(user in live or user.graph is not body for user, _ in value.uses()):
                live.add(node)
                break
    return live


class Body:
    """One graph: what may be relaid, and what is."""

    def __init__(self, scope: graph.Scope, report: PassReport) -> None:
        self.scope, self.report = scope, report
        self.ranks = Ranks()
        self.perms: dict[ir.Node, Perm] = {}
        self.alias: dict[ir.Value, tuple[ir.Value, Perm]] = {}
        self.layouts: dict[ir.Node, Layout] = {}
        self.unknown: dict[ir.Node, str] = {}
        self.roots: dict[ir.Value, Root] = {}
        self.label: dict[ir.Node, Perm] = {}
        self.steps = 0
        self.live = _live(scope.graph)
        self._read()

    # --- reading

    def _read(self) -> None:
        for node in self.scope.graph:
            if not graph.is_op(node, "Transpose") or graph.has_references(node) or node.inputs[0] is None:
                continue
            perm, known = graph.attribute(node, "perm"), self.ranks.get(node.inputs[0])
            if perm is None and known is not None:
                perm = range(known)[::-1]
            if perm is not None and sorted(perm) == list(range(len(perm))) and known in (None, len(perm)):
                self.perms[node] = tuple(perm)
                self.ranks.found[node.inputs[0]] = self.ranks.found[node.outputs[0]] = len(perm)
        for node in self.scope.graph:
            if node in self.perms:
                source = node.inputs[0]
                assert source is not None
                root, before = self.alias.get(source, (source, identity(len(self.perms[node]))))
                self.alias[node.outputs[0]] = root, compose(before, self.perms[node])
                continue
            if node not in self.live:
                continue
            try:
                found = layout_of(node, self.scope.opset, self.ranks)
            except Unknown as reason:
                self.unknown[node] = str(reason)
                continue
            if found is not None:
                self.layouts[node] = found
        for value, (_, perm) in self.alias.items():
            found_root = self.root(value)
            if found_root is not None:
                found_root.aliases.append((value, perm))
                found_root.first.setdefault(perm, value)
        for node in self.scope.graph:
            if node not in self.perms and node in self.live:
                self._read_node(node)
        for known_root in list(self.roots.values()):
            self._read_others(known_root)

    def _read_node(self, node: ir.Node) -> None:
        layout = self.layouts.get(node)
        for index, value in enumerate(node.inputs):
            root = self.root(value)
            if root is None or value is None or (graph.is_op(node, "Shape") and not graph.has_references(node)):
                continue
            before = self.before(value, root)
            root.want(before, 1)
            if graph.is_op(node, *VIEWS):
                root.views[before] += 1
            if layout is not None and index < len(layout.inputs) and layout.inputs[index] is not None:
                root.readers.append((node, index, before))
        for index, value in enumerate(node.outputs):
            if layout is not None and layout.outputs[index] is not None and (made := self.root(value)) is not None:
                made.made_by = node, index

    def _read_others(self, root: Root) -> None:
        """Graph outputs, and nodes of inner graphs."""
        for value, before in [(root.value, identity(root.rank)), *root.aliases]:
            outside = value.is_graph_output() and value.graph is self.scope.graph
            if outside or any(user.graph is not self.scope.graph for user, _ in value.uses()):
                root.want(before, 1)

    def root(self, value: ir.Value | None) -> Root | None:
        """The root of a value; None where its rank is not known."""
        if value is None:
            return None
        source, _ = self.alias.get(value, (value, ()))
        found = self.roots.get(source)
        if found is not None or (rank := self.ranks.get(source)) is None:
            return found
        found = Root(source, rank, order=identity(rank))
        tensor = graph.constant_tensor(source)
        found.free = tensor is not None and graph.nbytes(tensor) <= CONSTANT
        if source.shape is not None:
            found.dims = tuple(d if isinstance(d, int) else str(d.value or "") for d in source.shape)
        if source.dtype is not None and source.dtype != ir.DataType.STRING:
            found.itemsize = source.dtype.bitwidth / 8
        self.roots[source] = found
        return found

    def before(self, value: ir.Value, root: Root) -> Perm:
        """How `value` is transposed from its root."""
        return self.alias[value][1] if value is not root.value else identity(root.rank)

    def ports(self, node: ir.Node) -> Iterator[tuple[Root, Port, Perm | None]]:
        """For every tensor of the node: its root, its axes and, when it is read, the alias that is read."""
        layout = self.layouts[node]
        for value, port in zip(node.inputs, layout.inputs, strict=False):
            if port is not None and value is not None and (root := self.root(value)) is not None:
                yield root, port, self.before(value, root)
        for value, port in zip(node.outputs, layout.outputs, strict=False):
            if port is not None and (root := self.roots.get(value)) is not None:
                yield root, port, None

    # --- deciding

    def decide(self) -> None:
        done: set[ir.Node] = set()
        for seed in list(self.layouts):
            if seed not in done and self._starts(seed):
                self._region(self._connected(seed, done))
        self._explain()

    def _starts(self, node: ir.Node) -> bool:
        """Whether a Transpose is next to the node."""
        return any(root.aliases and not root.free for root, _, _ in self.ports(node))

    def _connected(self, seed: ir.Node, done: set[ir.Node]) -> list[ir.Node]:
        """The order-insensitive nodes that values join with `seed`."""
        done.add(seed)
        found, seen = [seed], set()
        for node in found:
            for root, _, _ in self.ports(node):
                if root.free or root in seen:
                    continue
                seen.add(root)
                ends = root.ends()
                self.steps += len(ends)
                for other in ends:
                    if other not in done:
                        done.add(other)
                        found.append(other)
        return found

    def _seeds(self, nodes: list[ir.Node]) -> Iterator[tuple[ir.Node, Perm]]:
        """A node at the border and the order of it that spares the Transpose there."""
        for node in nodes:
            layout = self.layouts[node]
            for root, port, read in self.ports(node):
                if root.free:
                    continue
                wanted = [inverse(read)] if read is not None else list(root.first)[:MOST_ORDERS]
                for order in wanted:
                    perm = port.reference(order, layout.rank)
                    if perm is not None and perm != identity(layout.rank) and layout.allows(perm):
                        yield node, perm

    def _region(self, nodes: list[ir.Node]) -> None:
        touched = {root for node in nodes for root, _, _ in self.ports(node)}
        counted = {root.symbols for root in touched if not root.free}
        self.bytes_known = len(counted) == 1 and None not in counted
        tried: set[tuple[ir.Node, Perm]] = set()
        orders = 0
        for node, perm in self._seeds(nodes):
            if node in self.label or (node, perm) in tried:
                continue
            orders += 1
            if orders > MOST_ORDERS:
                break
            proposal = self._spread(node, perm)
            tried.update(proposal.items())
            self._settle(proposal)

    def _spread(self, seed: ir.Node, perm: Perm) -> dict[ir.Node, Perm]:
        """The orders of all nodes that follow when `seed` is relaid and no Transpose is put between two of them."""
        found = {seed: perm}
        queue, seen = deque([seed]), set()
        while queue:
            node = queue.popleft()
            for root, port, read in self.ports(node):
                if root.free or root in seen:
                    continue
                seen.add(root)
                own = port.order(found[node])
                order = own if read is None else compose(read, own)
                ends = [(r, self.layouts[r].inputs[i], compose(inverse(b), order)) for r, i, b in root.readers]
                if root.made_by is not None:
                    maker, index = root.made_by
                    ends.append((maker, self.layouts[maker].outputs[index], order))
                self.steps += len(ends)
                for other, end, wanted in ends:
                    if other in found or other in self.label or end is None:
                        continue
                    layout = self.layouts[other]
                    new = end.reference(wanted, layout.rank)
                    if new is not None and new != identity(layout.rank) and layout.allows(new):
                        found[other] = new
                        queue.append(other)
        return found

    def _relabel(self, node: ir.Node, perm: Perm | None) -> None:
        """Give the node an order, None its old one, and count what its roots are wanted in."""
        old = self.label.pop(node, None)
        if perm is not None:
            self.label[node] = perm
        for root, port, read in self.ports(node):
            before, after = (identity(len(port.axes)) if p is None else port.order(p) for p in (old, perm))
            if read is None:
                root.order = after
            else:
                root.want(compose(read, before), -1)
                root.want(compose(read, after), 1)
        self.steps += 1

    def _roots(self, nodes: Iterable[ir.Node]) -> dict[Root, None]:
        return dict.fromkeys(root for node in nodes for root, _, _ in self.ports(node) if not root.free)

    def _cost(self, roots: Iterable[Root]) -> tuple[int, int]:
        counts = [root.cost() for root in roots]
        return sum(count for count, _ in counts), sum(size for _, size in counts)

    def _weight(self, cost: tuple[int, int]) -> int:
        return cost[1] + LAUNCH * cost[0] if self.bytes_known else cost[0]

    def _better(self, new: tuple[int, int], old: tuple[int, int]) -> bool:
        if not self.bytes_known:
            return new[0] < old[0]
        return new[0] <= old[0] and new[1] <= old[1] and new != old

    def _settle(self, proposal: dict[ir.Node, Perm]) -> None:
        """Relay the parts of the proposal that gain by it."""
        before = {root: root.cost() for root in self._roots(proposal)}
        for node, perm in proposal.items():
            self._relabel(node, perm)
        self._shrink(proposal)
        for part in self._parts([node for node in proposal if node in self.label]):
            roots = self._roots(part)
            old = (sum(before[root][0] for root in roots), sum(before[root][1] for root in roots))
            if not self._better(self._cost(roots), old):
                for node in part:
                    self._relabel(node, None)

    def _shrink(self, proposal: dict[ir.Node, Perm]) -> None:
        """Let nodes go back to their old order, from the border inwards, where that costs nothing."""
        groups = self._groups(proposal)
        looks: Counter[int] = Counter()
        told: Counter[Root] = Counter()
        queue = deque(dict.fromkeys(groups[node][0] for node in proposal))
        members = {number: nodes for number, nodes in groups.values()}
        waiting = set(queue)
        while queue:
            number = queue.popleft()
            waiting.discard(number)
            looks[number] += 1
            nodes = members[number]
            roots = self._roots(nodes)
            old = self._weight(self._cost(roots))
            for node in nodes:
                self._relabel(node, None)
            if self._weight(self._cost(roots)) > old:
                for node in nodes:
                    self._relabel(node, proposal[node])
                continue
            for root in roots:
                told[root] += 1
                if told[root] > MOST_LOOKS:
                    continue
                ends = root.ends()
                self.steps += len(ends)
                for end in ends:
                    other = groups[end][0] if end in groups else number
                    if end in self.label and other not in waiting and looks[other] < MOST_LOOKS:
                        waiting.add(other)
                        queue.append(other)

    def _groups(self, proposal: dict[ir.Node, Perm]) -> dict[ir.Node, tuple[int, list[ir.Node]]]:
        """Nodes that best go together: one that only reads what it makes no smaller goes with its only reader."""
        follows: dict[ir.Node, ir.Node] = {}
        for node in proposal:
            ports = [entry for entry in self.ports(node) if not entry[0].free]
            if len(ports) != 2 or ports[1][2] is not None or ports[0][0] is ports[1][0]:
                continue
            source, made = ports[0][0], ports[1][0]
            alone = len(made.readers) == 1 and sum(made.wants.values()) == 1 and made.readers[0][0] in proposal
            if alone and made.readers[0][2] == identity(made.rank) and made.size >= source.size:
                follows[node] = made.readers[0][0]
        groups: dict[ir.Node, tuple[int, list[ir.Node]]] = {}
        for node in proposal:
            chain = [node]
            while chain[-1] in follows and chain[-1] not in groups:
                chain.append(follows[chain[-1]])
            group = groups.get(chain[-1], (len(groups), []))
            for one in chain:
                if one not in groups:
                    groups[one] = group
                    group[1].append(one)
        return groups

    def _parts(self, nodes: list[ir.Node]) -> list[list[ir.Node]]:
        """The nodes in parts that no value joins, whose costs are independent."""
        touching: dict[Root, list[ir.Node]] = {}
        for node in nodes:
            for root in self._roots([node]):
                touching.setdefault(root, []).append(node)
        parts, done, seen = [], set(), set()
        for start in nodes:
            if start in done:
                continue
            done.add(start)
            part = [start]
            for node in part:
                for root in self._roots([node]):
                    if root in seen:
                        continue
                    seen.add(root)
                    for other in touching[root]:
                        if other not in done:
                            done.add(other)
                            part.append(other)
            parts.append(part)
        return parts

    def _explain(self) -> None:
        """Why Transposes next to order-insensitive operators stay."""
        for node in self.perms:
            if node not in self.live:
                continue
            output = node.outputs[0]
            users = [user for user, _ in output.uses()]
            source = self.alias[output][0]
            maker = source.producer()
            near = [*users, *([maker] if maker is not None else [])]
            blocked = next((n for n in near if n in self.unknown), None)
            if blocked is not None:
                reason = f"{blocked.op_type} {graph.site(blocked)}: {self.unknown[blocked]}; run infer-shapes first"
                self.report.skipped(RULE, graph.site(node), reason)
            elif any(n in self.layouts for n in near) and not any(n in self.label for n in near):
                self.report.skipped(RULE, graph.site(node), "moving it would leave as many transpositions")
