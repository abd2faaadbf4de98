"""Perplexity of a ternary model against transformers in float32: ``python -m benchmarks.evaluation``. CPU time, wall.

Both read the same tokens with the same ternary weights: bitconvert as ``eval`` does, transformers with the weights as
plain float32 linears, in the loop of its perplexity guide: one window a pass, logits of all positions, the loss by
labels. The second peer is that loop with as many windows a pass as bitconvert takes. ``--checkpoint`` measures a latent
checkpoint instead of random models; ``--profile`` says where bitconvert's time goes.

Plain linears round no activations, so the perplexities differ a little.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.models import random_llama
from bitconvert.evaluation.perplexity import score
from bitconvert.evaluation.subjects import TorchModel
from bitconvert.evaluation.windows import TokenizedText, windows
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.families import FAMILIES
from bitconvert.recipe import Scaling
from bitconvert.report.reporter import Silent
from bitconvert.ternary.bitlinear import freeze_ternary, insert_bitlinear
from bitconvert.ternary.quantize import ternarize

Measure = Callable[[torch.Tensor], float]
"""Token ids (n,) -> perplexity."""


class Pair(NamedTuple):
    """A ternary model, and the same weights as plain linears."""

    ternary: PreTrainedModel
    plain: PreTrainedModel


def main() -> None:
    """Print a table per model."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--checkpoint")
    arguments.add_argument("--vocabulary", type=int, nargs="*", default=[2048, 32_000])
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--profile", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.checkpoint:
        _compare(given.checkpoint, _opened(given.checkpoint), given)
        return
    for vocabulary in given.vocabulary:
        name = f"hidden {given.hidden}, {given.layers} layers, vocabulary {vocabulary}"
        _compare(name, _random(given.hidden, given.layers, vocabulary), given)


def _random(hidden: int, layers: int, vocabulary: int) -> Pair:
    latent = random_llama(hidden, layers, vocabulary).train(False)
    ternary = copy.deepcopy(latent)
    insert_bitlinear(ternary, _linears(ternary), Scaling(estimator="absmean"), lam=1.0)
    freeze_ternary(ternary)
    return Pair(ternary, _baked(latent, Scaling(estimator="absmean")))


def _opened(path: str) -> Pair:
    checkpoint = open_checkpoint(path)
    return Pair(checkpoint.load(), _baked(checkpoint.load_latent(), checkpoint.scaling).train(False))


@torch.no_grad()
def _baked(latent: PreTrainedModel, scaling: Scaling) -> PreTrainedModel:
    for name in _linears(latent):
        weight = latent.get_parameter(f"{name}.weight")
        weight.copy_(ternarize(weight, scaling).dequantize())
    return latent


def _linears(model: PreTrainedModel) -> list[str]:
    return FAMILIES[model.config.model_type].ternary_modules(name for name, _ in model.named_modules())


def _compare(name: str, pair: Pair, given: argparse.Namespace) -> None:
    ids = torch.randint(pair.plain.config.vocab_size, (given.tokens,))
    together = max(1, 2048 // given.context)
    ways: dict[str, Measure] = {
        "bitconvert": _by_bitconvert(pair.ternary, given.context),
        "transformers, 1 window": _by_the_guide(pair.plain, given.context, 1),
        f"transformers, {together} windows": _by_the_guide(pair.plain, given.context, together),
    }
    found = {way: measure(ids) for way, measure in ways.items()}
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(given.rounds):
        for way, measure in ways.items():
            taken[way].append(_seconds(measure, ids))
    print(
        f"{name}, {given.tokens} tokens, context {given.context}: tokens per CPU second, per second, bitconvert's ratio"
    )
    for way, pairs in taken.items():
        cpu, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(pairs, taken["bitconvert"], strict=True))
        print(f"{way:28} {given.tokens / cpu:8.0f} {given.tokens / wall:8.0f} {ratio:6.2f}   ppl {found[way]:.4f}")
    if given.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ways["bitconvert"](ids)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def _by_bitconvert(model: PreTrainedModel, context: int) -> Measure:
    no_tokenizer: PreTrainedTokenizerFast = None  # type: ignore[assignment]

    def measure(ids: torch.Tensor) -> float:
        text = TokenizedText(ids, torch.arange(len(ids) + 1), "", None)
        scores = score(windows(text, "hf", context), TorchModel(model, no_tokenizer).predict, None, Silent())
        return math.exp(float(scores.nll.mean()))

    return measure


def _by_the_guide(model: PreTrainedModel, context: int, together: int) -> Measure:
    @torch.no_grad()
    def measure(ids: torch.Tensor) -> float:
        losses = [float(model(batch, labels=batch).loss) for batch in ids.view(-1, context).split(together)]
        return math.exp(statistics.mean(losses))

    return measure


def _seconds(measure: Measure, ids: torch.Tensor) -> tuple[float, float]:
    """CPU time and wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    measure(ids)
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
