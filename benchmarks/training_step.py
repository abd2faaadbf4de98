"""A training step of BitLinear against nn.Linear and other ternary layers: ``python -m benchmarks.training_step``.

A step is forward and backward of a random Llama, as often as it accumulates, and an update in place of every weight, so
that rounding them again is part of it. CPU seconds (on a GPU, seconds) and peak memory (weights, gradients,
activations), each over those of the plain eager step beside it in the same round; medians. Peers take part where their
packages are installed: torchao (bitnet_training), transformers (AutoBitLinear), onebitllms (GPU only).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear

from benchmarks.memory import peak_bytes
from benchmarks.models import random_llama
from bitconvert.models.families import FAMILIES
from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import compile_blocks, insert_bitlinear

Model = LlamaForCausalLM


def main() -> None:
    """Print one line per contestant."""
    given = _arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = _model(given).to(device)
    tokens = torch.randint(plain.config.vocab_size, (given.batch, given.context), device=device)
    steps, held = {}, {}
    for name, (make, compiled) in _contestants().items():
        if given.only and not any(word in name for word in given.only.split(",")) and name != "nn.Linear":
            continue
        model = make(copy.deepcopy(plain))
        if compiled:
            compile_blocks(model.model)
        steps[name] = partial(_step, model, tokens, given.accumulate)
        for _ in range(2):
            steps[name]()
        model.zero_grad()
        held[name] = peak_bytes(steps[name]) + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    seconds = _seconds_in_turn(steps, given.rounds)
    print(f"{plain.num_parameters() / 1e6:.0f}M parameters, {vars(given)}, {torch.get_num_threads()} threads, {device}")
    print(f"{'':34} seconds  ratio     MB  ratio")
    for name in steps:
        share = statistics.median(a / b for a, b in zip(seconds[name], seconds["nn.Linear"], strict=True))
        memory = held[name] / held["nn.Linear"]
        print(f"{name:34} {statistics.median(seconds[name]):7.3f} {share:6.2f} {held[name] / 1e6:6.0f} {memory:6.2f}")


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser()
    for name, default in {
        "hidden": 1024,
        "intermediate": 2816,
        "layers": 4,
        "vocabulary": 2048,
        "batch": 4,
        "context": 256,
        "accumulate": 1,
        "rounds": 5,
    }.items():
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--only", default="", help="parts of contestants' names, with commas")
    return arguments.parse_args()


def _model(given: argparse.Namespace) -> Model:
    own = {"intermediate_size": given.intermediate, "num_key_value_heads": given.hidden // 64}
    return random_llama(given.hidden, given.layers, given.vocabulary, **own)


def _contestants() -> dict[str, tuple[Callable[[Model], Model], bool]]:
    makers: dict[str, Callable[[Model], Model]] = {"nn.Linear": lambda model: model}
    for estimator in ("mse", "absmean"):
        for lam in ((1.0, 1.0), (0.5, 1.0), (0.5, 0.5)):
            name = f"BitLinear {estimator} λ = {lam[0]:g}" + (f", activations {lam[1]:g}" if lam[0] < 1 else "")
            makers[name] = partial(_with_bitlinear, estimator=estimator, lam=lam)
    if importlib.util.find_spec("torchao"):
        makers["torchao bitnet_training"] = _with_torchao
    makers["transformers AutoBitLinear"] = _with_transformers
    if importlib.util.find_spec("onebitllms") and torch.cuda.is_available():
        makers["onebitllms"] = _with_onebitllms
    eager = {name: (make, False) for name, make in makers.items()}
    return eager | {f"{name}, compiled": (make, True) for name, make in makers.items()}


def _with_bitlinear(model: Model, estimator: str, lam: tuple[float, float]) -> Model:
    names = FAMILIES["llama"].ternary_modules(name for name, _ in model.named_modules())
    insert_bitlinear(model, names, Scaling(estimator=estimator)).set(*lam)
    return model


def _with_torchao(model: Model) -> Model:
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    quantize_(model.model.layers, bitnet_training())
    return model


def _with_transformers(model: Model) -> Model:
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            layer = AutoBitLinear(linear.in_features, linear.out_features, bias=False, online_quant=True)
            layer.weight = linear.weight
            model.model.layers.set_submodule(name, layer)
    return model


def _with_onebitllms(model: Model) -> Model:
    from onebitllms import replace_linear_with_bitnet_linear

    replaced: Model = replace_linear_with_bitnet_linear(model)
    return replaced


def _step(model: Model, tokens: torch.Tensor, accumulate: int) -> None:
    model.zero_grad()
    for _ in range(accumulate):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-1e-9)


def _seconds_in_turn(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(step))
    return seconds


def _seconds(work: Callable[[], None]) -> float:
    """CPU seconds; seconds where the work is a GPU's."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()
