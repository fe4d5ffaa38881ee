"""What the benchmarks of kernels share: the number of threads, onnxruntime as a runner, the peak, and tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ..runtime.target import Target

SETTLE = 0.003  # seconds after which the other library's threads have stopped spinning
STEPS = 40_000  # of the loop that measures the peak

Runner = Callable[[], object]


def use_threads(threads: int) -> None:
    """To be called before TVM is loaded, whose own pool reads it. Threads that are bound to processors wait for
    whatever else runs there."""
    from ..runtime.tvm_step import SPIN_COUNT

    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", SPIN_COUNT)
    os.environ.setdefault("TVM_BIND_THREADS", "0")


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Meanwhile so many other processes, of the same session, compute without a pause."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 64, which no runtime has to copy again."""
    import numpy as np

    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def one_node(node: Any, feeds: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray] | None = None) -> Any:
    """A model of one node, or of several, whose result is y, of the type of the first input."""
    from onnx import helper, numpy_helper

    nodes = list(node) if isinstance(node, Sequence) else [node]
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], a.shape) for name, a in feeds.items()]
    output = helper.make_tensor_value_info("y", next(iter(kinds.values())), None)
    held = [numpy_helper.from_array(a, name) for name, a in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], held)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


class OnnxRuntime:
    """onnxruntime on arrays that are bound once. result: what the last run computed.

    profiled: a file's name without its end, beside which onnxruntime writes what each node takes.
    """

    def __init__(
        self, model: Any, feeds: Mapping[str, np.ndarray], threads: int, profiled: Path | None = None
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads stop spinning when a run ends; left to spin they take a processor from whoever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profiled is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profiled)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        # The result's memory is reused as well once its shape is known.
        first = self.session.run(None, dict(feeds))[0]
        self.result = onnxruntime.OrtValue.ortvalue_from_numpy(first)
        self.bound = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in feeds.values()]
        for name, value in zip(feeds, self.bound, strict=True):
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("y", self.result)

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def node_seconds(self, operator: str) -> list[float]:
        """What the operator's node took in every bound run so far, without what brings tensors into its layout. Ends
        the profile."""
        file = Path(self.session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        found = [
            e["dur"] * 1e-6
            for e in events
            if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["args"]["op_name"] == operator
        ]
        return found[1:]


def compiled_kernels(functions: Mapping[str, Any], target: Target) -> Any:
    """A module of TIR functions that run on the pool of artifacts."""
    import tvm

    from ..runtime.codegen import machine_code
    from ..runtime.pool import on_pool

    return on_pool(machine_code(tvm.IRModule(dict(functions)), target), target)


def peak(target: Target, threads: int) -> tuple[Runner, float]:
    """A loop of nothing but independent multiply-adds, and its floating-point operations."""
    import numpy as np
    import tvm

    from ..runtime.kernels import probes

    lanes = max(4, target.isa.lanes())
    function = probes.multiply_adds(target.isa, threads, STEPS)
    compiled = compiled_kernels({"probe": function}, target)["probe"]
    x = tvm.runtime.tensor(np.full((probes.ACCUMULATORS + 1) * lanes, 0.5, np.float32))
    y = tvm.runtime.tensor(np.zeros(threads * lanes, np.float32))
    return partial(compiled, x, y), 2.0 * threads * STEPS * probes.ACCUMULATORS * lanes


def print_head(target: Target, threads: int, columns: Sequence[str], more: str = "") -> None:
    print(f"{target.description}, caches {target.caches}, {threads} thread(s){more}")
    print_row(columns)
    print("|" + "---|" * len(columns), flush=True)


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)
