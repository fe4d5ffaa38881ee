"""llama.cpp in a process of its own: the other side of bench_llama_cpp, which starts it in an environment that has
llama-cpp-python, numpy and nothing of ours.

    python llama_cpp_peer.py FILE.gguf CONTEXT THREADS

Reads a line of JSON per call, {"ids": tokens, "position": tokens in the cache before them, "losses": true or false},
and answers with one: {"seconds": ..., "losses": [...]}, the negative log-probability of each token but the first.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any


def losses(logits: Any, targets: list[int]) -> list[float]:
    """-log softmax(logits)[target] of each row, in float64."""
    import numpy as np

    found = []
    for row, target in zip(logits, targets, strict=True):
        wide = row.astype(np.float64)
        largest = wide.max()
        found.append(float(largest + math.log(np.exp(wide - largest).sum()) - wide[target]))
    return found


def main() -> None:
    from llama_cpp import Llama  # type: ignore[import-not-found]  # not one of our packages

    path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    common = {"n_ctx": context, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    timed: Any = Llama(path, **common)
    judged: Any = None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        ids, wants_losses = call["ids"], call["losses"]
        if wants_losses and judged is None:
            judged = Llama(path, logits_all=True, **common)
        model = judged if wants_losses else timed
        model.n_tokens = call["position"]
        start = time.perf_counter()
        model.eval(ids)
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
        if wants_losses:
            answer["losses"] = losses(model.scores[: len(ids) - 1], ids[1:])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
