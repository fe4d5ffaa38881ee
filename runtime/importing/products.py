"""Matrix products and convolutions in floating point. float16 accumulates in float32, dequantized numbers in int32."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from . import integer_products, rounded_products, sliding
from .block_weights import block_product
from .quantization import conv_pads, require_room
from .shapes import reshaped
from .site import NARROW_FLOATS, Dim, Refuse, Result, Site, Unfixed, const, constant_of, converts, dtype_of, is_float
from .stored import stored_weight

CONVOLUTIONS = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}
TRANSPOSED = {1: relax.op.nn.conv1d_transpose, 2: relax.op.nn.conv2d_transpose, 3: relax.op.nn.conv3d_transpose}
SPATIAL = {1: "W", 2: "HW", 3: "DHW"}


@converts("MatMul")
def matmul(site: Site) -> Result:
    dtype = site.dtype()
    if (whole := integer_products.matmul(site)) is not None:
        return whole[0]
    if dtype not in NARROW_FLOATS:
        if (rounded := rounded_products.matmul(site)) is not None:
            return rounded
        stored = stored_weight(site, 1)
        if stored is not None:
            return relax.op.matmul(site.x(0), stored, out_dtype=dtype)
        product = block_product(site, site.x(0), site.x(1))
        return relax.op.matmul(site.x(0), site.x(1)) if product is None else product
    both = [site.value(0), site.value(1)]
    if any(v.wide is not None for v in both) and not any(constant_of(v.expr) is not None for v in both):
        return site.narrowed(relax.op.matmul(site.widened(0), site.widened(1)), dtype)
    # Small weights stay small; their products are added up in float32.
    return site.narrowed(relax.op.matmul(site.x(0), site.x(1), out_dtype="float32"), dtype)


@converts("Gemm")
def gemm(site: Site) -> Result:
    """alpha * A' B' + beta * C, C broadcast."""
    dtype = site.dtype()
    alpha, beta = float(site.attr("alpha", 1.0)), float(site.attr("beta", 1.0))
    if not is_float(dtype) and not (alpha.is_integer() and beta.is_integer()):
        raise Refuse("integers are scaled by a fraction")
    plain = alpha == beta == 1.0 and not site.attr("transA", 0)
    whole = integer_products.matmul(site, bool(site.attr("transB", 0)), 2) if plain else None
    if whole is not None:
        y, added = whole
        return y if added or not site.has(2) else relax.op.add(y, site.x(2))
    a, b = site.x(0), site.x(1)
    if site.attr("transA", 0):
        a = site.emit(relax.op.permute_dims(a, [1, 0]))
    rounded = None if site.attr("transA", 0) else rounded_products.matmul(site, bool(site.attr("transB", 0)))
    stored = stored_weight(site, 1, bool(site.attr("transB", 0)))
    if stored is not None:
        b = stored
    elif site.attr("transB", 0):
        weight = site.array(1)
        b = site.emit(relax.op.permute_dims(b, [1, 0])) if weight is None else const(weight.T, dtype)
    if dtype in NARROW_FLOATS:
        y = site.cast(relax.op.matmul(a, b, out_dtype="float32"), dtype)
    else:
        product = rounded if rounded is not None or stored is not None else block_product(site, a, b)
        y = relax.op.matmul(a, b, out_dtype=None if stored is None else dtype) if product is None else product
        y = site.emit(y)
    if alpha != 1.0:
        y = site.emit(relax.op.multiply(y, const(alpha, dtype)))
    if not site.has(2) or beta == 0.0:
        return y
    c = site.x(2)
    if beta != 1.0:
        c = site.emit(relax.op.multiply(c, const(beta, dtype)))
    return relax.op.add(y, c)


def _with_bias(site: Site, y: tvm.ir.Expr, rank: int, dtype: str) -> tvm.ir.Expr:
    y = site.cast(y, dtype)
    if not site.has(2):
        return y
    (channels,) = site.shape(2)
    dims: list[Dim] = [1, channels, *([1] * rank)]
    bias = site.array(2)
    shaped = reshaped(site, site.x(2), dims) if bias is None else const(bias.reshape([int(d) for d in dims]), dtype)
    return site.emit(relax.op.add(y, shaped))


def _attributes(site: Site) -> tuple[int, list[int], list[int], list[int]]:
    """Spatial rank, kernel shape, strides and dilations."""
    rank = site.rank() - 2
    if rank not in CONVOLUTIONS:
        raise Refuse(f"a convolution over {rank} axes is not compiled")
    kernel = [k for k in site.shape(1)[2:] if isinstance(k, int)]
    if len(kernel) != rank:
        raise Unfixed("the size of its kernel is not known")
    strides = [int(s) for s in site.attr("strides", [1] * rank)]
    return rank, kernel, strides, [int(d) for d in site.attr("dilations", [1] * rank)]


@converts("Conv")
def conv(site: Site) -> Result:
    dtype = site.dtype()
    rank, kernel, strides, dilations = _attributes(site)
    if (whole := integer_products.conv(site, kernel, strides, dilations)) is not None:
        return whole
    before, after = conv_pads(site, site.shape()[2:], kernel, strides, dilations)
    require_room(site, site.shape()[2:], kernel, dilations, before, after)
    if (rounded := rounded_products.conv(site, kernel, strides, dilations, before, after)) is not None:
        return _with_bias(site, rounded, rank, dtype)
    if (sums := sliding.convolution(site, kernel, strides, dilations, before, after)) is not None:
        return sums
    x, weight, stored = site.x(0), site.x(1), stored_weight(site, 1)
    weight = weight if stored is None else stored
    options: dict[str, Any] = {"out_dtype": "float32"} if dtype_of(weight) in NARROW_FLOATS else {}
    y = CONVOLUTIONS[rank](
        x, weight, strides=strides, padding=[*before, *after], dilation=dilations,
        groups=int(site.attr("group", 1)), data_layout="NC" + SPATIAL[rank], kernel_layout="OI" + SPATIAL[rank],
        **options,
    )  # fmt: skip
    return _with_bias(site, site.emit(y), rank, dtype)


@converts("ConvTranspose")
def conv_transpose(site: Site) -> Result:
    """Padding follows from output_shape or auto_pad as the standard has it."""
    dtype = site.dtype()
    rank, kernel, strides, dilations = _attributes(site)
    extra = [int(p) for p in site.attr("output_padding", [0] * rank)]
    sizes = site.shape()[2:]
    pads = [int(p) for p in site.attr("pads", [0] * (2 * rank))]
    before, after = pads[:rank], pads[rank:]
    auto = site.attr("auto_pad", "NOTSET") or "NOTSET"
    wanted = site.attr("output_shape")
    if auto == "VALID":
        before, after = [0] * rank, [0] * rank
    elif wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for axis in range(rank):
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            if wanted is not None:
                size = sizes[axis]
                if not isinstance(size, int):
                    raise Unfixed("an output shape for a dynamic input")
                total = strides[axis] * (size - 1) + extra[axis] + reach - int(list(wanted)[-rank:][axis])
            else:
                total = reach + extra[axis] - strides[axis]
            if total < 0:
                # More is wanted than the operator gives: the rest is padding at the end.
                extra[axis] -= total
                total = 0
            less = total // 2
            before.append(less if auto == "SAME_UPPER" else total - less)
            after.append(total - before[-1])
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True) if e):
        raise Refuse(f"output padding {extra} is not below the strides {strides}")
    x, weight = site.x(0), site.x(1)
    if dtype in NARROW_FLOATS:
        x, weight = site.cast(x, "float32"), site.cast(weight, "float32")
    y = TRANSPOSED[rank](
        x, weight, strides=strides, padding=[*before, *after], output_padding=extra, dilation=dilations,
        groups=int(site.attr("group", 1)), data_layout="NC" + SPATIAL[rank], kernel_layout="IO" + SPATIAL[rank],
    )  # fmt: skip
    return _with_bias(site, site.emit(y), rank, dtype)
