"""Generators: the cache against a decoder without one in float64, streaming, limits, damaged folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphwright.passes.errors import ArtifactError, GraphwrightError, InputError, OutputError, UsageError
from graphwright.runtime import decoders
from graphwright.runtime import generator as module
from graphwright.runtime.decoders import CompiledDecoder, OnnxruntimeDecoder
from graphwright.runtime.generator import Generator, pieces
from graphwright.runtime.generator_build import check_feeds, compile_generator
from graphwright.runtime.generator_folder import DECODE, PREFILL, GeneratorFolder, load_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright

PROMPT = list(b"Call me Ishmael.")
END, BEGIN, USER, ANSWER = range(256, 260)


@pytest.fixture(scope="module")
def generator(tiny_generator: Any) -> Generator:
    return Generator(tiny_generator.root, threads=1)


@pytest.fixture(scope="module", params=["onnxruntime", "tvm", "onnxruntime on the artifact"])
def every_backend(request: pytest.FixtureRequest) -> Generator:
    """The same weights by each way there is."""
    if request.param == "onnxruntime":
        return Generator(request.getfixturevalue("tiny_generator").root, threads=1)
    root = request.getfixturevalue("compiled_generator")
    return Generator(root, threads=1, backend=request.param.split()[0])


def greedy(tiny: Any, prompt: list[int], count: int) -> list[int]:
    """Without a cache, in float64, and without stop tokens."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(tiny.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_text_is_that_of_a_decoder_without_a_cache(every_backend: Generator, tiny_generator: Any) -> None:
    expected = greedy(tiny_generator, PROMPT, 24)
    assert END not in expected and len(set(expected)) > 4  # a text in which a mistake would show
    assert list(every_backend.tokens(PROMPT, max_tokens=24)) == expected


def test_logits_are_those_of_a_decoder_without_a_cache(every_backend: Generator, tiny_generator: Any) -> None:
    """However the tokens are spread over calls, also after another text."""
    ids = [*PROMPT, *greedy(tiny_generator, PROMPT, 8)]
    expected = tiny_generator.logits(ids)
    decoder = every_backend.decoder
    decoder.extend([1, 2, 3], 0, [0])
    for cuts in ([24], [1, 23], [16, *[1] * 8], [7, 9, 8]):
        decoder.reset()
        at, rows = 0, []
        for count in cuts:
            logits, top_logits, top_tokens = decoder.extend(ids[at : at + count], at, range(count))
            np.testing.assert_array_equal(np.take_along_axis(logits, top_tokens, -1), top_logits)
            np.testing.assert_array_equal(top_tokens[:, 0], logits.argmax(-1))
            rows.append(logits)
            at += count
        np.testing.assert_allclose(np.concatenate(rows), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_call_may_overwrite_what_the_cache_held(every_backend: Generator, tiny_generator: Any) -> None:
    decoder = every_backend.decoder
    decoder.reset()
    decoder.extend([5, 6, 7, 8, 9], 0, [4])
    logits, _, _ = decoder.extend([70], 2, [0])
    expected = tiny_generator.logits([5, 6, 70])[-1]
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_decode_graph_of_several_tokens_takes_single_ones(
    make_generator: Callable[..., Any], tiny_generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled up while the cache has rows for that; the last ones go through prefill."""
    several = Generator(make_several(make_generator(capacity=30, stop_tokens=[]).root, 4))
    parts: list[str] = []
    feeds = decoders._feeds
    monkeypatch.setattr(decoders, "_feeds", lambda part, *rest: (parts.append(part), feeds(part, *rest))[1])
    assert list(several.tokens(PROMPT, max_tokens=50)) == greedy(tiny_generator, PROMPT, 15)
    # Behind the prompt of 16, calls at 16 to 26 have four rows before the end.
    assert parts == [PREFILL, *[DECODE] * 11, *[PREFILL] * 3]


def make_several(root: Path, count: int) -> Path:
    """A decode graph of `count` tokens a call: prefill's, of a fixed length, with the logits of all."""
    import onnx

    model = onnx.load(root / "prefill.onnx")
    wanted = next(i for i in model.graph.input if i.name == "wanted")
    model.graph.input.remove(wanted)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(count), "wanted"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = count
    for output in model.graph.output[:3]:
        output.type.tensor_type.shape.dim[1].dim_value = count
    onnx.save(model, root / "decode.onnx")
    about = json.loads((root / "generator.json").read_text())
    (root / "generator.json").write_text(json.dumps({**about, "decode_tokens": count}))
    return root


def test_the_python_api_compiles_a_generator(tiny_generator: Any, tmp_path: Path) -> None:
    """Refusals come before anything is compiled."""
    for name, value in (("pins", {"x": (1,)}), ("checks", {"x": []}), ("dry_run", True)):
        with pytest.raises(UsageError, match=f"{name} is for one model; a generator's parts have inputs"):
            graphwright.compile(tiny_generator.root, out=tmp_path / "out", **{name: value})
    with pytest.raises(UsageError, match=r"calibration is dict; a generator takes the path of a \.txt file"):
        graphwright.compile(tiny_generator.root, out=tmp_path / "out", calibration={"x": []})
    assert not list(tmp_path.iterdir())
    done = graphwright.compile(tiny_generator.root, out=tmp_path / "out")
    assert done.compiled
    assert list(Generator(done.root).tokens(PROMPT, max_tokens=3)) == greedy(tiny_generator, PROMPT, 3)
    with pytest.raises(UsageError, match="is compiled; give the folder that `graphwright export` wrote"):
        graphwright.compile(done.root)


def test_onnxruntime_writes_into_the_cache_it_was_given(generator: Generator) -> None:
    decoder = generator.decoder
    assert isinstance(decoder, OnnxruntimeDecoder)
    decoder.load()
    addresses = [value.data_ptr() for value in decoder._cache.values()]
    decoder.extend([5, 6], 0, [1])
    decoder.extend([7], 2, [0])
    filled = decoder._cache["key_1"].numpy()
    assert addresses == [value.data_ptr() for value in decoder._cache.values()]
    assert np.abs(filled[:, :, :3]).min() > 0 and filled.shape[2] == generator.capacity


def test_a_long_prompt_goes_through_in_parts(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(generator.tokens(PROMPT, max_tokens=5))
    for size in (1, 5, len(PROMPT) - 1, len(PROMPT), len(PROMPT) + 1):
        monkeypatch.setattr(module, "PREFILL_TOKENS", size)
        assert list(generator.tokens(PROMPT, max_tokens=5)) == whole


def test_a_seed_decides_a_text(generator: Generator) -> None:
    def text(seed: int, **options: Any) -> str:
        return "".join(generator.generate("Call", max_tokens=20, temperature=1.0, seed=seed, **options))

    assert text(1) == text(1) != text(2)
    assert text(1, top_k=1) == "".join(generator.generate("Call", max_tokens=20))
    assert text(1, top_k=5, top_p=0.9) == text(1, top_k=5, top_p=0.9)


def test_a_stop_token_ends_the_text(make_generator: Callable[..., Any], tiny_generator: Any) -> None:
    expected = greedy(tiny_generator, PROMPT, 24)
    stop = expected[10]
    short = Generator(make_generator(stop_tokens=[END, stop]).root)
    assert list(short.tokens(PROMPT, max_tokens=24)) == expected[: expected.index(stop)]
    assert short.stats.ended == "stop" and short.stats.tokens == expected.index(stop)


def test_what_stats_say(generator: Generator) -> None:
    tokens = generator.tokens(PROMPT, max_tokens=3)
    next(tokens)
    assert generator.stats.ended == "" and generator.stats.tokens_per_second is None
    assert len(list(tokens)) == 2
    stats = generator.stats
    assert (stats.prompt_tokens, stats.tokens, stats.ended) == (len(PROMPT), 3, "max-tokens")
    assert stats.first_token_seconds > 0
    assert stats.tokens_per_second == pytest.approx(2 / stats.decode_seconds)


def test_the_cache_may_be_filled_to_the_last_place(make_generator: Callable[..., Any]) -> None:
    small = Generator(make_generator(capacity=8, stop_tokens=[]).root)
    assert len(list(small.tokens(PROMPT[:6], max_tokens=50))) == 3  # the last is not put into the cache
    assert small.stats.ended == "capacity"
    assert len(list(small.tokens(PROMPT[:8], max_tokens=50))) == 1
    message = "the prompt has 9 tokens and the cache holds 8; shorten the prompt, or export .* --capacity 59"
    with pytest.raises(InputError, match=message):
        small.tokens(PROMPT[:9], max_tokens=50)


def test_an_empty_prompt_begins_with_the_token_that_begins_texts(make_generator: Callable[..., Any]) -> None:
    with_begin = Generator(make_generator("a", add_bos=BEGIN).root)
    assert with_begin.encode("") == [BEGIN] and with_begin.encode("hi") == [BEGIN, *b"hi"]
    assert len(list(with_begin.tokens("", max_tokens=4))) == 4
    with pytest.raises(InputError, match="the prompt is empty and the model has no token that begins a text"):
        Generator(make_generator("b").root).tokens("")


def test_a_chat_is_written_by_the_models_template(make_generator: Callable[..., Any]) -> None:
    chatting = Generator(make_generator("a", add_bos=BEGIN).root)
    assert chatting.encode("hi", chat=True) == [USER, *b"hi", END, ANSWER]
    with pytest.raises(UsageError, match="the chat template takes a text"):
        chatting.tokens([1, 2], chat=True)
    with pytest.raises(UsageError, match="the model has no chat template; leave out --chat"):
        Generator(make_generator("b", chat_template=None).root).tokens("hi", chat=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max-tokens is 0; expected at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; expected"),
        ({"top_p": 2.0}, "top-p is 2.0; expected"),
    ],
)
def test_options_are_checked_before_anything_runs(generator: Generator, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generator.tokens("hi", **options)


def test_tokens_that_do_not_exist_are_refused(generator: Generator) -> None:
    for token in (-1, 260):
        with pytest.raises(InputError, match=f"the prompt has a token {token}; expected 0 to 259"):
            generator.tokens([1, token])
        with pytest.raises(InputError, match=f"the text has a token {token}; expected 0 to 259"):
            generator.perplexity([1, token], length=8)


def test_a_text_ends_when_another_takes_its_cache(generator: Generator) -> None:
    first = generator.tokens(PROMPT, max_tokens=8)
    second = generator.tokens("hi", max_tokens=8)  # has not begun
    begun = [next(first), next(first)]
    assert len(list(second)) == 8
    with pytest.raises(UsageError, match="another text has begun and taken the cache; take a Generator"):
        next(first)
    third = generator.tokens(PROMPT, max_tokens=8)
    assert [next(third), next(third)] == begun
    generator.perplexity(PROMPT, length=8)
    with pytest.raises(UsageError, match="another text has begun"):
        next(third)


def test_a_text_that_is_no_unicode_is_refused(generator: Generator) -> None:
    for run in (generator.tokens, lambda text: generator.perplexity(text, length=8)):
        with pytest.raises(InputError, match=r"the text has a character that is none .*; expected UTF-8"):
            run("ab\udcff")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300}, {"temperature": 5e-324}, {"temperature": 1e300}, {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_k": 10**9}, {"temperature": 1.0, "top_k": 200, "top_p": 1.0},
    ],
)  # fmt: skip
def test_extreme_options_give_a_text_that_its_seed_decides(generator: Generator, options: dict[str, Any]) -> None:
    once, again = (list(generator.tokens(PROMPT, max_tokens=6, seed=10**30, **options)) for _ in range(2))
    assert once == again and len(once) == 6 and all(0 <= token < 260 for token in once)
    if options["temperature"] < 1e-299 or options.get("top_p", 1) < 1e-299:
        assert once == list(generator.tokens(PROMPT, max_tokens=6))


def test_perplexity_is_the_definition(every_backend: Generator, tiny_generator: Any) -> None:
    """Windows of 40 tokens, the last of 20; each token from those before it in its window."""
    ids = list(np.random.default_rng(0).integers(0, 256, 100))
    losses = []
    for window in (ids[:40], ids[40:80], ids[80:]):
        logits = tiny_generator.logits(window)
        wide = logits - logits.max(-1, keepdims=True)
        logs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        losses += [-logs[at, window[at + 1]] for at in range(len(window) - 1)]
    seen: list[tuple[int, int]] = []
    found = every_backend.perplexity(ids, length=40, progress=lambda *done: seen.append(done))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert (found.tokens, found.predictions, found.windows, found.length) == (100, 97, 3, 40)
    assert seen[-1] == (97, 97)
    assert every_backend.perplexity(ids, length=40, max_tokens=41).predictions == 39  # a window of one predicts nothing


def test_how_many_logits_are_held_does_not_matter(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "It is not down in any map; true places never are."
    expected = generator.perplexity(text, length=20).loss
    for size in (1, 7, 19, 20, 21):
        monkeypatch.setattr(module, "JUDGED_TOKENS", size)
        assert generator.perplexity(text, length=20).loss == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_what_is_too_short_or_too_long(generator: Generator) -> None:
    for text, count in (("", "0 tokens"), ("a", "1 token")):
        with pytest.raises(InputError, match=f"the text has {count}; expected at least 2"):
            generator.perplexity(text, length=64)
    with pytest.raises(UsageError, match="length is 97 and the cache holds 96 tokens"):
        generator.perplexity("some text", length=97)
    with pytest.raises(UsageError, match="length is 1; expected at least 2"):
        generator.perplexity("some text", length=1)
    for count in (-1, 0, 1):
        with pytest.raises(UsageError, match=f"max-tokens is {count}; expected at least 2"):
            generator.perplexity("some text", length=8, max_tokens=count)


# --- pieces ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_generator: Any) -> Any:
    return load_tokenizer(tiny_generator.root / "tokenizer.json")


def test_a_character_comes_when_it_is_complete(tokenizer: Any) -> None:
    assert list(pieces(tokenizer, "a€é".encode())) == ["a", "€", "é"]
    assert list(pieces(tokenizer, [*"é".encode()[:1], *b"a"])) == ["�a"]
    assert list(pieces(tokenizer, "€".encode()[:2])) == ["�"]
    assert list(pieces(tokenizer, [])) == []


def test_a_piece_comes_before_the_next_token_is_asked_for(tokenizer: Any) -> None:
    asked: list[int] = []

    def tokens() -> Iterator[int]:
        for token in b"abc":
            asked.append(token)
            yield token

    stream = pieces(tokenizer, tokens())
    assert next(stream) == "a" and asked == [*b"a"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 259), max_size=30))
def test_pieces_together_are_the_text(ids: list[int]) -> None:
    """Of any bytes, special tokens among them."""
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_pieces_of_a_text_are_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    found = list(pieces(tokenizer, text.encode()))
    assert "".join(found) == text and all(found)
    assert all(text.count("�") or "�" not in piece for piece in found)


def byte_tokenizer() -> Any:
    from graphwright.models.tokens import single_bytes

    return single_bytes()


def test_a_tokenizer_that_drops_the_space_before_a_text(tmp_path: Path) -> None:
    """As those of the first Llama do: a token is decoded with the one before it."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={"▁the": 0, "▁whale": 1, "s": 2}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert list(pieces(tokenizer, [0, 1, 2, 0])) == ["the", " whale", "s", " the"]


# --- folders -----------------------------------------------------------------------------------------------------


def test_inputs_of_a_check_are_ones_that_a_part_takes(make_generator: Callable[..., Any]) -> None:
    """At every capacity: one of the calls fills the cache to its last place."""
    for capacity in (2, 3, 7, 39, 40, 41, 96):
        tiny = make_generator(f"c{capacity}", capacity=capacity)
        found = check_feeds(GeneratorFolder.load(tiny.root))
        for part in (PREFILL, DECODE):
            feeds = found[part]
            for ids, position in zip(feeds["input_ids"], feeds["position"], strict=True):
                assert 0 <= position[0] <= capacity - ids.shape[1]
            assert feeds["position"][1][0] + feeds["input_ids"][1].shape[1] == capacity
            assert {rows.shape[2] for name in feeds if name.startswith("past_") for rows in feeds[name]} == {capacity}
        for wanted, ids in zip(found[PREFILL]["wanted"], found[PREFILL]["input_ids"], strict=True):
            assert wanted.min() >= 0 and wanted.max() < ids.shape[1]


def test_both_parts_of_a_compiled_generator_run_on_tvm(compiled_generator: Path) -> None:
    for part in (PREFILL, DECODE):
        manifest = json.loads((compiled_generator / part / "manifest.json").read_text())
        assert [region["runtime"] for region in manifest["regions"]] == ["tvm"], part
        assert manifest["verdict"]["ok"] and manifest["verdict"]["sets"] == 2
    assert isinstance(Generator(compiled_generator).decoder, CompiledDecoder)


def test_a_generator_does_not_replace_itself_or_something_else(tiny_generator: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is read by this run and will not be replaced"):
        compile_generator(tiny_generator.root, tiny_generator.root, overwrite=True)
    (tmp_path / "diary").write_text("mine")
    with pytest.raises(OutputError, match="is not a generator folder and will not be replaced"):
        compile_generator(tiny_generator.root, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="already exists"):
        compile_generator(tiny_generator.root, tmp_path)


def test_a_folder_that_fails_leaves_nothing(tiny_generator: Any, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_generator.root, tmp_path / "broken")
    (broken / "decode.onnx").write_bytes(b"no model")
    with pytest.raises(GraphwrightError):
        compile_generator(broken, tmp_path / "out", passes="", target=None)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "generator.json").unlink(), "no generator.json in it; expected a folder made by"),
        (lambda root: (root / "generator.json").write_text("{"), "generator.json: cannot be read"),
        (lambda root: (root / "generator.json").write_text("[]"), "schema version None; expected 1"),
        (lambda root: (root / "generator.json").write_text('{"schema_version": 2}'), "schema version 2; expected 1"),
        (lambda root: (root / "generator.json").write_text('{"schema_version": 1}'), "architecture: field required"),
        (lambda root: (root / "decode.onnx").unlink(), "decode.onnx: is missing; copy the folder again"),
        (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda root: (root / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    ],
)
def test_a_damaged_folder_is_named(
    tiny_generator: Any, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    root = shutil.copytree(tiny_generator.root, tmp_path / "copy")
    change(root)
    with pytest.raises(ArtifactError, match=message):
        Generator(root)


def test_a_backend_that_is_not_there(tiny_generator: Any) -> None:
    with pytest.raises(UsageError, match=r"is not compiled; run `graphwright compile .* -o OUT`, or use onnxruntime"):
        Generator(tiny_generator.root, backend="tvm")
    with pytest.raises(UsageError, match="unknown backend 'torch'; expected tvm or onnxruntime"):
        Generator(tiny_generator.root, backend="torch")
    with pytest.raises(UsageError, match="threads is 0; expected at least 1"):
        Generator(tiny_generator.root, threads=0)
