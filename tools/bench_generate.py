"""How fast a compiled generator reads prompts and writes tokens, against onnxruntime and against the machine's memory.

    python -m graphwright.tools.bench_generate COMPILED ONNX_FOLDER [--threads N]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.turns import medians, take_turns
from .turns import SETTLE, print_row, use_threads

if TYPE_CHECKING:
    from ..runtime.decoders import Decoder, Logits
    from ..runtime.generator_folder import GeneratorFolder

HEADER = ["call", "ms", "onnxruntime", "ratio", "least ms", "of limit"]
PROMPT = 128  # tokens
POSITIONS = (16, 1024)
OVERHEAD = 60e6  # bytes that a process may hold besides weights and cache


def weight_bytes(path: Path) -> int:
    """Bytes of the weights that one run of an ONNX file reads: all but tables that only Gather takes rows from, as they
    are stored or widened by a Cast."""
    import onnx
    import onnx_ir as ir

    graph = onnx.load(path, load_external_data=False).graph
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        if node.op_type != "Cast":
            for name in node.input:
                readers.setdefault(casts.get(name, name), set()).add(node.op_type)
    total = 0
    for tensor in graph.initializer:
        if readers.get(tensor.name, {"Gather"}) != {"Gather"}:
            total += -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    return total


def calls(folder: GeneratorFolder, decoder: Decoder) -> dict[str, Callable[[], Logits]]:
    """What is timed, by name: a prompt from the beginning, and one token at each of POSITIONS."""
    import numpy as np

    draw = np.random.default_rng(0)
    capacity = folder.about.capacity
    ids = draw.integers(0, folder.about.vocabulary, capacity).tolist()
    for at in range(0, capacity - 1, PROMPT):  # the cache holds what the model made
        part = ids[at : min(at + PROMPT, capacity)]
        decoder.extend(part, at, [len(part) - 1])
    length = min(PROMPT, capacity)
    tokens = ids[: folder.about.decode_tokens]
    found: dict[str, Callable[[], Logits]] = {
        f"{length} tokens of prompt": lambda: decoder.extend(ids[:length], 0, [length - 1])
    }
    for position in POSITIONS:
        if position + len(tokens) <= capacity:
            name = f"token at {position}"
            found[name] = lambda p=position: decoder.extend(tokens, p, [len(tokens) - 1])  # type: ignore[misc]
    return found


def measure(compiled: GeneratorFolder, source: GeneratorFolder, threads: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each of `calls`. Raises AssertionError when the two disagree."""
    import numpy as np

    from ..passes.io import load
    from ..runtime import wavering
    from ..runtime.decoders import decoder
    from ..runtime.generator_folder import DECODE
    from ..runtime.measure import Spread
    from ..runtime.peaks import moving
    from ..runtime.target import Target

    ours, theirs = (
        calls(folder, decoder(folder, backend, threads))
        for folder, backend in ((compiled, "tvm"), (source, "onnxruntime"))
    )
    read, read_bytes = moving("read", Target.named("cpu"), threads)
    limit = wavering.least(load(source.model(DECODE))) or 1e-4
    nbytes = weight_bytes(source.model(DECODE))
    cached = 8 * math.prod(source.about.cache_shape[1:]) // source.about.capacity * source.about.layers
    errors = {}
    for name, call in ours.items():
        expected, got = theirs[name]()[0], call()[0]
        errors[name] = float(np.abs(got - expected).max() / np.abs(expected).max())
        assert errors[name] < limit, f"{name}: the backends differ by {errors[name]:.1e} of the largest logit"
    rows = []
    tokens = [name for name in ours if name.startswith("token")]
    for group in ([name for name in ours if name not in tokens], tokens):
        runners: dict[tuple[str, str], Callable[[], object]] = {("memory", ""): read}
        for name in group:
            runners |= {("ours", name): ours[name], ("theirs", name): theirs[name]}
        times = medians(take_turns(runners, SETTLE if threads > 1 else 0, seconds * len(group)))
        for name in group:
            own, other = times["ours", name], times["theirs", name]
            row = {
                "call": name,
                "milliseconds": Spread.of([1e3 * t for t in own]).to_json(),
                "onnxruntime": Spread.of([1e3 * t for t in other]).to_json(),
                "ratio": Spread.of([b / a for a, b in zip(own, other, strict=True)]).to_json(),
                "error": errors[name],
            }
            if name in tokens:
                share = (nbytes + cached * int(name.rpartition(" ")[2])) / read_bytes
                least = [share * t for t in times["memory", ""]]
                row["least_milliseconds"] = Spread.of([1e3 * t for t in least]).to_json()
                row["of_limit"] = Spread.of([a / b for a, b in zip(least, own, strict=True)]).to_json()
                first = times["ours", tokens[0]]
                row["growth"] = Spread.of([b / a - 1 for a, b in zip(first, own, strict=True)]).to_json()
            rows.append(row)
    return rows


def memory(compiled: GeneratorFolder, threads: int) -> dict[str, float]:
    """Bytes that `graphwright generate` holds at most, in a process of its own, and what it may hold."""
    from ..runtime.generator_folder import DECODE

    command = [sys.executable, "-c", "from graphwright.tools.cli import main; main()", "generate", str(compiled.root),
               "--prompt", "The sea", "--max-tokens", "16", "--threads", str(threads)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = weight_bytes(compiled.root / DECODE / "model.onnx")
    cache = 8 * math.prod(compiled.about.cache_shape) * compiled.about.layers
    return {"held": held, "weights": weights, "cache": cache, "allowed": 1.15 * weights + cache + OVERHEAD}


def line(row: dict[str, Any]) -> list[str]:
    spread = "{median:.2f} [{low:.2f}, {high:.2f}]"
    cells = [row["call"], spread.format(**row["milliseconds"]), f"{row['onnxruntime']['median']:.2f}"]
    cells.append(spread.format(**row["ratio"]))
    if "of_limit" not in row:
        return [*cells, "", ""]
    share = "{median:.0%} [{low:.0%}, {high:.0%}]".format(**row["of_limit"])
    return [*cells, f"{row['least_milliseconds']['median']:.2f}", share]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("compiled", type=Path, metavar="COMPILED", help="folder that `graphwright compile` made")
    parser.add_argument("source", type=Path, metavar="ONNX_FOLDER", help="folder that it was made from")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each call")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    from ..runtime.generator_folder import GeneratorFolder

    compiled, source = (GeneratorFolder.load(path) for path in (options.compiled, options.source))
    held = memory(compiled, options.threads)  # before this process has children that are larger
    rows = measure(compiled, source, options.threads, options.seconds)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for row in rows:
        print_row(line(row))
    growth = "{median:+.0%} [{low:+.0%}, {high:+.0%}]"
    if "growth" in rows[-1]:
        print(f"From position {POSITIONS[0]}, the last call takes {growth.format(**rows[-1]['growth'])} longer.")
    print("The process holds {held:.0f} MB; weights {weights:.0f}, cache {cache:.0f}, 1.15 x weights + cache + 60: "
          "{allowed:.0f}.".format(**{name: value / 1e6 for name, value in held.items()}))  # fmt: skip
    if options.json:
        document = {"threads": options.threads, "calls": rows, "memory": held}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
