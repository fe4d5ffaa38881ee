"""The tokenizers of the text models, read from the files that come with their weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from . import assets

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer


@functools.cache
def minilm() -> Tokenizer:
    """Word pieces, lower case, with [CLS] and [SEP]; neither padded nor cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets.find("minilm-tokenizer")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@functools.cache
def smollm2() -> Tokenizer:
    """Byte-level pairs as the GGUF file lists them; each decimal digit is a token of its own."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(assets.find("smollm2-gguf"))
    fields = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")}
    vocabulary = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for <|im_start|> and the like
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(fields["tokens"], fields["token_type"], strict=True)
            if kind == control
        ]
    )
    return tokenizer


# Model of `registry` -> its tokenizer.
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"minilm": minilm, "smollm2": smollm2}
