"""The table of models: what it says, what it refuses, and that samples have the shapes it promises."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import graphwright.models
import numpy as np
import onnx
import pytest
from graphwright.models import assets, registry, samples
from graphwright.passes.errors import AssetError, OutputError, UsageError

OFFLINE = ["mobilenet-v2", "resnet-50", "vit-tiny", "vit-small", "mobilenet-v3-small", "unet"]
COPIED = ["ocr-det", "ocr-cls", "magika", "silero-vad"]
TEXT = ["minilm", "smollm2"]
CODEC = [f"hyperprior-{part}" for part in ("analysis", "hyper-analysis", "hyper-synthesis", "synthesis")]


def test_the_table_has_every_model_once_and_its_assets_exist() -> None:
    names = registry.names()
    assert sorted(names) == sorted([*OFFLINE, "gpt-mini", *COPIED, *TEXT, *CODEC, "efficientnet-lite0"])
    for name in names:
        entry = registry.describe(name)
        assert set(entry.needs_assets + entry.sample_assets) <= set(assets.ASSETS)
        assert entry.description and entry.licence and entry.source


def test_pins_replace_every_word_by_a_size() -> None:
    assert registry.pins("minilm") == {"input_ids": (1, 128), "attention_mask": (1, 128)}
    assert registry.pins("minilm", {"sequence": 16})["input_ids"] == (1, 16)
    assert registry.pins("silero-vad") == {"input": (1, 576), "sr": (), "state": (2, 1, 128)}


def test_axes_fixed_by_an_export_option_are_not_dynamic() -> None:
    assert registry.describe("smollm2").options == {"length": 32}
    assert registry.describe("smollm2").dynamic_axes == {}
    assert registry.describe("minilm").dynamic_axes["input_ids"] == {0: "batch", 1: "sequence"}


def test_unknown_names_are_one_line_with_the_nearest_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model 'minilmm': did you mean minilm"):
        registry.describe("minilmm")
    with pytest.raises(UsageError, match="minilm has no size 'sequense': did you mean sequence"):
        registry.pins("minilm", {"sequense": 3})
    with pytest.raises(UsageError, match="minilm: batch is 0, expected at least 1"):
        registry.pins("minilm", {"batch": 0})
    with pytest.raises(UsageError, match="smollm2 has no option 'lenght': did you mean length"):
        registry.export("smollm2", tmp_path / "m.onnx", lenght=3)
    with pytest.raises(AssetError, match="no model or asset 'mikilm': did you mean minilm"):
        registry.fetch("mikilm")


@pytest.mark.parametrize("name", ["minilm", "efficientnet-lite0", "smollm2", *COPIED])
def test_absent_weights_name_the_command_that_fetches_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(AssetError, match=f"{name} needs .* run `graphwright models fetch {name}`"):
        registry.export(name, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="already exists"):
        registry.export("mobilenet-v2", path)
    assert path.read_bytes() == b"mine"


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "graphwright.models.mobilenet", raising=False)
    monkeypatch.delattr(graphwright.models, "mobilenet", raising=False)
    with pytest.raises(AssetError, match=r"^mobilenet-v2 needs torch, .* `pip install 'graphwright\[models\]'`$"):
        registry.export("mobilenet-v2", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_a_file_has_no_torch_module() -> None:
    with pytest.raises(UsageError, match="magika is an ONNX file, not a torch module"):
        registry.torch_module("magika")


def test_the_torch_module_takes_the_options_of_the_export() -> None:
    for name in (*OFFLINE, *TEXT, "gpt-mini", "efficientnet-lite0"):
        entry = registry.describe(name)
        assert entry.module is not None
        assert inspect.signature(entry.module).parameters.keys() == entry.options.keys()


@pytest.mark.parametrize("name", OFFLINE)
def test_seeded_image_models_have_samples_without_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "empty"))
    assert registry.fetch(name) == []
    assert registry.sample_inputs(name, dims={"batch": 2})["image"].shape == (2, 3, 224, 224)


def test_a_byte_decoder_reads_the_text_of_the_samples() -> None:
    ids = registry.sample_inputs("gpt-mini", 3, {"batch": 2, "sequence": 40})["input_ids"]
    assert bytes(ids[0].astype(np.uint8).tolist()).decode() in samples.TEXT * 2
    assert ids.shape == (2, 40) and not np.array_equal(ids[0], ids[1])


@pytest.mark.assets
@pytest.mark.parametrize("name", ["minilm", "efficientnet-lite0", "smollm2", *COPIED])
def test_samples_have_the_promised_shapes_and_repeat(name: str, fetched: Callable[[str], None]) -> None:
    fetched(name)
    entry = registry.describe(name)
    sizes = {word: 2 * size for word, size in entry.sizes.items()}
    feeds = registry.sample_inputs(name, 7, sizes)
    assert {key: array.shape for key, array in feeds.items()} == registry.pins(name, sizes)
    again = registry.sample_inputs(name, 7, sizes)
    assert all(np.array_equal(array, again[key]) for key, array in feeds.items())


@pytest.mark.assets
@pytest.mark.parametrize("name", COPIED)
def test_copied_models_fit_their_entry(name: str, exported: Callable[..., Path]) -> None:
    """Byte for byte the published file, with the inputs that the table says."""
    path = exported(name)
    entry = registry.describe(name)
    assert path.read_bytes() == assets.find(entry.needs_assets[0]).read_bytes()
    inputs = {i.name: i.type.tensor_type for i in onnx.load(path).graph.input}
    feeds = registry.sample_inputs(name)
    assert set(inputs) == set(entry.inputs) == set(feeds)
    for key, shape in entry.inputs.items():
        dims = inputs[key].shape.dim
        assert len(dims) == len(shape)
        assert all(d.dim_value == size for d, size in zip(dims, shape, strict=True) if isinstance(size, int))
        assert onnx.helper.np_dtype_to_tensor_dtype(feeds[key].dtype) == inputs[key].elem_type
