"""The pictures of docs/explanation.md: what the package's own functions do to the tensors of the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bitconvert.demo.demo import MODEL
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.packing.formats import FORMATS, GgufFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.products import StraightThroughLinear
from bitconvert.ternary.quantize import quantize_int8, rounded, scale_of, ternarize
from bitconvert.ternary.schedule import LAMBDA_CURVES, lambda_at

_MATRIX = "model.layers.1.mlp.up_proj.weight"
_ABSMEAN, _LEAST_SQUARES = Scaling(estimator="absmean"), Scaling(estimator="mse")
_COLOURS = {-1: "tab:blue", 0: "tab:gray", 1: "tab:orange"}


def rounding() -> Figure:
    """The weights of a matrix and the three values that they become; the error over the scale."""
    weight = _weight()
    figure, (left, right) = _panels(2)
    ternary = ternarize(weight, _LEAST_SQUARES)
    scale = ternary.scale.item()
    bins = np.linspace(-4 * scale, 4 * scale, 161).tolist()
    for code, colour in _COLOURS.items():
        members = weight[ternary.codes == code]
        share = members.numel() / weight.numel()
        left.hist(members, bins, color=colour, alpha=0.7, label=f"{share:.0%} become {code * scale:.3g}")
        left.axvline(code * scale, color=colour, linewidth=2)
    left.set(title=f"{_MATRIX}\nlines: the three values; colours: what goes there", xlabel="weight", ylabel="weights")
    left.legend(loc="upper right", bbox_to_anchor=(1.0, 0.75))
    scales = np.linspace(0.3, 2.2, 80) * scale
    errors = [_relative_error(weight, torch.tensor([s], dtype=torch.float32)) for s in scales]
    right.plot(scales, errors, color="black")
    for scaling, colour in ((_ABSMEAN, "tab:red"), (_LEAST_SQUARES, "tab:green")):
        chosen = scale_of(weight, scaling)
        error = _relative_error(weight, chosen)
        right.plot(chosen, error, "o", color=colour, label=f"{scaling.estimator}: s = {chosen.item():.3f}, {error:.3f}")
    right.set(title="squared error over squared weights", xlabel="scale s", ylim=(0, None))
    right.legend()
    return figure


def blend() -> Figure:
    """Where the weights of a matrix are at four values of λ."""
    weight = _weight()
    scale = scale_of(weight, _LEAST_SQUARES)
    figure, panels = _panels(4, width=3.5)
    for axes, lam in zip(panels, (0.0, 0.5, 0.9, 1.0), strict=True):
        used = _forward_weight(weight, lam)
        axes.hist(used.flatten(), (np.linspace(-4, 4, 161) * scale.item()).tolist(), color="tab:purple")
        axes.set(title=f"λ = {lam:g}", xlabel="weight that is multiplied with", yticks=[], xticks=[-0.5, 0, 0.5])
    panels[0].set(ylabel="weights")
    return figure


def straight_through() -> Figure:
    """What a weight becomes, and the gradient that it gets, at three values of λ."""
    scale = scale_of(_weight(), _LEAST_SQUARES).item()
    weights = torch.linspace(-2.2 * scale, 2.2 * scale, 801).unsqueeze(1).requires_grad_()
    figure, (forward, backward) = _panels(2)
    for lam, style in ((0.0, ":"), (0.5, "--"), (1.0, "-")):
        used = _forward_weight(weights, lam)
        (gradient,) = torch.autograd.grad(used.sum(), weights)
        forward.plot(weights.detach(), used.detach(), style, color="tab:purple", label=f"λ = {lam:g}")
        backward.plot(
            weights.detach(), gradient, style, color="tab:purple", label=f"λ = {lam:g}", linewidth=3 - 2 * lam
        )
    forward.set(title="forward: W + λ (Q(W) − W)", xlabel="latent weight", ylabel="weight that is multiplied with")
    backward.set(
        title="backward: what the latent weight gets of a gradient of 1", xlabel="latent weight", ylim=(0, 1.5)
    )
    for axes in (forward, backward):
        axes.legend()
    return figure


def ramp() -> Figure:
    """λ over a training, for each curve."""
    progress = np.linspace(0, 1, 401)
    figure, (axes,) = _panels(1, width=8)
    for curve in LAMBDA_CURVES:
        axes.plot(progress, [lambda_at(t, curve, reach_one_at=0.25) for t in progress], label=curve)
    axes.plot(
        progress, [lambda_at(t, "linear", reach_one_at=0.1) for t in progress], "k:", label="activations (linear)"
    )
    axes.set(title="λ with reach_one_at 0.25, of the activations 0.1", xlabel="share of the training", ylabel="λ")
    axes.legend()
    return figure


def activations() -> Figure:
    """A token's activations as int8 codes, under one scale and under one for every 32."""
    token = _token_activations()
    figure, (values, errors) = _panels(2)
    for block, colour in ((None, "tab:red"), (32, "tab:green")):
        quantized = quantize_int8(token, block)
        label = "one scale for the token (BitNet)" if block is None else "one for 32 (Q2_0, Q8_0 in llama.cpp)"
        steps = quantized.scale.repeat_interleave(token.numel() // quantized.scale.numel())
        values.step(range(token.numel()), steps * 127, color=colour, linewidth=1.5, label=f"±127 · scale, {label}")
        values.step(range(token.numel()), -steps * 127, color=colour, linewidth=1.5)
        error = (quantized.dequantize() - token).norm() / token.norm()
        errors.plot((quantized.dequantize() - token).abs(), ".", color=colour, label=f"{label}: {error:.2%} in all")
    values.plot(token, ".", color="black", markersize=3)
    values.set(title="what down_proj of layer 1 gets for one token", xlabel="feature", ylabel="activation")
    errors.set(title="rounding error of each", xlabel="feature", yscale="log", ylim=(3e-6, None))
    values.set(ylim=(-60, 95))
    values.legend(fontsize="small", loc="upper left")
    errors.legend(fontsize="small", loc="lower right")
    return figure


def packing() -> Figure:
    """Codes of the matrix in a byte of TQ1_0 and in one of TQ2_0."""
    figure, panels = _panels(2, width=7)
    _draw_byte(panels[0], "tq1_0", 5, lambda trits: sum(t * 3 ** (4 - i) for i, t in enumerate(trits)))
    _draw_byte(panels[1], "tq2_0", 4, lambda trits: sum(t << 2 * i for i, t in enumerate(trits)))
    return figure


def _draw_byte(axes: Axes, name: str, count: int, number: Callable[[list[int]], int]) -> None:
    """The first byte of a row: its codes, 32 apart, and what they become. The row is the first with all three early."""
    ternary = ternarize(_weight(), _LEAST_SQUARES).with_fp16_scale()
    index = next(i for i, codes in enumerate(ternary.codes[:, :128:32].tolist()) if len(set(codes)) == 3)
    codes = ternary.codes[index, : 32 * count : 32].tolist()
    row = FORMATS[name]
    assert isinstance(row, GgufFormat)
    byte = int(row.encode(ternary)[index, 0])
    trits = [code + 1 for code in codes]
    for i, (code, trit) in enumerate(zip(codes, trits, strict=True)):
        axes.add_patch(Rectangle((i, 1.6), 0.9, 0.9, color=_COLOURS[code], alpha=0.7))
        axes.text(i + 0.45, 2.05, f"{code:+d}" if code else "0", ha="center", va="center", fontsize=14)
        axes.text(i + 0.45, 2.65, f"w[{index}, {32 * i}]", ha="center", fontsize=9)
        axes.text(i + 0.45, 1.35, f"trit {trit}", ha="center", fontsize=9)
    value = number(trits)
    if name == "tq1_0":
        lines = [
            f"v = {' + '.join(f'{t}·{3 ** (4 - i)}' for i, t in enumerate(trits))} = {value}   (0 … 242)",
            f"byte = ⌈256 · {value} / 243⌉ = {-(-256 * value // 243)}   (stored: {byte})",
            f"back: (3 · {byte}) >> 8 = {3 * byte >> 8}, the first trit; the next is in (3 · {byte}) mod 256",
        ]
    else:
        lines = [
            f"byte = {' + '.join(f'{t}·{4**i}' for i, t in enumerate(trits))} = {value}   (stored: {byte})",
            f"in bits: {byte:08b}, two for each trit, the first lowest",
            f"back: {byte} & 3 = {byte & 3}, the first trit; the next is in {byte} >> 2",
        ]
    for i, line in enumerate(lines):
        axes.text(0, 0.85 - 0.4 * i, line, fontsize=11)
    bits = f"{row.bits_per_weight:g} bits per weight with a float16 scale for {row.row_multiple}"
    axes.set(title=f"{name.upper()}: {count} weights in a byte, {bits}", xlim=(-0.1, 5.4), ylim=(-0.3, 3))
    axes.axis("off")


@cache
def _weight() -> Tensor:
    return open_checkpoint(str(MODEL)).read(_MATRIX).float()


def _relative_error(weight: Tensor, scale: Tensor) -> float:
    return ((rounded(weight, scale) - weight).square().sum() / weight.square().sum()).item()


def _forward_weight(weight: Tensor, lam: float) -> Tensor:
    """What a BitLinear with this latent weight multiplies with at λ: its answers to unit vectors that stay floats."""
    ones = torch.eye(weight.shape[1])
    blend = None if lam == 1 else torch.tensor(lam)
    scale = scale_of(_weight(), _LEAST_SQUARES)
    answers: Tensor = StraightThroughLinear.apply(ones, weight, None, ones, None, scale, blend, torch.float32)
    return answers.T


def _panels(count: int, width: float = 6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, 4), layout="constrained")
    panels = [figure.add_subplot(1, count, place) for place in range(1, count + 1)]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _token_activations() -> Tensor:
    """What down_proj of layer 1 gets for the last token of a sentence, in the full-precision model."""
    checkpoint = open_checkpoint(str(MODEL))
    model = checkpoint.load()
    seen: list[Tensor] = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(**checkpoint.tokenizer()("Once, there was a clever little girl named", return_tensors="pt"))
    return seen[0][0, -1]


PICTURES: dict[str, Callable[[], Figure]] = {
    each.__name__.replace("_", "-"): each for each in (rounding, blend, straight_through, ramp, activations, packing)
}
