"""How fast fused attention is against onnxruntime's: MatMul, Softmax, MatMul, and its own fused operator.

    python -m graphwright.tools.bench_attention                  all shapes, one thread
    python -m graphwright.tools.bench_attention --threads 2 --json attention.json
    python -m graphwright.tools.bench_attention --shape 8x1024x64

All run in one process on the same arrays, bound once, in turn, with a loop of nothing but fused multiply-adds between
them. GFLOP/s count 4 · heads · queries · keys · size for the two products, causal or not; a causal kernel does half of
that, so its figure may exceed the peak. The ratios are onnxruntime's time over the kernel's, pair by pair, with the
10th and 90th percentile. `MultiHeadAttention` (com.microsoft) has no causal, grouped form.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.target import Target

SETTLE = 0.003  # seconds after which the other library's threads have stopped spinning
ROUNDS = 100_000  # of the loop that measures the peak

Runner = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """heads x queries x size; keys and key heads as many unless given."""

    heads: int
    queries: int
    size: int
    keys: int = 0
    kv_heads: int = 0
    causal: bool = False

    @classmethod
    def parse(cls, text: str) -> Shape:
        heads, queries, size, keys, kv_heads = [*map(int, text.split("x")), 0, 0][:5]
        return cls(heads, queries, size, keys, kv_heads)
    note: str = ""

    @property
    def flops(self) -> float:
        return 4.0 * self.heads * self.queries * (self.keys or self.queries) * self.size

    def __str__(self) -> str:
        keys = f" over {self.keys} keys" if self.keys else ""
        shared = f"/{self.kv_heads}" if self.kv_heads else ""
        return f"{self.heads}{shared} x {self.queries} x {self.size}{keys}{' causal' if self.causal else ''}"


SHAPES = [
    Shape(8, 1024, 64),
    Shape(12, 128, 32, note="MiniLM"),
    Shape(3, 197, 64, note="ViT tiny"),
    Shape(6, 197, 64, note="ViT small"),
    Shape(9, 128, 64, kv_heads=3, causal=True, note="SmolLM2"),
    Shape(9, 1, 64, keys=2048, kv_heads=3, note="one token"),
    Shape(32, 1, 128, keys=4096, kv_heads=8, note="one token"),
]


def kernel(shape: Shape, target: Target, threads: int) -> Callable[..., None]:
    import tvm

    from ..runtime.kernels.attention import attention
    from ..runtime.kernels.attention_spec import AttentionSpec, Causal

    spec = AttentionSpec(
        shape.heads, shape.size, shape.size**-0.5, 1, shape.queries, shape.keys or shape.queries,
        kv_heads=shape.kv_heads, causal=Causal.END if shape.causal else Causal.NO,
    )  # fmt: skip
    function = attention(spec, target.isa, target.caches, threads, "attention")
    return tvm.compile(tvm.IRModule({"attention": function}), target.tvm())["attention"]


def peak(target: Target) -> tuple[Runner, float]:
    """A loop of independent fused multiply-adds on one thread, and its floating-point operations."""
    import numpy as np
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from ..runtime.kernels.vectors import Vectors

    v = Vectors(target.isa)
    count = 24 if v.wide else 12
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("peak")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        y = T.match_buffer(T.arg("y", T.handle()), (count * v.lanes,), "float32")
        with T.sblock("root"), v.prelude():
            sums = [v.registers(1, 0.5) for _ in range(count)]
            x = v.load(y, 0)
            with T.serial(ROUNDS):
                for s in sums:
                    T.buffer_store(s, v.fma(s[v.at(0)], x, x), [v.at(0)])
            for i, s in enumerate(sums):
                v.store(y, i * v.lanes, s[v.at(0)])
    compiled = tvm.compile(tvm.IRModule({"peak": builder.get()}), target.tvm())["peak"]
    halves = tvm.runtime.tensor(np.full(count * v.lanes, 0.5, np.float32))
    return partial(compiled, halves), 2.0 * count * v.lanes * ROUNDS


def onnxruntime_runner(model: Any, feeds: dict[str, np.ndarray], threads: int) -> tuple[Runner, Any]:
    """A model with one output on arrays that are bound once, and its result."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads stop spinning when a run ends; left to spin they take a processor from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    bound = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in feeds.values()]
    for name, value in zip(feeds, bound, strict=True):
        binding.bind_ortvalue_input(name, value)
    shape = [int(d) for d in session.get_outputs()[0].shape]
    result = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
    binding.bind_ortvalue_output("y", result)

    def run(keep: Any = (bound, result)) -> None:
        session.run_with_iobinding(binding)

    return run, result


def decomposed(shape: Shape, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """MatMul, Add of a causal mask, Softmax, MatMul with what depends on weights or constants done beforehand."""
    import numpy as np
    from onnx import helper, numpy_helper

    feeds = dict(arrays)
    group = shape.heads // (shape.kv_heads or shape.heads)
    feeds["k"] = np.ascontiguousarray(np.repeat(arrays["k"], group, axis=1).transpose(0, 1, 3, 2))
    feeds["v"] = np.repeat(arrays["v"], group, axis=1)
    feeds["q"] = arrays["q"] * np.float32(shape.size**-0.5)
    keys = shape.keys or shape.queries
    late = np.triu(np.ones((shape.queries, keys), bool), 1 + keys - shape.queries)
    constants = [numpy_helper.from_array(np.where(late, -np.inf, 0).astype(np.float32), "mask")]
    nodes = [helper.make_node("MatMul", ["q", "k"], ["s"])]
    if shape.causal:
        nodes.append(helper.make_node("Add", ["s", "mask"], ["m"]))
    nodes.append(helper.make_node("Softmax", [nodes[-1].output[0]], ["p"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["p", "v"], ["y"]))
    return _model(nodes, feeds, arrays["q"].shape, constants if shape.causal else []), feeds


def fused(shape: Shape, arrays: dict[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    """onnxruntime's MultiHeadAttention on (batch, sequence, heads · size)."""
    import numpy as np
    from onnx import helper

    def merged(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.transpose(0, 2, 1, 3).reshape(1, a.shape[2], -1))

    feeds = {name: merged(a) for name, a in arrays.items()}
    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=shape.heads,
        scale=float(shape.size**-0.5),
    )  # fmt: skip
    return _model([node], feeds, feeds["q"].shape, []), feeds


def _model(
    nodes: Sequence[Any], feeds: dict[str, np.ndarray], result: tuple[int, ...], constants: Sequence[Any]
) -> Any:
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, result)
    graph = helper.make_graph(list(nodes), "g", inputs, [output], list(constants))
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def take_turns(runners: dict[str, Runner], settle: float, budget: float) -> dict[str, list[float]]:
    """Seconds of each runner, turn by turn: the median of as many runs as take about a millisecond."""
    repeats = {}
    for name, run in runners.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(50, int(1e-3 / max(1e-9, time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    while len(times["kernel"]) < 9 or time.perf_counter() - start < budget:
        for name, run in runners.items():
            if settle:
                time.sleep(settle)
            run()
            turn = []
            for _ in range(repeats[name]):
                begin = time.perf_counter()
                run()
                turn.append(time.perf_counter() - begin)
            times[name].append(sorted(turn)[len(turn) // 2])
    return times


def measure(shape: Shape, target: Target, threads: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    import numpy as np
    import tvm

    from ..runtime.measure import Spread

    random = np.random.default_rng(0)
    keys, shared = shape.keys or shape.queries, shape.kv_heads or shape.heads
    sizes = {"q": (shape.heads, shape.queries), "k": (shared, keys), "v": (shared, keys)}
    arrays = {n: random.standard_normal((1, *s, shape.size)).astype(np.float32) for n, s in sizes.items()}
    tensors = [tvm.runtime.tensor(a) for a in (*arrays.values(), np.zeros_like(arrays["q"]))]
    runners: dict[str, Runner] = {"kernel": partial(kernel(shape, target, threads), *tensors)}
    expected: Any = None
    for name, build in (("decomposed", decomposed), ("fused", fused)):
        if name == "fused" and (shape.causal or shape.kv_heads):
            continue
        runners[name], output = onnxruntime_runner(*build(shape, arrays), threads)
        if expected is None:
            runners[name]()
            expected = output.numpy()
    runners["kernel"]()
    error = float(np.abs(tensors[3].numpy() - expected).max())
    runners["peak"], flops = peak(target)
    times = take_turns(runners, SETTLE if threads > 1 else 0.0, budget)
    rate = {name: Spread.of([shape.flops / t / 1e9 for t in ts]).to_json() for name, ts in times.items()}
    rate["peak"] = Spread.of([flops / t / 1e9 for t in times["peak"]]).to_json()
    ratios = {
        name: Spread.of([a / b for a, b in zip(times[name], times["kernel"], strict=True)]).to_json()
        for name in times
        if name not in ("kernel", "peak")
    }
    moved = sum(a.nbytes for a in arrays.values()) + arrays["q"].nbytes
    microseconds = Spread.of([t * 1e6 for t in times["kernel"]]).to_json()
    return {
        "shape": str(shape), "note": shape.note, "gflops": rate, "microseconds": microseconds, "ratio": ratios,
        "gigabytes_per_second": moved / microseconds["median"] / 1e3, "difference": error,
    }  # fmt: skip


HEADER = ["heads x queries x size", "", "us", "GFLOP/s", "peak of a core", "GB/s", "over MatMul, Softmax", "over fused"]


def line(row: dict[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"][name]) if name in row["ratio"] else "-"

    rates = [f"{row['gflops'][name]['median']:.0f}" for name in ("kernel", "peak")]
    time_ = f"{row['microseconds']['median']:.1f}"
    return [row["shape"], row["note"], time_, *rates, f"{row['gigabytes_per_second']:.1f}", spread("decomposed"),
            spread("fused")]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--shape", action="append", metavar="HEADSxQUERIESxSIZE", help="only this; may be given again")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each shape")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    # Read when the library is loaded. Threads that are bound to processors wait for whatever else runs there.
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    from ..runtime.target import Target

    target = Target.named("cpu")
    shapes = [Shape.parse(text) for text in options.shape] if options.shape else SHAPES
    print(f"{target.description}, caches {target.caches}, {options.threads} thread(s)")
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER), flush=True)
    results = []
    for shape in shapes:
        results.append(measure(shape, target, options.threads, options.seconds))
        print("| " + " | ".join(line(results[-1])) + " |", flush=True)
    if options.json:
        document = {"target": target.to_json(), "threads": options.threads, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
