"""A decoder with what its file says about text: tokenizer, chat template, tokens that begin and end.

Importing this file imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from graphwright.passes.errors import ModelError
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .decoding import Decoder

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Names:
    """How a format calls the parts of a decoder. layer: the prefix of a layer's parts, with {} for its number."""

    layer: str
    parts: Mapping[str, str]  # ours -> theirs

    def of(self, ours: str) -> str:
        """layers.3.attention.query.weight -> blk.3.attn_q.weight, say."""
        stem, _, kind = ours.rpartition(".")
        if not stem.startswith("layers."):
            return f"{self.parts[stem]}.{kind}"
        _, number, part = stem.split(".", 2)
        return f"{self.layer.format(number)}{self.parts[part]}.{kind}"


@dataclass(frozen=True)
class Checkpoint:
    """context: positions that the model was trained for. add_bos: the token that every text begins with, if one does.

    special_tokens: texts of bos_token, eos_token and the like, which chat templates refer to.
    """

    architecture: str
    decoder: Decoder
    context: int
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    add_bos: int | None
    chat_template: str | None
    special_tokens: Mapping[str, str]
    source: str


def whole(value: Any, what: str, path: Path) -> int:
    """`value`, which a file gives for `what`, as a count. Raises ModelError when it is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ModelError(f"{path}: {what} is {_shown(value)}, expected a whole number of at least 1")
    return int(value)


def positive(value: Any, what: str, path: Path) -> float:
    """`value`, which a file gives for `what`, as a number above 0. Raises ModelError when it is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ModelError(f"{path}: {what} is {_shown(value)}, expected a number above 0")
    return float(value)


def token_id(value: Any, what: str, vocabulary: int, path: Path) -> int:
    """`value`, which a file gives for `what`, as a token. Raises ModelError when it is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < vocabulary:
        raise ModelError(f"{path}: {what} is {_shown(value)}, expected a token, 0 to {vocabulary - 1}")
    return int(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_heads(sizes: Any, path: Path) -> None:
    """Raises ModelError for heads that have no pairs to turn, or cannot be shared out among those of keys."""
    if sizes.heads % sizes.key_value_heads or sizes.head_width % 2:
        raise ModelError(
            f"{path}: has {sizes.heads} heads of width {sizes.head_width} and {sizes.key_value_heads} of keys; "
            "expected an even width, and as many query heads for each key head"
        )


def fill(build: Callable[[Any], Net], sizes: Any, state: dict[str, Tensor], names: Names, path: Path) -> Net:
    """The module of `sizes` with the tensors of a file, float32, in evaluation mode.

    Raises ModelError that names, as the file does, a tensor that is missing, too many, or of another shape or kind.
    """
    if sizes.layers > len(state):
        raise ModelError(f"{path}: has {len(state)} tensors, too few for {sizes.layers} layers; expected a whole model")
    with torch.device("meta"):  # only shapes: sizes that are not the file's may be beyond any memory
        model = build(sizes)
    wanted = {names.of(name): (name, tuple(t.shape)) for name, t in model.state_dict().items()}
    for theirs, (_, shape) in wanted.items():
        if theirs not in state:
            raise ModelError(f"{path}: has no tensor {theirs}, shape {list(shape)}; expected a complete model")
        if tuple(state[theirs].shape) != shape:
            raise ModelError(f"{path}: {theirs} has shape {list(state[theirs].shape)}, expected {list(shape)}")
        if not state[theirs].is_floating_point():
            raise ModelError(f"{path}: {theirs} holds {state[theirs].dtype}, expected floating-point numbers")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ModelError(
            f"{path}: holds {unknown[0]}{f' and {len(unknown) - 1} more' if unknown[1:] else ''}, "
            "which this architecture does not have here"
        )
    ours = {wanted[theirs][0]: tensor.to(torch.float32) for theirs, tensor in state.items()}
    model = build(sizes)
    model.load_state_dict(ours, assign=True)
    return model.eval()
