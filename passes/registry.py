"""Every pass and preset by name. Third parties add theirs through the entry-point group `graphwright.passes`."""

from __future__ import annotations

import functools
import importlib
from importlib import metadata

from .base import Pass
from .errors import PassError, UsageError, did_you_mean
from .spec import SEPARATOR, parse_options

ENTRY_POINTS = "graphwright.passes"

PASSES: dict[str, str] = {
    "pin-shapes": "graphwright.passes.prepare.pin_shapes:PinShapes",
    "infer-shapes": "graphwright.passes.prepare.infer_shapes:InferShapes",
    "fold-constants": "graphwright.passes.prepare.fold_constants:FoldConstants",
    "fold-batch-norm": "graphwright.passes.prepare.fold_batch_norm:FoldBatchNorm",
    "fold-pad": "graphwright.passes.prepare.fold_pad:FoldPad",
    "dead-code": "graphwright.passes.prepare.dead_code:DeadCode",
    "common-subexpressions": "graphwright.passes.prepare.common_subexpressions:CommonSubexpressions",
    "simplify": "graphwright.passes.prepare.simplify:Simplify",
    "cancel-transposes": "graphwright.passes.prepare.cancel_transposes:CancelTransposes",
    "lift-constants": "graphwright.passes.prepare.lift_constants:LiftConstants",
    "dedupe-initializers": "graphwright.passes.prepare.dedupe_initializers:DedupeInitializers",
    "inline-functions": "graphwright.passes.prepare.inline_functions:InlineFunctions",
    "convert-opset": "graphwright.passes.prepare.convert_opset:ConvertOpset",
    "standardise-contrib": "graphwright.passes.prepare.standardise_contrib:StandardiseContrib",
    "decompose": "graphwright.passes.prepare.decompose:Decompose",
    "recognise-layer-norm": "graphwright.passes.recognise.layer_norm:RecogniseLayerNorm",
    "recognise-rms-norm": "graphwright.passes.recognise.rms_norm:RecogniseRmsNorm",
    "recognise-gelu": "graphwright.passes.recognise.gelu:RecogniseGelu",
    "recognise-swish": "graphwright.passes.recognise.swish:RecogniseSwish",
    "recognise-hard-swish": "graphwright.passes.recognise.hard_swish:RecogniseHardSwish",
    "recognise-softmax": "graphwright.passes.recognise.softmax:RecogniseSoftmax",
    "recognise-rotary-embedding": "graphwright.passes.recognise.rotary_embedding:RecogniseRotaryEmbedding",
    "recognise-attention": "graphwright.passes.recognise.attention:RecogniseAttention",
    "recognise-softplus-attention": "graphwright.passes.recognise.softplus_attention:RecogniseSoftplusAttention",
    "fused-attention": "graphwright.passes.attention.fused_attention:FusedAttention",
    "softmax-top-k": "graphwright.passes.attention.softmax_top_k:SoftmaxTopK",
    "two-pass-softmax": "graphwright.passes.attention.two_pass_softmax:TwoPassSoftmax",
    "softplus-attention": "graphwright.passes.attention.softplus_attention:SoftplusAttention",
    "linear-attention": "graphwright.passes.attention.linear_attention:LinearAttention",
    "stablemax": "graphwright.passes.attention.stablemax:Stablemax",
    "dynaquant": "graphwright.passes.quantize.dynaquant:DynaQuant",
    "nested-widths": "graphwright.passes.quantize.nested_widths:NestedWidths",
    "bf16": "graphwright.passes.quantize.bf16:Bf16",
    "block-activations": "graphwright.passes.quantize.block_activations:BlockActivations",
}

# Formulas in small operators become the standard's large ones: larger patterns may hold what smaller ones find.
RECOGNISE = (
    "recognise-layer-norm,recognise-rms-norm,recognise-gelu,recognise-swish,recognise-hard-swish,recognise-softmax,"
    "recognise-rotary-embedding,recognise-attention"
)

PRESETS: dict[str, str] = {
    # Cleans a model for any runtime.
    "default": "pin-shapes,infer-shapes,fold-constants,simplify,fold-batch-norm,cancel-transposes,"
    "fold-pad,dedupe-initializers,common-subexpressions,dead-code",
    # What a compiler needs: one opset, no functions, no constants as nodes, large operators, only those it has.
    "compile": "inline-functions,pin-shapes,standardise-contrib,convert-opset,infer-shapes,fold-constants,simplify,"
    f"infer-shapes,fold-constants,simplify,fold-batch-norm,{RECOGNISE},infer-shapes,fold-constants,cancel-transposes,"
    "fold-pad,decompose,infer-shapes,fold-constants,simplify,cancel-transposes,lift-constants,dedupe-initializers,"
    "common-subexpressions,dead-code,infer-shapes",
    "none": "",
}


@functools.cache
def third_party() -> dict[str, metadata.EntryPoint]:
    """Passes of other packages by name. A name that graphwright has itself cannot be taken."""
    return {e.name: e for e in metadata.entry_points(group=ENTRY_POINTS) if e.name not in PASSES}


def pass_names() -> list[str]:
    return [*PASSES, *sorted(third_party())]


def pass_class(name: str) -> type[Pass]:
    """The class of that name; snake_case is accepted. Raises UsageError with the closest names."""
    key = name.strip().replace("_", "-")
    if key in PASSES:
        module, _, attribute = PASSES[key].partition(SEPARATOR)
        cls = getattr(importlib.import_module(module), attribute)
    elif key in third_party():
        entry = third_party()[key]
        try:
            cls = entry.load()
        except Exception as error:  # whatever a foreign package does on import
            raise PassError(f"pass {key!r} of {entry.value!r} cannot be loaded: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise PassError(f"pass {key!r} of {entry.value!r} is not a subclass of graphwright.passes.base.Pass")
    else:
        raise UsageError(f"unknown pass {name!r}; {did_you_mean(key, pass_names())}")
    if cls.name != key:
        raise PassError(f"pass {key!r} is registered under a name that is not its own ({cls.name!r})")
    return cls


def parse_pass(text: str) -> Pass:
    """`name:key=value:...` -> the pass. Inverse of `str(pass)`."""
    name, *options = text.strip().split(SEPARATOR)
    cls = pass_class(name)
    return parse_options(cls, cls.name, options)


def preset(name: str) -> str:
    """The pipeline string of a preset. Raises UsageError with the closest names."""
    key = name.replace("_", "-")
    if key not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; {did_you_mean(key, PRESETS)}")
    return PRESETS[key]
