"""The chunked loss against logits in full: ``python -m benchmarks.loss``. Loss and gradient: CPU time, peak memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory import peak_bytes
from benchmarks.timing import ratio
from bitconvert.models.head import Head
from bitconvert.recipe import Distillation
from bitconvert.training.distill import (
    CHUNK_BYTES,
    FullTarget,
    TopTarget,
    chunk_rows,
    distillation_loss,
    predicting_positions,
    top_shares,
)

_TOP_K = 64


def main() -> None:
    """Print one line per vocabulary, loss and size of chunk."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=513)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[49_152, 128_256])
    parser.add_argument("--chunk-mib", type=int, nargs="*", default=[CHUNK_BYTES // 2**20])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{arguments.batch * (arguments.context - 1)} positions, hidden {arguments.hidden}, float32, one thread")
    print("vocabulary  loss          chunk  rows   CPU s  plain  ratio   peak MiB  plain  ratio")
    for vocabulary in arguments.vocabularies:
        for name, loss in _losses(vocabulary, arguments.hidden, arguments.batch, arguments.context).items():
            plain = _both_ways(loss.plain)
            plain_peak = peak_bytes(plain)
            for mib in arguments.chunk_mib:
                ours = _both_ways(lambda loss=loss, mib=mib: loss.chunked(mib * 2**20))
                first, second, share = ratio(ours, plain, arguments.rounds)
                peak = peak_bytes(ours)
                print(
                    f"{vocabulary:10}  {name:12} {mib:4} MiB {chunk_rows(vocabulary, mib * 2**20):5} "
                    f"{first:7.2f} {second:6.2f} {share:6.2f} {peak / 2**20:10.0f} {plain_peak / 2**20:6.0f} "
                    f"{peak / plain_peak:6.2f}",
                    flush=True,
                )


class _Loss:
    """One loss, on random hidden states and heads, in both ways."""

    def __init__(self, vocabulary: int, hidden: int, batch: int, context: int, kind: str) -> None:
        def head() -> Head:
            return Head(torch.randn(vocabulary, hidden) / hidden**0.5, 1.0, None)

        self._hidden = torch.randn(batch, context, hidden, requires_grad=True)
        self._head, self._teacher = head(), head()
        self._head.weight.requires_grad_()
        self._tokens = torch.randint(vocabulary, (batch, context))
        self._taught = self._full = FullTarget(torch.randn(batch * (context - 1), hidden), self._teacher, 1.0)
        self._options = Distillation(kl=0.0, ce=1.0) if kind == "CE" else Distillation(kl=0.65, ce=0.35)
        self._top = TopTarget(*top_shares(torch.randn(len(self._full.hidden), 4 * _TOP_K).log_softmax(-1), _TOP_K))
        self._kind = kind

    def chunked(self, chunk_bytes: int) -> Tensor:
        target = {"CE": None, "KL + CE": self._full, f"top {_TOP_K} + CE": self._top}[self._kind]
        items = self._tokens[:, 1:].numel()
        return distillation_loss(self._hidden, self._head, target, self._tokens, self._options, items, chunk_bytes).loss

    def plain(self) -> Tensor:
        """By torch's own functions on the logits of all positions; KL always with the live teacher."""
        logits = self._head.logits(predicting_positions(self._hidden))
        kl, ce = self._options.weights
        loss = ce * functional.cross_entropy(logits, self._tokens[:, 1:].flatten())
        if kl:
            with torch.no_grad():
                wanted = self._teacher.logits(self._full.hidden)
            divergence = functional.kl_div(
                logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            loss = loss + kl * divergence
        return loss


def _losses(vocabulary: int, hidden: int, batch: int, context: int) -> dict[str, _Loss]:
    kinds = ("CE", "KL + CE", f"top {_TOP_K} + CE")
    return {kind: _Loss(vocabulary, hidden, batch, context, kind) for kind in kinds}


def _both_ways(loss: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: loss().backward()


if __name__ == "__main__":
    main()
