"""The tokenizers of the text models, read from the files that come with their weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from graphwright.passes.errors import ModelError

from . import assets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokenizers import Tokenizer

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def minilm() -> Tokenizer:
    """Word pieces, lower case, with [CLS] and [SEP]; neither padded nor cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets.find("minilm-tokenizer")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


GGUF_KEYS = ("model", "pre", "tokens", "token_type", "merges")  # of tokenizer.ggml., what `from_gguf` reads
CONTROL = 3  # GGUF's token type for <|im_start|> and the like
# Where text is cut before pairs are merged, by GGUF's name for it; None: at digits, and as GPT-2 does.
CUTS: dict[str, str | None] = {
    "gpt-2": GPT_2,
    "smollm": None,
    "llama-bpe": _MODERN.replace("DIGITS", "{1,3}"),
    "qwen2": _MODERN.replace("DIGITS", ""),
}
# Tokens that end an answer, by the names that they have in the families read here.
ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>")


@functools.cache
def smollm2() -> Tokenizer:
    """Byte-level pairs as the GGUF file lists them; each decimal digit is a token of its own."""
    from gguf import GGUFReader

    reader = GGUFReader(assets.find("smollm2-gguf"))
    return from_gguf({key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in GGUF_KEYS})


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that fields of GGUF_KEYS describe. Raises ModelError unless it is one of byte-level pairs."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, cut = fields.get("model"), fields.get("pre")
    if kind != "gpt2" or cut not in CUTS:
        raise ModelError(
            f"the file has a tokenizer of kind {kind!r}, {cut!r}; expected byte-level pairs ('gpt2') with one of "
            f"{', '.join(map(repr, CUTS))}"
        )
    vocabulary = {token: index for index, token in enumerate(fields["tokens"])}
    if len(vocabulary) < len(fields["tokens"]):
        raise ModelError("the file's tokenizer is damaged (a token is listed twice)")
    try:
        merges = [tuple(merge.split(" ")) for merge in fields.get("merges", [])]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # of that package's own, which has no narrower class
        raise ModelError(f"the file's tokenizer is damaged ({error})") from error
    tokenizer.pre_tokenizer = _cut(CUTS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(fields["tokens"], fields.get("token_type", []), strict=False)
            if type_ == CONTROL
        ]
    )
    return tokenizer


def _cut(pattern: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pattern is None:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def ends(tokenizer: Tokenizer, named: Sequence[int]) -> tuple[int, ...]:
    """Tokens that end a text: those that the file names, and special tokens that are called so everywhere."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    usual = {index for token in ENDS if (index := tokenizer.token_to_id(token)) in special}
    return tuple(sorted(usual | set(named)))


def single_bytes() -> Tokenizer:
    """Every byte a token, whose number is the byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in _letters_of_bytes().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters_of_bytes() -> dict[int, str]:
    """The letters that byte-level tokenizers write bytes as: printable ones as they are, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


# Model of `registry` -> its tokenizer.
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"minilm": minilm, "smollm2": smollm2}
