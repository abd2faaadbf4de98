"""The picture of a run: loss, KL, held-out ppl, λ and learning rate over steps."""

from __future__ import annotations

from pathlib import Path

from bitconvert.training.metrics import read_metrics


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draw a run's metrics.jsonl as a PNG."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, ppl, lam, rate = figure.subplots(2, 2, sharex=True).flat

    def draw(axes: Axes, key: str, label: str, style: str = "-") -> None:
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1.2, markersize=4)

    draw(loss, "loss", "loss")
    draw(loss, "kl", "KL to the original")
    draw(loss, "ce", "cross-entropy")
    loss.set(title="training loss (nats per token)")
    loss.legend()
    draw(ppl, "held_out_ppl", "ternary (λ = 1)", "o-")
    ppl.axhline(lines[0]["original_ppl"], color="black", linestyle=":", label="original")
    ppl.set(title="held-out perplexity", yscale="log")
    ppl.legend()
    draw(lam, "lam", "λ")
    lam.set(title="λ", xlabel="step", ylim=(-0.05, 1.05))
    draw(rate, "lr", "learning rate")
    rate.set(title="learning rate", xlabel="step")
    for axes in (loss, ppl, lam, rate):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
