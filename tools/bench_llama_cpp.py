"""A compiled generator against llama.cpp with the model's GGUF file: prompts, tokens, perplexity.

    python -m graphwright.tools.bench_llama_cpp COMPILED FILE.gguf [--threads N] [--build]

llama-cpp-python is built from its sources, for this processor, only when --build asks for it: that takes some minutes
and a C++ compiler. It is kept in the cache of models, or --peer names an environment that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_generate import POSITIONS, PROMPT
from .turns import SETTLE, print_row, use_threads

if TYPE_CHECKING:
    from ..runtime.decoders import Decoder

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
FEWEST = 9  # turns of each
OURS, THEIRS = "ours", "llama.cpp"
HEADER = ["call", "ms", THEIRS, "ratio", "tokens/s", THEIRS]
SKIPPED, JUDGED, WINDOW = 30_000, 2048, 512  # characters of the text in front; tokens; tokens of a window


def environment() -> Path:
    from ..models.assets import cache_folder

    return cache_folder() / f"llama-cpp-{VERSION}"


def build(folder: Path) -> None:
    """Make an environment with llama.cpp, compiled for this processor."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    settings = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    command = [str(folder / "bin" / "pip"), "install", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    subprocess.run(command, check=True, env={**os.environ, **settings})


class Peer:
    """llama.cpp with a GGUF file, in a process that stands still between calls."""

    def __init__(self, folder: Path, gguf: Path, context: int, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_peer.py")
        self._process = subprocess.Popen(
            [str(folder / "bin" / "python"), str(script), str(gguf), str(context), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def seconds(self, ids: Sequence[int], position: int) -> float:
        return self._call(ids, position, False)["seconds"]

    def losses(self, ids: Sequence[int]) -> list[float]:
        """Of a window, read into an empty cache."""
        return self._call(ids, 0, True)["losses"]

    def _call(self, ids: Sequence[int], position: int, losses: bool) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": list(ids), "position": position, "losses": losses}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with {self._process.wait()}; run its script by itself to see why")
        return json.loads(line)


def measure(ours: Decoder, peer: Peer, ids: Sequence[int], seconds: float, settle: float) -> list[dict[str, Any]]:
    """One row for a prompt and for a token at each position. ids: what the caches are filled with first."""
    from ..runtime.measure import Spread

    def own_seconds(tokens: Sequence[int], position: int) -> float:
        start = time.perf_counter()
        ours.extend(tokens, position, [len(tokens) - 1])
        return time.perf_counter() - start

    sides: dict[str, Callable[[Sequence[int], int], float]] = {OURS: own_seconds, THEIRS: peer.seconds}
    for at in range(0, len(ids), PROMPT):
        part = list(ids[at : at + PROMPT])
        for run in sides.values():
            run(part, at)
    calls = [(f"{PROMPT} tokens of prompt", list(ids[:PROMPT]), 0)]
    calls += [(f"token at {position}", [ids[position]], position) for position in POSITIONS if position < len(ids)]
    rows = []
    for name, tokens, position in sorted(calls, key=lambda call: -call[2]):  # a shorter cache follows a longer one
        times: dict[str, list[float]] = {side: [] for side in sides}
        end = time.perf_counter() + seconds
        while len(times[OURS]) < FEWEST or time.perf_counter() < end:
            for side, run in sides.items():
                time.sleep(settle)
                run(tokens, position)  # brings back its data and wakes its threads
                times[side].append(run(tokens, position))
        own, other = times.values()
        row = {
            "call": name,
            "tokens": len(tokens),
            "milliseconds": Spread.of([1e3 * t for t in own]).to_json(),
            THEIRS: Spread.of([1e3 * t for t in other]).to_json(),
            "ratio": Spread.of([b / a for a, b in zip(own, other, strict=True)]).to_json(),
        }
        rows.append(row)
    return rows[::-1]


def perplexities(ours: Decoder, peer: Peer, ids: Sequence[int]) -> dict[str, float]:
    import numpy as np

    from ..runtime import perplexity

    def own(window: Sequence[int]) -> list[np.ndarray]:
        logits = ours.extend(list(window[:-1]), 0, range(len(window) - 1))[0]
        return [perplexity.token_losses(logits, window[1:])]

    found = {OURS: own, THEIRS: lambda window: [np.array(peer.losses(list(window)))]}
    return {name: perplexity.measure(ids, WINDOW, losses).perplexity for name, losses in found.items()}


def line(row: dict[str, Any]) -> list[str]:
    spread = "{median:.2f} [{low:.2f}, {high:.2f}]"
    own, other = row["milliseconds"], row[THEIRS]
    speeds = [f"{1e3 * row['tokens'] / side['median']:.0f}" for side in (own, other)]
    return [row["call"], spread.format(**own), f"{other['median']:.2f}", spread.format(**row["ratio"]), *speeds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("compiled", type=Path, metavar="COMPILED", help="folder that `graphwright compile` made")
    parser.add_argument("gguf", type=Path, metavar="FILE.gguf", help="what llama.cpp loads")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what is read; by default Moby-Dick")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each call")
    parser.add_argument("--build", action="store_true", help=f"build {PACKAGE} {VERSION} first")
    parser.add_argument("--peer", type=Path, metavar="DIR", help=f"a virtual environment that has {PACKAGE}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    folder = options.peer or environment()
    if options.build:
        build(folder)
    if not (folder / "bin" / "python").exists():
        parser.error(f"{folder} has no llama.cpp; --build makes it, --peer names another environment")
    use_threads(options.threads)
    from ..models import datasets
    from ..runtime.decoders import decoder
    from ..runtime.generator_folder import GeneratorFolder

    compiled = GeneratorFolder.load(options.compiled)
    text = options.text.read_text(encoding="utf-8") if options.text else datasets.moby_dick()[SKIPPED:]
    ids = compiled.tokenizer().encode(text[: 16 * JUDGED], add_special_tokens=False).ids[:JUDGED]
    ours = decoder(compiled, "tvm", options.threads)
    with Peer(folder, options.gguf, compiled.about.capacity, options.threads) as peer:
        read = ids[: compiled.about.capacity - 1]
        rows = measure(ours, peer, read, options.seconds, SETTLE if options.threads > 1 else 0)
        quality = perplexities(ours, peer, ids)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for row in rows:
        print_row(line(row))
    found = ", ".join(f"{side} {value:.2f}" for side, value in quality.items())
    print(f"Perplexity of {len(ids)} tokens in windows of {WINDOW}: {found}.")
    if options.json:
        document = {"threads": options.threads, "calls": rows, "perplexity": quality}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
