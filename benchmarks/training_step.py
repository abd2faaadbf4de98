"""A training step of BitLinear against plain nn.Linear: ``python -m benchmarks.training_step``. CPU time, float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import ratio
from bitconvert.models.families import FAMILIES
from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import insert_bitlinear

BATCH, CONTEXT = 4, 256


def main() -> None:
    """Print one line per estimator and λ."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=4)
    plain = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (BATCH, CONTEXT))
    print(f"step of {BATCH} x {CONTEXT} tokens, hidden 512, 4 layers, CPU seconds: bitconvert, nn.Linear, ratio")
    for estimator in ("absmean", "mse"):
        for lam in (0.5, 1.0):
            student = copy.deepcopy(plain)
            names = FAMILIES["llama"].ternary_modules(name for name, _ in student.named_modules())
            insert_bitlinear(student, names, Scaling(estimator=estimator), lam=lam)
            ours, peer, share = ratio(_step(student, tokens), _step(plain, tokens), rounds=5)
            print(f"{estimator:8} λ = {lam:3} {ours:7.3f} {peer:7.3f} {share:6.2f}")


def _step(model: LlamaForCausalLM, tokens: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return step


if __name__ == "__main__":
    main()
