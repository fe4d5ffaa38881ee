"""A decoder with what its file says about text: tokenizer, chat template, tokens that begin and end.

Importing this file imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def fill(build: Callable[[Any], Net], sizes: Any, state: dict[str, Tensor], names: Names, path: Path) -> Net:
    """The module of `sizes` with the tensors of a file, float32, in evaluation mode.

    Raises ModelError that names, as the file does, a tensor that is missing, too many, or of another shape.
    """
    model = build(sizes)
    wanted = {names.of(name): (name, tuple(t.shape)) for name, t in model.state_dict().items()}
    for theirs, (_, shape) in wanted.items():
        if theirs not in state:
            raise ModelError(f"{path}: has no tensor {theirs}, shape {list(shape)}; expected a complete model")
        if tuple(state[theirs].shape) != shape:
            raise ModelError(f"{path}: {theirs} has shape {list(state[theirs].shape)}, expected {list(shape)}")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ModelError(
            f"{path}: holds {unknown[0]}{f' and {len(unknown) - 1} more' if unknown[1:] else ''}, "
            "which this architecture does not have here"
        )
    ours = {wanted[theirs][0]: tensor.to(torch.float32) for theirs, tensor in state.items()}
    model.load_state_dict(ours, assign=True)
    return model.eval()
