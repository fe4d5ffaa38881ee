"""Text from a language model: `graphwright.Generator`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..passes.errors import InputError, UsageError
from .chat import render
from .decoders import Decoder, decoder
from .generator_folder import GeneratorFolder
from .perplexity import Perplexity, measure, token_losses
from .sampling import Sampler, Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BACKENDS = ("tvm", "onnxruntime")
PREFILL_TOKENS = 512  # of a prompt that go through the model together: bounds what a long one takes of memory
JUDGED_TOKENS = 128  # whose logits are held at a time when a text is judged
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character


@dataclass
class Stats:
    """Of one text. first_token_seconds: from the call to the first token; decode_seconds: of all further ones, without
    the time that the caller takes between two. ended: "stop", "max-tokens" or "capacity"; "" while it goes on."""

    prompt_tokens: int = 0
    tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    ended: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Behind the first token; None for a text without a second one."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else None


class Generator:
    """A generator folder, loaded: what `graphwright export` writes, or `graphwright compile` makes of that.

    backend: tvm for a compiled folder, onnxruntime for both kinds; by default tvm where it can be. threads: of a run;
    None for all processors this process may use. stats: of the latest text. One text at a time: a new one begins with
    an empty cache and ends the one before.

    Raises ArtifactError when the folder is damaged, UsageError for a backend that it does not have.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, threads: int | None = None, backend: str | None = None
    ) -> None:
        self.folder = GeneratorFolder.load(path)
        self.backend = backend or ("tvm" if self.folder.compiled else "onnxruntime")
        if self.backend not in BACKENDS:
            raise UsageError(f"unknown backend {backend!r}; expected {' or '.join(BACKENDS)}")
        if self.backend == "tvm" and not self.folder.compiled:
            raise UsageError(f"{path}: is not compiled; run `graphwright compile {path} -o OUT`, or use onnxruntime")
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; expected at least 1")
        self.tokenizer: Tokenizer = self.folder.tokenizer()
        self.decoder: Decoder = decoder(self.folder, self.backend, threads)
        self.stats = Stats()
        self._user = object()  # what the cache is filled for

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds, prompt and text together."""
        return self.folder.about.capacity

    def load(self) -> None:
        """Load code and weights now, which the first text does otherwise."""
        self.decoder.load()

    def generate(self, prompt: str | Sequence[int], *, chat: bool = False, **options: Any) -> Iterator[str]:
        """The text behind the prompt, in pieces as they become known; `options` and errors are those of `tokens`.

        A character whose bytes are spread over tokens comes when it is complete.
        """
        return pieces(self.tokenizer, self.tokens(prompt, chat=chat, **options))

    def tokens(
        self, prompt: str | Sequence[int], *, max_tokens: int = 128, temperature: float = 0.0, top_k: int = 0,
        top_p: float = 1.0, seed: int = 0, chat: bool = False,
    ) -> Iterator[int]:  # fmt: skip
        """The tokens behind the prompt: at most `max_tokens`, until a stop token (which is not given) or until the
        cache is full. prompt: a text, or tokens as they are. chat: the prompt is a user's message in the model's chat
        template. The others are those of `Sampling`, by default the most likely token each time.

        Raises UsageError for options out of range, InputError for a prompt that is empty or beyond the capacity; while
        it runs, UsageError when another text has begun.
        """
        sampler = Sampler(checked_options(max_tokens, temperature, top_k, top_p, seed))
        ids = self.encode(prompt, chat=chat)
        if not ids:
            raise InputError("the prompt is empty and the model has no token that begins a text; write a prompt")
        if len(ids) > self.capacity:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the cache holds {self.capacity}; shorten the prompt, or export "
                f"the model with --capacity {len(ids) + max_tokens}"
            )
        return self._run(ids, sampler, max_tokens)

    def encode(self, prompt: str | Sequence[int], *, chat: bool = False) -> list[int]:
        """The prompt as tokens, with the one that begins a text if the model has one. Raises InputError, UsageError."""
        about = self.folder.about
        if isinstance(prompt, str):
            if chat:
                if about.chat_template is None:
                    raise UsageError(f"{self.folder.root}: the model has no chat template; leave out --chat")
                messages = [{"role": "user", "content": prompt}]
                prompt = render(about.chat_template, messages, about.special_tokens)
            ids = self._ids(prompt)
            if about.add_bos is not None and not chat:
                ids.insert(0, about.add_bos)
        else:
            if chat:
                raise UsageError("the chat template takes a text; give the prompt as one, or leave out chat")
            ids = list(prompt)
        return self._existing(ids, "prompt")

    def _existing(self, ids: Sequence[int], where: str) -> list[int]:
        """The tokens. Raises InputError for one that the model does not have."""
        last = self.folder.about.vocabulary - 1
        for token in ids:
            if not 0 <= token <= last:
                raise InputError(f"the {where} has a token {token}; expected 0 to {last}")
        return [int(token) for token in ids]

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")  # lone surrogates, which bytes of a command line become that are no UTF-8
        except UnicodeEncodeError as error:
            raise InputError(f"the text has a character that is none ({error.reason}); expected UTF-8") from error
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _run(self, ids: list[int], sampler: Sampler, max_tokens: int) -> Iterator[int]:
        stops, start = set(self.folder.about.stop_tokens), time.perf_counter()
        stats = self.stats = Stats(prompt_tokens=len(ids))
        user = self._begin()
        position, waiting = 0, ids
        while True:
            for at in range(0, len(waiting), PREFILL_TOKENS):
                part = waiting[at : at + PREFILL_TOKENS]
                logits, top_logits, top_tokens = self.decoder.extend(part, position, [len(part) - 1])
                position += len(part)
            token = sampler.choose(logits[0], top_logits[0], top_tokens[0])
            if not stats.tokens:
                stats.first_token_seconds = time.perf_counter() - start
            else:
                stats.decode_seconds += time.perf_counter() - start
            if token in stops:
                stats.ended = "stop"
                return
            stats.tokens += 1
            if stats.tokens == max_tokens:
                stats.ended = "max-tokens"
            elif position == self.capacity:  # this token has no place in the cache
                stats.ended = "capacity"
            yield token
            if stats.ended:
                return
            if self._user is not user:
                raise UsageError("another text has begun and taken the cache; take a Generator for each")
            start, waiting = time.perf_counter(), [token]

    def perplexity(
        self, text: str | Sequence[int], *, length: int = 512, max_tokens: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Perplexity:  # fmt: skip
        """Perplexity of the text's first `max_tokens` tokens (all of them for None), in windows of `length`.

        progress: is told how many of how many predictions are done. Raises UsageError for a length beyond the capacity,
        InputError for a text of fewer than two tokens or with one that does not exist.
        """
        if length > self.capacity:
            raise UsageError(f"length is {length} and the cache holds {self.capacity} tokens; give a smaller --length")
        if max_tokens is not None and max_tokens < 2:
            raise UsageError(f"max-tokens is {max_tokens}; expected at least 2, one token to predict another from")
        ids = self._ids(text) if isinstance(text, str) else self._existing(text, "text")
        return measure(ids[:max_tokens], length, self._losses, progress)

    def _begin(self) -> object:
        """Empty the cache. Who uses it from now on is the result."""
        self.decoder.reset()
        self._user = object()
        return self._user

    def _losses(self, window: Sequence[int]) -> Iterator[np.ndarray]:
        self._begin()
        for at in range(0, len(window) - 1, JUDGED_TOKENS):
            part = window[at : at + JUDGED_TOKENS]
            targets = window[at + 1 : at + 1 + len(part)]
            logits, _, _ = self.decoder.extend(part, at, range(len(targets)))
            yield token_losses(logits, targets)


def checked_options(
    max_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> Sampling:
    """How tokens are drawn, by the options of `Generator.tokens`. Raises UsageError for those out of range."""
    if max_tokens < 1:
        raise UsageError(f"max-tokens is {max_tokens}; expected at least 1")
    return Sampling(temperature, top_k, top_p, seed)


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens in pieces that end with whole characters, as soon as the tokens for them are there.

    Together they are what the tokenizer makes of all tokens, special ones left out. Tokens are decoded with those of
    the piece before, since some tokenizers write a token differently at the beginning of a text.
    """
    before: list[int] = []  # of the latest piece
    now: list[int] = []
    known = ""  # text of `before`
    for token in tokens:
        now.append(token)
        text = tokenizer.decode(before + now)
        if text.endswith(UNFINISHED) or len(text) <= len(known):
            continue
        yield text[len(known) :]
        before, now = now, []
        known = tokenizer.decode(before)
    if now and (rest := tokenizer.decode(before + now)[len(known) :]):
        yield rest
