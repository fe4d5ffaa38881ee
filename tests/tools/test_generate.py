"""`graphwright generate`, `perplexity` and `compile` on generators, and the generators that are kept."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from graphwright.passes import wire
from graphwright.runtime.generator import Generator
from graphwright.tools import generators
from graphwright.tools.cli import main
from graphwright.tools.shell import PIPE_CLOSED
from onnx import numpy_helper, parser

Cli = Callable[..., Result]
PROMPT = "Call me Ishmael."


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(folder))
    return folder


# --- generate ----------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_speed_to_stderr(cli: Cli, tiny_generator: Any) -> None:
    result = cli("generate", tiny_generator.root, "--prompt", PROMPT, "--max-tokens", 12)
    expected = "".join(Generator(tiny_generator.root).generate(PROMPT, max_tokens=12))
    assert result.stdout == f"{expected}\n"
    line = result.stderr.strip()
    assert line.startswith("16 tokens of prompt, ") and " ms to the first token; 12 tokens, " in line
    assert line.endswith(" tokens per second")
    assert cli("generate", tiny_generator.root, "--prompt", PROMPT, "-n", 12, "-q").stderr == ""


def test_options_reach_the_sampler(cli: Cli, tiny_generator: Any) -> None:
    drawn = {"temperature": 0.9, "top_k": 7, "top_p": 0.95, "seed": 4}
    options = [word for name, value in drawn.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = cli("generate", tiny_generator.root, "-p", "Call", "-n", 15, *options)
    assert result.stdout == "".join(Generator(tiny_generator.root).generate("Call", max_tokens=15, **drawn)) + "\n"


def test_a_prompt_of_standard_input_or_a_file(tiny_generator: Any, cli: Cli, tmp_path: Path) -> None:
    expected = cli("generate", tiny_generator.root, "-p", PROMPT, "-n", 5).stdout
    arguments = ["generate", str(tiny_generator.root), "-p", "-", "-n", "5"]
    assert CliRunner().invoke(main, arguments, input=PROMPT).stdout == expected
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert cli("generate", tiny_generator.root, "--prompt-file", tmp_path / "prompt.txt", "-n", 5).stdout == expected


def test_a_chat(cli: Cli, tiny_generator: Any) -> None:
    expected = "".join(Generator(tiny_generator.root).generate("hi", chat=True, max_tokens=6))
    assert cli("generate", tiny_generator.root, "-p", "hi", "--chat", "-n", 6).stdout == f"{expected}\n"


def test_the_end_of_the_cache_is_said(cli: Cli, make_generator: Callable[..., Any]) -> None:
    root = make_generator(capacity=8, stop_tokens=[]).root
    result = cli("generate", root, "-p", "Call")
    assert "stopped: the cache is full (8 tokens); export with --capacity for more" in result.stderr
    assert "; 5 tokens, " in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-p", "x", "--temperature", "-1"], 2, "error: temperature is -1.0; expected a number of at least 0"),
        (["-p", "x", "--top-p", "0"], 2, "error: top-p is 0.0; expected more than 0"),
        (["-p", "x", "--top-k", "-2"], 2, "error: top-k is -2; expected at least 0"),
        (["-p", "x", "--seed", "-2"], 2, "error: seed is -2; expected at least 0"),
        (["-p", "x", "-n", "0"], 2, "error: max-tokens is 0; expected at least 1"),
        ([], 2, "error: give one of --prompt TEXT (- for standard input) and --prompt-file FILE"),
        (["-p", "x", "--prompt-file", "y"], 2, "error: give one of --prompt TEXT"),
        (["--prompt-file", "nowhere.txt"], 1, "error: nowhere.txt: cannot be read as text"),
        (["-p", ""], 1, "error: the prompt is empty"),
        (["-p", "x" * 97], 1, "error: the prompt has 97 tokens and the cache holds 96"),
    ],
)
def test_a_mistake_is_one_line(tiny_generator: Any, options: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(main, ["generate", str(tiny_generator.root), *options])
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_options_are_judged_before_anything_is_exported(cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made a generator for a run that cannot begin")

    monkeypatch.setattr(generators, "ready", never)
    for options, message in ((["-n", "0"], "max-tokens is 0"), (["--top-p", "7"], "top-p is 7.0")):
        result = CliRunner().invoke(main, ["generate", "gpt-moby", "-p", "x", *options])
        assert result.exit_code == 2 and message in result.stderr


def test_one_token_is_not_tokens(cli: Cli, tiny_generator: Any) -> None:
    assert cli("generate", tiny_generator.root, "-p", "C", "-n", 1).stderr.startswith("1 token of prompt, ")
    assert cli("generate", tiny_generator.root, "-p", "C", "-n", 1).stderr.endswith("; 1 token\n")


def test_a_reader_that_goes_away_ends_the_text(make_generator: Callable[..., Any]) -> None:
    root = make_generator(capacity=200_000, stop_tokens=[]).root
    command = [sys.executable, "-c", "from graphwright.tools.cli import main; main()"]
    command += ["generate", str(root), "-p", "Call", "-n", "190000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == PIPE_CLOSED
    assert process.stderr.read() == b""


def test_bytes_that_are_no_text_are_one_line(tiny_generator: Any) -> None:
    command = [sys.executable, "-c", "from graphwright.tools.cli import main; main()"]
    done = subprocess.run([*command, "generate", str(tiny_generator.root), "-p", b"a\xff"], capture_output=True)
    assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"error: the text has a character that is none")


def test_something_that_is_no_model_of_text(cache: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", "smolm2", "-p", "x"])
    assert result.exit_code == 2 and "neither a generator nor a file nor a model of text: did you mean smollm2?" in (
        result.stderr
    )
    (tmp_path / "weights.bin").write_bytes(b"1")
    result = CliRunner().invoke(main, ["generate", str(tmp_path), "-p", "x"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"{tmp_path}: has neither generator.json nor config.json; expected" in result.stderr
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(main, ["generate", str(tmp_path), "-p", "x"])
    assert result.exit_code == 1 and "config.json: is of model type None" in result.stderr
    assert list((cache / "generators").iterdir()) == []  # not even a lock is left


def test_an_interruption_ends_with_what_was_printed(make_generator: Callable[..., Any]) -> None:
    root = make_generator(capacity=200_000, stop_tokens=[]).root
    command = [sys.executable, "-c", "from graphwright.tools.cli import main; main()"]
    command += ["generate", str(root), "-p", "Call", "-n", "190000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and first and out.endswith(b"\n")
    assert err.strip().endswith(b"error: interrupted") and b"Traceback" not in err


# --- perplexity --------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It is not down in any map; true places never are. " * 6)
    return path


def test_perplexity_of_a_generator(cli: Cli, tiny_generator: Any, text: Path) -> None:
    options = ["--text", text, "--length", 32, "--max-tokens", 100, "--skip-characters", 7]
    found = json.loads(cli("perplexity", tiny_generator.root, *options, "--json").stdout)
    expected = Generator(tiny_generator.root).perplexity(text.read_text()[7:], length=32, max_tokens=100)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (found["tokens"], found["predictions"], found["windows"], found["length"]) == (100, 96, 4, 32)
    assert found["backend"] == "onnxruntime"
    lines = cli("perplexity", tiny_generator.root, *options).stdout.splitlines()
    assert lines[0] == f"perplexity {expected.perplexity:.4f}"
    assert lines[1].startswith("96 predictions in 4 windows of up to 32 tokens, onnxruntime, ")


def test_a_window_is_no_longer_than_the_cache(cli: Cli, tiny_generator: Any, text: Path) -> None:
    assert json.loads(cli("perplexity", tiny_generator.root, "--text", text, "--json").stdout)["length"] == 96
    result = cli("perplexity", tiny_generator.root, "--text", text, "--length", 97, expect=2)
    assert "length is 97 and the cache holds 96 tokens; give a smaller --length" in result.stderr


def bigrams(length: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """A model of text: the logits behind a token are a row of a table."""
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> bigrams (int64[batch,{length}] input_ids) => '
        f"(float[batch,{length},256] logits) {{ logits = Gather(table, input_ids) }}"
    )
    table = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    return model, table


@pytest.mark.parametrize("length", ["length", "24"])
def test_perplexity_of_an_onnx_file(cli: Cli, tiny_generator: Any, text: Path, tmp_path: Path, length: str) -> None:
    """Of any length, or of one that the last window does not fill."""
    model, table = bigrams(length)
    onnx.save(model, tmp_path / "m.onnx")
    options = ["--tokenizer", tiny_generator.root / "tokenizer.json", "--length", 24, "-n", 60, "--json"]
    found = json.loads(cli("perplexity", tmp_path / "m.onnx", "--text", text, *options).stdout)
    ids = text.read_bytes()[:60]
    logs = table.astype(np.float64) - np.log(np.exp(table.astype(np.float64)).sum(-1, keepdims=True))
    losses = [-logs[ids[at], ids[at + 1]] for at in range(59) if (at + 1) % 24]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert (found["predictions"], found["windows"]) == (57, 3)


def test_models_that_are_not_of_text(cli: Cli, tiny_generator: Any, text: Path, tmp_path: Path, model: Path) -> None:
    tokenizer = ["--tokenizer", tiny_generator.root / "tokenizer.json"]
    result = cli("perplexity", model, "--text", text, *tokenizer, expect=1)
    assert "its inputs are x [N,8]; expected one of whole numbers, (batch, tokens)" in result.stderr
    onnx.save(bigrams("24")[0], tmp_path / "m.onnx")
    result = cli("perplexity", tmp_path / "m.onnx", "--text", text, expect=1)
    assert "no tokenizer is known for the model 'bigrams'; give --tokenizer FILE.json" in result.stderr
    result = cli("perplexity", tmp_path / "m.onnx", "--text", text, "--length", 25, *tokenizer, expect=2)
    assert "takes 24 tokens; give at most those" in result.stderr
    result = cli("perplexity", tiny_generator.root, "--text", text, *tokenizer, expect=2)
    assert "--tokenizer is for an ONNX file or an artifact; a generator has its own" in result.stderr


def test_texts_that_cannot_be_judged(cli: Cli, tiny_generator: Any, text: Path, tmp_path: Path) -> None:
    result = cli("perplexity", tiny_generator.root, "--text", tmp_path / "none", expect=1)
    assert "cannot be read as text" in result.stderr
    result = cli("perplexity", tiny_generator.root, "--text", text, "--skip-characters", 300, expect=1)
    assert "has 300 characters; --skip-characters 300 leaves none" in result.stderr
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    result = cli("perplexity", tiny_generator.root, "--text", tmp_path / "bytes", expect=1)
    assert "cannot be read as text" in result.stderr and "expected UTF-8" in result.stderr


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_generator_is_optimized_part_by_part(cli: Cli, tiny_generator: Any, tmp_path: Path) -> None:
    result = cli("optimize", tiny_generator.root, "-o", tmp_path / "out", "--report", tmp_path / "r.json", "--json")
    done = json.loads(result.stdout)
    assert done["output"] == str(tmp_path / "out") and list(done["parts"]) == ["prefill", "decode"]
    for part, one in done["parts"].items():
        assert one["verdict"]["ok"] and one["verdict"]["sets"] == 2
        assert one["output"] == str(tmp_path / "out" / f"{part}.onnx") and Path(one["output"]).is_file()
        assert (tmp_path / f"r.{part}.json").is_file()
    same = [list(Generator(root).tokens(PROMPT, max_tokens=9)) for root in (tiny_generator.root, tmp_path / "out")]
    assert same[0] == same[1]
    assert "already exists" in cli("optimize", tiny_generator.root, "-o", tmp_path / "out", expect=1).stderr
    cli("optimize", tiny_generator.root, "-o", tmp_path / "out", "--overwrite")


def test_a_dry_run_writes_nothing(cli: Cli, tiny_generator: Any, tmp_path: Path) -> None:
    result = cli("optimize", tiny_generator.root, "-o", tmp_path / "out", "--dry-run")
    assert "prefill:" in result.stdout and "decode:" in result.stdout and not list(tmp_path.iterdir())


def test_what_is_for_one_model_is_refused(cli: Cli, tiny_generator: Any) -> None:
    result = cli("compile", tiny_generator.root, "--pin", "position=1", expect=2)
    assert "--pin and --tokenizer are for one model" in result.stderr


def initializers(path: Path) -> dict[bytes, str]:
    model = onnx.load(path)
    return {onnx.numpy_helper.to_array(tensor).tobytes(): tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("weights", ["weights=4:activations=none", "weights=8"])
def test_a_text_calibrates_both_parts_alike(
    cli: Cli, tiny_generator: Any, text: Path, tmp_path: Path, weights: str
) -> None:
    out = tmp_path / "out"
    result = cli("optimize", tiny_generator.root, "--passes", f"dynaquant:{weights}", "--calibration", text, "-o", out,
                 "--json")  # fmt: skip
    done = json.loads(result.stdout)
    prefill, decode = (done["parts"][part]["pipeline"] for part in ("prefill", "decode"))
    assert prefill == decode and f"plan={out}.dynaquant.npz" in prefill
    assert {path.name for path in tmp_path.iterdir()} == {text.name, "out", "out.dynaquant.npz"}
    large = [{data for data in initializers(out / f"{part}.onnx") if len(data) > 256} for part in ("prefill", "decode")]
    assert large[0] == large[1]
    stored = [tensor for tensor in onnx.load(out / "decode.onnx").graph.initializer if tensor.dims[:1] == [260]]
    assert [tensor.data_type for tensor in stored if tensor.dims[1:] not in ([], [1])] == [onnx.TensorProto.INT8]
    assert len(list(Generator(out).tokens(PROMPT, max_tokens=9))) == 9
    assert {path.name for path in out.iterdir()} == {
        "prefill.onnx", "decode.onnx", "weights.data", "generator.json", "tokenizer.json"
    }  # fmt: skip
    for part in done["parts"]:
        inside = onnx.load(out / f"{part}.onnx", load_external_data=False).graph.initializer
        assert all(len(tensor.raw_data) < wire.LARGE for tensor in inside)


def test_a_bad_calibration_of_a_generator_is_refused(cli: Cli, tiny_generator: Any, tmp_path: Path) -> None:
    command = ["optimize", tiny_generator.root, "--passes", "dynaquant", "-o", tmp_path / "out", "--calibration"]
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("Call me")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "x.npz", "is no .txt file; a generator is calibrated on a text"),
        (tmp_path / "none.txt", "cannot be read as text"),
        (short, "the length of a sample"),
        (binary, "cannot be read as text"),
    ):
        assert message in cli(*command, path, expect=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_compiled_generator_generates(cli: Cli, compiled_generator: Path, tiny_generator: Any, text: Path) -> None:
    arguments = ["-p", PROMPT, "-n", 12, "--threads", 1]
    expected = cli("generate", tiny_generator.root, *arguments).stdout
    for backend in ([], ["--backend", "tvm"], ["--backend", "onnxruntime"]):
        assert cli("generate", compiled_generator, *arguments, *backend).stdout == expected
    found = json.loads(cli("perplexity", compiled_generator, "--text", text, "--length", 32, "--json").stdout)
    same = json.loads(cli("perplexity", tiny_generator.root, "--text", text, "--length", 32, "--json").stdout)
    assert found["backend"] == "tvm" and found["perplexity"] == pytest.approx(same["perplexity"], rel=1e-4)
    result = cli("compile", compiled_generator, expect=2)
    assert "is compiled; give the folder that `graphwright export` wrote" in result.stderr


# --- what is kept ------------------------------------------------------------------------------------------------


def test_a_generator_is_compiled_once(
    cli: Cli, cache: Path, tiny_generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compiling: that is another test's."""
    from graphwright.runtime import generator_build

    made: list[Path] = []

    def stand_in(source: Path, place: Path, **options: Any) -> None:
        made.append(place)
        place.mkdir()

    monkeypatch.setattr(generator_build, "compile_generator", stand_in)
    first = generators.ready(str(tiny_generator.root), "tvm")
    assert generators.ready(str(tiny_generator.root), "tvm") == first and made == [first]
    assert first.parent == cache / "generators" and first.name.startswith("tiny-compiled-")
    assert generators.ready(str(tiny_generator.root), None) == tiny_generator.root


def test_another_capacity_is_another_generator(cli: Cli, cache: Path, tiny_generator: Any) -> None:
    options = ["-p", "Call", "-n", 90, "--backend", "onnxruntime"]
    for capacity, stored in ((32, 32), (None, 512)):
        chosen = [] if capacity is None else ["--capacity", capacity]
        result = cli("generate", "gpt-moby", *options, *chosen)
        assert ("stopped: the cache is full (32 tokens)" in result.stderr) == (capacity == 32)
        found = [json.loads(path.read_text())["capacity"] for path in cache.glob("generators/*/generator.json")]
        assert stored in found
    assert sorted(found) == [32, 512]
    result = cli("generate", tiny_generator.root, "-p", "x", "--capacity", 12, expect=2)
    assert "was exported with 96; export the model again" in result.stderr
    cli("generate", tiny_generator.root, "-p", "x", "-n", 1, "--capacity", 96)


def test_a_new_generator_of_a_model_takes_the_place_of_the_old_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of another purpose stays, and one that a process uses."""
    monkeypatch.setattr(generators, "_make", lambda model, place, *_: (place.mkdir(), (place / "big").touch()))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    first, other = (generators.ready(str(file), "onnxruntime", capacity=capacity) for capacity in (None, 8))
    file.write_bytes(b"two")
    second = generators.ready(str(file), "onnxruntime")
    assert first.exists() and second.exists(), "this process may still run the first"
    os.close(generators._IN_USE.pop(first))
    file.write_bytes(b"three")
    third = generators.ready(str(file), "onnxruntime")
    assert {path.name for path in third.parent.iterdir() if path.is_dir()} == {p.name for p in (other, second, third)}
    assert not list(third.parent.glob(f".{first.name}*"))


def test_a_kept_generator_follows_from_its_files_and_what_it_is_made_for(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    places = {generators.kept_place(str(file), [file], compiles) for compiles in (False, True)}
    places |= {generators.kept_place(str(file), [file], False, capacity) for capacity in (64, 128)}
    file.write_bytes(b"two")
    places.add(generators.kept_place(str(file), [file], False))
    assert len(places) == 5 and generators.kept_place(str(file), [file], False) in places


def test_running_what_is_kept_imports_neither_torch_nor_a_compiler(cache: Path, compiled_generator: Path) -> None:
    """They would take longer than loading a small model, and more memory."""
    place = generators.kept_place("gpt-moby", generators.model_files("gpt-moby"), True)
    shutil.copytree(compiled_generator, place)
    code = "import contextlib, sys; from graphwright.tools.cli import main\n"
    code += "with contextlib.suppress(SystemExit): main(['generate', 'gpt-moby', '-p', 'Call', '-n', '3', '-q'])\n"
    code += "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tvm.relax'} & set(sys.modules)))\n"
    code += "print('libtvm_compiler' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "False"]


def test_a_process_waits_for_one_that_makes_the_same(
    cache: Path, tiny_generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is a lock that is held; in the meantime it finishes."""
    import threading

    files = sorted(path for path in tiny_generator.root.iterdir() if path.is_file())
    place = generators.kept_place(str(tiny_generator.root), files, True)
    place.parent.mkdir(parents=True)
    lock = os.open(generators._lock_of(place, "making"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    found: list[Path] = []
    waiter = threading.Thread(target=lambda: found.append(generators.ready(str(tiny_generator.root), "tvm")))
    waiter.start()
    time.sleep(0.3)
    assert not found
    place.mkdir()
    os.close(lock)
    waiter.join(timeout=30)
    assert found == [place]
