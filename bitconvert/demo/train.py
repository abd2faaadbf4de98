"""How the embedded demo model was made: `python -m bitconvert.demo.train --output DIR [--tokens N]`.

A byte-level BPE tokenizer and a LLaMA of two million parameters, from scratch, on stories that never repeat. Every
linear layer reads 512 or 256 values, so each weight row divides into the blocks of 256 that ternary formats use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitconvert.demo.stories import HELD_OUT_SEED, LEXICON, MODEL_SEED, stories, text

CONTEXT = 256
VOCABULARY = 1024
END = "<|endoftext|>"
BATCH = 8
PEAK_LEARNING_RATES = {"matrices": 0.02, "rest": 3e-3}
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.01
NAME_WEIGHT = 20.0
HELD_OUT_CHARACTERS = 200_000


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the byte pairs from stories of the training seed; token 0 ends a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(itertools.islice(stories(MODEL_SEED), 5000), trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, model_max_length=CONTEXT, **special
    )


def new_model() -> LlamaForCausalLM:
    """A LLaMA with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def documents(seed: int) -> Iterator[str]:
    """One story, two, three, one, ... with blank lines between: the model meets both borders, blank line and END."""
    endless = stories(seed)
    for count in itertools.cycle((1, 2, 3)):
        yield "\n\n".join(itertools.islice(endless, count))


def blocks(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """The documents as one stream of tokens, cut into batches of full contexts; no token is seen twice."""
    endless = documents(seed)
    stream: list[int] = []
    while True:
        while len(stream) < BATCH * CONTEXT:
            some = list(itertools.islice(endless, 100))
            for tokens in tokenizer(some)["input_ids"]:
                stream += [*tokens, 0]
        batch, stream = stream[: BATCH * CONTEXT], stream[BATCH * CONTEXT :]
        yield torch.tensor(batch).view(BATCH, CONTEXT)


def learning_rate_at(progress: float, step: int) -> float:
    """Share of the peak: linear warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * progress))


def name_weight_at(progress: float) -> float:
    """How much a name counts in the loss: a lot for a quarter of the run, as much as any token after half of it.

    To look up in the story who it is about is a small gain per token, and the last thing that a model learns: without
    this push, six million tokens leave it at "some girl's name".
    """
    return 1.0 + (NAME_WEIGHT - 1.0) * min(1.0, max(0.0, 2.0 - 4.0 * progress))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in named if weight.ndim == 1 or "embed" in name]
    rates = PEAK_LEARNING_RATES
    return [
        torch.optim.Muon(matrices, lr=rates["matrices"], weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=rates["rest"], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, batches: Iterator[Tensor], steps: int, names: Tensor) -> None:
    """Minimize the cross-entropy; one progress line a hundred steps."""
    both = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: learning_rate_at(step / steps, step)) for one in both
    ]
    model.train()
    start = time.perf_counter()
    recent = 0.0
    for step, batch in enumerate(itertools.islice(batches, steps)):
        targets = batch[:, 1:].flatten()
        losses = cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), targets, reduction="none")
        weights = torch.where(torch.isin(targets, names), name_weight_at(step / steps), 1.0)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent += losses.mean().item()
        if (step + 1) % 100 == 0:
            speed = (step + 1) * batch.numel() / (time.perf_counter() - start)
            print(f"step {step + 1}/{steps}  loss {recent / 100:.4f}  {speed:.0f} tokens/s", file=sys.stderr)
            recent = 0.0


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Perplexity per token over full contexts of the held-out text; each context starts with nothing before it."""
    tokens = torch.tensor(tokenizer(text(HELD_OUT_SEED, HELD_OUT_CHARACTERS))["input_ids"])
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.train(False)
    losses = [model(input_ids=some, labels=some).loss.item() * len(some) for some in torch.split(windows, 16)]
    return math.exp(sum(losses) / len(windows))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a Hugging Face directory with half-precision weights."""
    model.half().save_pretrained(output)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(output)
    generation = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)  # type: ignore[no-untyped-call]
    generation.save_pretrained(output)


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(prog="python -m bitconvert.demo.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where the model directory is written")
    parser.add_argument("--tokens", type=int, default=6_000_000, help="how many tokens to train on")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.perf_counter()
    tokenizer = train_tokenizer()
    model = new_model()
    steps = arguments.tokens // (BATCH * CONTEXT)
    names = torch.tensor(tokenizer.convert_tokens_to_ids([f"Ġ{name}" for name in LEXICON["name"]]))
    train(model, blocks(tokenizer, MODEL_SEED), steps, names)
    seconds = time.perf_counter() - start

    perplexity = held_out_perplexity(model, tokenizer)
    save(model, tokenizer, arguments.output)
    saved = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    record = {
        "command": f"python -m bitconvert.demo.train --output DIR --tokens {arguments.tokens}",
        "parameters": model.num_parameters(),
        "tokens_seen": steps * BATCH * CONTEXT,
        "batch": BATCH,
        "peak_learning_rates": PEAK_LEARNING_RATES,
        "held_out_perplexity_float32": round(perplexity, 5),
        "held_out_perplexity": round(held_out_perplexity(saved, tokenizer), 5),
        "wall_seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
