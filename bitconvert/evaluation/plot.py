"""The picture of a ternary model: zero fraction, scale and rounding error, per layer and kind of projection."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError
from bitconvert.report.inspection import InspectReport, TensorReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#D55E00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
"""Colours that the colour-blind see apart, and markers. Source: Okabe and Ito, "Color Universal Design" (2008)."""

_ORDER = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")
"""Of the kinds of projection, as a token passes them."""

_UNMEASURED = "not measured: name what it came from with --against"

Lines = dict[str, dict[int, TensorReport]]
"""The ternary linears, by kind (q, k … down) and layer."""


def plot_tensors(report: InspectReport, picture: Path) -> None:
    """Draw the ternary linears of a model; the ending of ``picture`` says the format.

    Raises:
        BitconvertError: there is none, or the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    lines = tensors_by_kind(report)
    figure = Figure(figsize=(10, 9), layout="constrained")
    zeros, scale, error = figure.subplots(3, 1, sharex=True)
    figure.suptitle(f"{report.model} ({report.kind}): {sum(map(len, lines.values()))} ternary matrices")
    _draw(zeros, lines, lambda tensor: tensor.zero_fraction)
    zeros.set(title="zeros among the codes")
    zeros.yaxis.set_major_formatter(PercentFormatter(1.0))
    _draw(scale, lines, lambda tensor: tensor.scale.mean if tensor.scale and tensor.scale.count else None)
    scale.set(title="scale (mean of the matrix)", ylim=(0, None))
    _draw(error, lines, lambda tensor: tensor.error)
    error.set(title=f"relative error against {report.error_against or 'the original'}", xlabel="layer")
    if report.error_against is None:
        error.text(0.5, 0.5, _UNMEASURED, ha="center", va="center", transform=error.transAxes)
        error.set(yticks=[])
    error.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (zeros, scale, error):
        axes.grid(alpha=0.3)
    figure.legend(*zeros.get_legend_handles_labels(), loc="outside right center", title="projection")
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, dpi=110, format=picture.suffix.lstrip(".").lower())


def _draw(axes: Axes, lines: Lines, value: Callable[[TensorReport], float | None]) -> None:
    """A line for each kind, with gaps where a layer has none that is ternary."""
    layers = range(1 + max(layer for line in lines.values() for layer in line))
    for (kind, line), (color, marker) in zip(lines.items(), _LOOKS, strict=False):
        values = [value(line[layer]) if layer in line else None for layer in layers]
        heights = [math.nan if height is None else height for height in values]
        axes.plot(layers, heights, color=color, marker=marker, label=kind, linewidth=1.2, markersize=4)


def tensors_by_kind(report: InspectReport) -> Lines:
    """The ternary linears of a model by kind and layer, in the order in which a token passes them.

    Raises:
        BitconvertError: there is none.
    """
    found: Lines = {}
    for tensor in report.tensors:
        place = re.fullmatch(r"model\.layers\.(\d+)\..*?(\w+?)(?:_proj)?\.weight", tensor.hf_name)
        if tensor.ternary and place:
            found.setdefault(place[2], {})[int(place[1])] = tensor
    if not found:
        raise BitconvertError(
            f"{report.model}: none of its linear layers is ternary, so that there is nothing to draw",
            "give a checkpoint that warmup wrote, or a file packed from it",
        )
    return {kind: found[kind] for kind in sorted(found, key=_ORDER.index)}
