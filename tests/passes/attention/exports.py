"""Small models whose attention is written as different exporters and libraries write it."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from graphwright.models import export, llama, minilm, vit
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY = 48, 4, 50
SIZE = WIDTH // HEADS


class Gpt2(nn.Module):
    """As GPT-2 of the first years: Conv1D over flat rows, packed queries, keys and values, a triangle by Where."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / 7)
            self.bias = nn.Parameter(torch.randn(3 * WIDTH) / 7)
            self.output = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.register_buffer("triangle", torch.ones(64, 64).tril().bool().view(1, 1, 64, 64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(x)
            packed = torch.addmm(self.bias, rows.view(-1, WIDTH), self.weight).view(*x.shape[:2], 3 * WIDTH)
            q, k, v = packed.split(WIDTH, dim=2)
            q = q.view(*q.shape[:-1], HEADS, SIZE).permute(0, 2, 1, 3)
            k = k.view(*k.shape[:-1], HEADS, SIZE).permute(0, 2, 3, 1)
            v = v.view(*v.shape[:-1], HEADS, SIZE).permute(0, 2, 1, 3)
            scores = torch.matmul(q, k) / math.sqrt(SIZE)
            length = scores.shape[-1]
            triangle = self.triangle[:, :, :length, :length]
            scores = torch.where(triangle, scores, torch.tensor(torch.finfo(torch.float32).min))
            mixed = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
            return x + self.output(mixed.view(*mixed.shape[:-2], WIDTH))

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids))


class T5Attention(nn.Module):
    """No scale; a bias of relative positions, looked up in a table by the distance in buckets, beside a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        batch = x.shape[0]

        def split(t: Tensor) -> Tensor:
            return t.view(batch, -1, HEADS, SIZE).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(source)), split(self.v(source))
        scores = torch.matmul(q, k.transpose(3, 2))
        if bias is not None:
            scores = scores + bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.o(mixed.view(batch, -1, WIDTH))


class T5(nn.Module):
    """An encoder layer with relative positions, and a decoder layer that looks back at it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.table = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, HEADS)
        self.own, self.across = T5Attention(), T5Attention()

    def forward(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
        x = self.words(ids)
        length = ids.shape[1]
        place = torch.arange(length)
        buckets = (place[None, :] - place[:, None]).clamp(-4, 3) + 4
        hidden = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        bias = self.table(buckets).permute(2, 0, 1).unsqueeze(0) + hidden
        x = x + self.own(x, x, bias)
        return self.across(self.words(decoder_ids), x, hidden)


class Decoder(nn.Module):
    """torch.nn.TransformerDecoderLayer: self-attention with a triangle, and attention to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(WIDTH, HEADS, 64, 0.0, batch_first=True) for _ in "ab")

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask)
        return x


class Sdpa(nn.Module):
    """torch's scaled_dot_product_attention, causal, with grouped keys, as the newest exporters write it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(-2)


class Windows(nn.Module):
    """Attention in windows of an image, as in Swin: one mask for each window, added on five axes; a bias of places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, 16, 16))
        self.register_buffer("mask", torch.where(torch.rand(4, 16, 16) < 0.3, -100.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 2, 4, 2, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        q, k, v = self.qkv(rows).reshape(-1, 16, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * SIZE**-0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        scores = scores.view(-1, 4, HEADS, 16, 16) + self.mask.unsqueeze(1).unsqueeze(0)
        mixed = scores.view(-1, HEADS, 16, 16).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(-1, 16, WIDTH))


class MaskedFill(nn.Module):
    """As in "The Annotated Transformer": keys that the mask does not show get a score of -1e9."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (f(x).view(x.size(0), -1, HEADS, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(SIZE)
        weights = scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        return self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().view(x.size(0), -1, WIDTH))


IDS = torch.arange(16).reshape(2, 8)


class Einsums(nn.Module):
    """Products by einsum, once with heads behind the length, once in front; keys of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (HEADS, SIZE))

        def turned(t: Tensor) -> Tensor:
            return split(t).transpose(1, 2)

        q, k, v = self.q(x), self.k(source), self.v(source)
        scores = torch.einsum("bqhd,bkhd->bhqk", split(q), split(k)) / math.sqrt(SIZE)
        x = x + torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), split(v)).flatten(2)
        scores = torch.einsum("bhid,bhjd->bhij", turned(self.q(x)) * SIZE**-0.5, turned(k))
        mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), turned(v))
        return self.o(mixed.transpose(1, 2).flatten(2))


def scripted(module: nn.Module, example: tuple[Tensor, ...], names: dict[str, dict[int, str]]) -> ir.Model:
    """The exporter of torch before version 2, which traces; opset 14."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), example, file, dynamo=False, opset_version=14, input_names=list(names),
                          output_names=["y"], dynamic_axes=names)  # fmt: skip
    import onnx

    return ir.from_proto(onnx.load_from_string(file.getvalue()))


def tiny_minilm() -> ir.Model:
    sizes = minilm.Sizes(vocabulary=VOCABULARY, positions=64, width=WIDTH, layers=2, heads=HEADS, hidden=64)
    inputs = {"ids": ("batch", "length"), "mask": ("batch", "length")}
    mask = torch.ones_like(IDS)
    return export.from_torch("m", minilm.MiniLM(sizes), (IDS, mask), inputs, ("y", "z"), largest={"length": 64})


def scripted_minilm() -> ir.Model:
    """Without the sentence vector: what onnxruntime's transformer optimizer knows."""
    sizes = minilm.Sizes(vocabulary=VOCABULARY, positions=64, width=WIDTH, layers=2, heads=HEADS, hidden=64)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = minilm.MiniLM(sizes)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.inner(ids, mask)[0]

    axes = {0: "batch", 1: "length"}
    return scripted(Encoder(), (IDS, torch.ones_like(IDS)), {"ids": axes, "mask": axes})


def tiny_smollm2() -> ir.Model:
    small = {"vocabulary": VOCABULARY, "width": WIDTH, "layers": 2, "heads": 6, "key_value_heads": 2, "hidden": 64}
    sizes = dataclasses.replace(llama.Sizes(), **small)
    return export.from_torch("s", llama.Llama(8, sizes), (IDS,), {"ids": ("batch", 8)}, ("y",))


def tiny_vit() -> ir.Model:
    sizes = vit.Sizes(image=64, width=WIDTH, layers=2, heads=3, classes=10)
    return export.from_torch(
        "v", vit.seeded(0, sizes), (torch.ones(2, 3, 64, 64),), {"x": ("batch", 3, 64, 64)}, ("y",)
    )


def gpt2() -> ir.Model:
    return scripted(Gpt2(), (IDS,), {"ids": {0: "batch", 1: "length"}})


def t5(legacy: bool) -> ir.Model:
    example = (IDS, torch.ones_like(IDS), IDS[:, :5].clone())
    if legacy:
        axes = {0: "batch", 1: "length"}
        return scripted(T5(), example, {"ids": axes, "mask": axes, "decoder": {0: "batch", 1: "decoded"}})
    inputs = {"ids": ("batch", "length"), "mask": ("batch", "length"), "decoder": ("batch", "decoded")}
    return export.from_torch("t", T5(), example, inputs, ("y",))


def decoder(legacy: bool) -> ir.Model:
    example = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))
    if legacy:
        return scripted(Decoder(), example, {"x": {}, "memory": {}})
    return export.from_torch("d", Decoder(), example, {"x": ("batch", 5, WIDTH), "memory": ("batch", 7, WIDTH)}, ("y",))


def einsums(legacy: bool) -> ir.Model:
    example = (torch.randn(2, 8, WIDTH), torch.randn(2, 5, WIDTH))
    if legacy:
        return scripted(Einsums(), example, {"x": {0: "batch", 1: "length"}, "source": {0: "batch", 1: "decoded"}})
    inputs = {"x": ("batch", "length", WIDTH), "source": ("batch", "decoded", WIDTH)}
    return export.from_torch("e", Einsums(), example, inputs, ("y",))


def windows(legacy: bool) -> ir.Model:
    example = (torch.randn(2, 8, 8, WIDTH),)
    if legacy:
        return scripted(Windows(), example, {"x": {0: "batch"}})
    return export.from_torch("w", Windows(), example, {"x": ("batch", 8, 8, WIDTH)}, ("y",))


def masked_fill(legacy: bool) -> ir.Model:
    example = (IDS, torch.ones_like(IDS))
    if legacy:
        axes = {0: "batch", 1: "length"}
        return scripted(MaskedFill(), example, {"ids": axes, "mask": axes})
    return export.from_torch(
        "f", MaskedFill(), example, {"ids": ("batch", "length"), "mask": ("batch", "length")}, ("y",)
    )


def sdpa() -> ir.Model:
    """Opset 23: the exporter writes the standard's Attention."""
    program = torch.onnx.export(Sdpa().eval(), (IDS,), dynamo=True, opset_version=23, input_names=["ids"],
                                output_names=["y"], verbose=False)  # fmt: skip
    return program.model


@dataclass(frozen=True)
class Export:
    build: Callable[[], ir.Model]
    attentions: int


EXPORTS = {
    "minilm": Export(tiny_minilm, 2),
    "minilm-scripted": Export(scripted_minilm, 2),
    "smollm2": Export(tiny_smollm2, 2),
    "vit": Export(tiny_vit, 2),
    "gpt2-scripted": Export(gpt2, 2),
    "t5": Export(lambda: t5(False), 2),
    "t5-scripted": Export(lambda: t5(True), 2),
    "decoder": Export(lambda: decoder(False), 4),
    "decoder-scripted": Export(lambda: decoder(True), 4),
    "sdpa-opset-23": Export(sdpa, 1),
    "einsum": Export(lambda: einsums(False), 2),
    "einsum-scripted": Export(lambda: einsums(True), 2),
    "windows": Export(lambda: windows(False), 1),
    "windows-scripted": Export(lambda: windows(True), 1),
    "masked-fill": Export(lambda: masked_fill(False), 1),
    "masked-fill-scripted": Export(lambda: masked_fill(True), 1),
}
