"""The three matrix products of a BitLinear, output, input gradient and weight gradient: of integers where it is exact.

At λ = 1 the output is a product of int8 activations and ternary int8 codes, summed in int32 and multiplied by the
scales once, at the end. Where a device has no fast int8 product the same integers go through a float32 product, which
is exact as long as sums stay below 2^24. In float32 the gradients are products of integers too: the incoming gradient
in fixed point, 24 bits of each row's largest value, is three int8 digits, and what they are multiplied with (codes or
activations) is int8 already. A float32 product rounds as much.

Sources: Ma et al. (arXiv 2402.17764) for the layer, Bengio et al. (arXiv 1308.3432) for the straight-through gradient.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from bitconvert.ternary.learned import learned_gradients
from bitconvert.ternary.machine import cpu_has_fast_int8, cuda_has_int8
from bitconvert.ternary.quantize import Int8Tensor, TernaryTensor, codes_of, rounded

_CPU_IS_FAST = cpu_has_fast_int8()

_LARGEST_FIXED = 127 * 256**2
"""Fixed point ends here, so that rounding to three digits of -128 to 127 never carries the first one past 127."""

_ROWS_AT_ONCE = 128
"""Rows that are taken apart into digits together; their temporaries stay in the cache, and small."""

_SHORTEST_PIECE = 64
"""Where the scales change after fewer columns, one float product is faster than that many integer ones."""


class StraightThroughLinear(torch.autograd.Function):
    """``y = x' @ w'.T + bias`` with quantized x' and w', and the gradients of x' and w' for ``x`` and ``weight``.

    What the backward pass keeps of x' is its codes and scale (or, while activations are blended, the blend), and of w'
    nothing: given the scale, its codes are made again from the weight for a fraction of the product's time. The
    arguments of ``apply``:

        x: activations, shape (..., in).
        weight: latent weight, shape (out, in); or its codes, int8, where there is nothing else left of it.
        bias: shape (out,), or None.
        x_codes, x_scale: what ``x`` was rounded to (see Int8Tensor), or the blend and None.
        w_scale: of the ternary weight (see TernaryTensor); one that is learned gets a gradient.
        lam: scalar tensor that blends the weights; None where they are ternary.
        dtype: of the result, and of products that are not of integers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor | None,
        w_scale: Tensor,
        lam: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, x_scale, weight, w_scale, lam)
        ctx.x_dtype = x.dtype
        return _output(weight, bias, x_codes, x_scale, w_scale, lam, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, weight, w_scale, lam = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        rows = _rows(gradients[0])
        dx = dw = d_scale = None
        if for_x:
            dx = _input_gradient(rows, weight, w_scale, lam).to(ctx.x_dtype).view(x_codes.shape)
        if for_weight:
            x_scales = None if x_scale is None else _rows(x_scale)
            dw = _weight_gradient(rows, _rows(x_codes), x_scales).to(weight.dtype)
            if ctx.needs_input_grad[5]:
                dw, d_scale = learned_gradients(dw, weight, w_scale, lam)
        return dx, dw, rows.sum(0) if for_bias else None, None, None, d_scale, None, None


class LowRankLinear(torch.autograd.Function):
    """The same for a latent weight W + BA of which W is frozen; only A and B get gradients.

    Nothing of the size of W is kept for the backward pass, nor made there for the gradients: with g the gradient of y
    they are Bᵀ gᵀ x' and gᵀ x' Aᵀ, products of thin matrices if g B and x' Aᵀ come first. The arguments of ``apply``,
    where they differ from ``StraightThroughLinear``'s:

        base: W, of any float dtype, shape (out, in).
        a: A, float32, shape (rank, in).
        b: B, float32, shape (out, rank).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor | None,
        w_scale: Tensor,
        lam: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x_codes, x_scale, base, a, b, w_scale, lam)
        ctx.x_dtype = x.dtype
        return _output(low_rank_sum(base, a, b), bias, x_codes, x_scale, w_scale, lam, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, base, a, b, w_scale, lam = ctx.saved_tensors
        for_x, _, _, _, for_bias = ctx.needs_input_grad[:5]
        rows = _rows(gradients[0])
        dx = None
        if for_x:
            dx = _input_gradient(rows, low_rank_sum(base, a, b), w_scale, lam).to(ctx.x_dtype).view(x_codes.shape)
        x = _rows(_activations(x_codes, x_scale)).to(rows.dtype)
        da = (rows @ b.to(rows.dtype)).t() @ x
        db = rows.t() @ (x @ a.to(rows.dtype).t())
        return dx, None, da.to(a.dtype), db.to(b.dtype), rows.sum(0) if for_bias else None, None, None, None, None, None


def low_rank_sum(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + BA in float32, shape (out, in), whatever autocast would make of it."""
    with torch.autocast(base.device.type, enabled=False):
        return torch.addmm(base.float(), b, a)


def _output(
    weight: Tensor,
    bias: Tensor | None,
    x_codes: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor,
    lam: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        if lam is None and x_scale is not None and _is_worth_integers(x_scale, w_scale, x_codes.shape[-1]):
            y = _integer_product(Int8Tensor(x_codes, x_scale), _ternary(weight, w_scale)).to(dtype)
        else:
            w = _weights(weight, w_scale, lam).to(dtype)
            y = functional.linear(_activations(x_codes, x_scale).to(dtype), w)
        return y if bias is None else y.add_(bias)


def _integer_product(x: Int8Tensor, ternary: TernaryTensor) -> Tensor:
    """The output, by a product of integers for each stretch of columns that shares its scales: float32, (..., out)."""
    x_blocks, w_blocks, columns = x.scale.shape[-1], ternary.scale.shape[-1], x.codes.shape[-1]
    x_codes, x_scale = _rows(x.codes), _rows(x.scale)
    w_scale = ternary.scale.view(-1, w_blocks).t()
    pieces = math.lcm(x_blocks, w_blocks)
    total: Tensor | None = None
    for piece in range(pieces):
        part = slice(piece * columns // pieces, (piece + 1) * columns // pieces)
        product = _int8_matmul(x_codes[:, part], ternary.codes[:, part].t())
        product.mul_(x_scale[:, piece * x_blocks // pieces, None]).mul_(w_scale[piece * w_blocks // pieces])
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.view(*x.codes.shape[:-1], total.shape[-1])


def _is_worth_integers(x_scale: Tensor, w_scale: Tensor, columns: int) -> bool:
    pieces = math.lcm(x_scale.shape[-1], w_scale.shape[-1])
    return pieces == 1 or columns >= pieces * _SHORTEST_PIECE


def _weight_gradient(gradient: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """Gradient (tokens, out), transposed, @ x' (tokens, in)."""
    if scale is not None and scale.shape[-1] == 1 and _has_exact_integers(gradient):
        return cast(Tensor, _fixed_point_product(gradient.t(), scale.view(1, -1), codes))
    return gradient.t() @ _activations(codes, scale).to(gradient.dtype)


# Operators of their own, whose inside a compiler does not see: it would keep the rounded weights of the forward pass
# for the backward pass, and make all digits of a fixed-point matrix at once.


@torch.library.custom_op("bitconvert::input_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, weight: Tensor, scale: Tensor, lam: Tensor | None) -> Tensor:
    """Gradient (tokens, out) @ w' (out, in)."""
    if lam is None and scale.shape[-1] == 1 and _has_exact_integers(gradient):
        return _by_blocks(gradient, scale.view(1, -1), _ternary(weight, scale).codes)
    return gradient @ _weights(weight, scale, lam).to(gradient.dtype)


@_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, _scale: Tensor, _lam: Tensor | None) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight.shape[1])


@torch.library.custom_op("bitconvert::fixed_point_product", mutates_args=())
def _fixed_point_product(factor: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    return _by_blocks(factor, scale, codes)


@_fixed_point_product.register_fake
def _(factor: Tensor, _scale: Tensor, codes: Tensor) -> Tensor:
    return factor.new_empty(factor.shape[0], codes.shape[1])


def _has_exact_integers(gradient: Tensor) -> bool:
    """Whether a product of integers is as exact as one in the gradient's dtype, and faster; not if there are none."""
    fast = gradient.device.type == "cpu" and _CPU_IS_FAST
    return fast and gradient.dtype == torch.float32 and gradient.numel() > 0


def _by_blocks(factor: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """``(factor * scale) @ codes`` of float32 (rows, n), float32 (1, n) or (1, 1), and int8 (n, columns)."""
    result = factor.new_empty(factor.shape[0], codes.shape[1])
    for start in range(0, len(factor), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        _fixed_point_matmul(factor[rows] * scale, codes, out=result[rows])
    return result


def _fixed_point_matmul(factor: Tensor, codes: Tensor, out: Tensor) -> None:
    """The product of a float32 matrix, which is used up, and int8 codes: the floats as numbers of three int8 digits.

    Sums of products of two int8 numbers fill an int32 after 132,000 of them at the earliest.
    """
    largest = torch.maximum(factor.amax(dim=1, keepdim=True), -factor.amin(dim=1, keepdim=True))
    step = largest.clamp_(min=torch.finfo(torch.float32).tiny * _LARGEST_FIXED) / _LARGEST_FIXED
    low, middle, high = torch._int_mm(_digits(factor.div_(step).round_().to(torch.int32)), codes).chunk(3)
    out.copy_(low).div_(256).add_(middle).div_(256).add_(high).mul_(step * 256**2)


def _digits(fixed: Tensor) -> Tensor:
    """The digits of 24-bit numbers, each -128 to 127, the lowest first: int32 (rows, n) -> int8 (3 * rows, n)."""
    low = fixed.to(torch.int8)  # keeps the lowest eight bits
    middle = fixed.add_(128).bitwise_right_shift_(8).to(torch.int8)
    high = fixed.add_(128).bitwise_right_shift_(8).to(torch.int8)
    if fixed.stride(0) == 1:  # a transposed view: stay one, since a copy that transposes bytes is slow
        return torch.cat([low.t(), middle.t(), high.t()], dim=1).t()
    return torch.cat([low, middle, high])


def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two int8 matrices (m, k) and (k, n), as float32."""
    if (a.device.type == "cpu" and _CPU_IS_FAST) or (a.is_cuda and _cuda_takes(a, b)):
        return torch._int_mm(a, b).float()
    return a.float() @ b.float()


def _cuda_takes(a: Tensor, b: Tensor) -> bool:
    """The int8 product of cuBLAS wants more than 16 rows, and multiples of 8."""
    return a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0 and _cuda_has_int8(a.device.index)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_has_int8(index: int) -> bool:
    return cuda_has_int8(index)


def product_dtype(factor: Tensor) -> torch.dtype:
    """The dtype of a product with a tensor: that of autocast, where it is on, else the tensor's."""
    device = factor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else factor.dtype


def _ternary(weight: Tensor, scale: Tensor) -> TernaryTensor:
    """A weight rounded, or what the codes mean that it already is."""
    return TernaryTensor(weight if weight.dtype == torch.int8 else codes_of(weight, scale), scale)


def _weights(weight: Tensor, scale: Tensor, lam: Tensor | None) -> Tensor:
    """What a float product multiplies with: w' (out, in), which is ``w + λ (Q(w) - w)``, exact at both ends."""
    if lam is None:
        return _ternary(weight, scale).dequantize()
    return torch.lerp(weight, rounded(weight, scale).to(weight.dtype), lam.to(weight.dtype))


def _activations(codes: Tensor, scale: Tensor | None) -> Tensor:
    return codes if scale is None else Int8Tensor(codes, scale).dequantize()


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as (rows, n), whatever the strides and the number of dimensions."""
    return tensor.reshape(-1, tensor.shape[-1])
