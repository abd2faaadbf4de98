"""Text from a model as it is, not as its ``generation_config.json`` would have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What a model writes after some prompts, each until the model or ``max_tokens`` ends it.

    Args:
        model: a causal language model.
        tokenizer: its own.
        prompts: token ids, int64, shape (prompts, tokens), on the model's device.
        max_tokens: the most to write.
        temperature: 0 takes the most probable token at each step; 1 draws from the model's own distribution.
        seed: of the draws, which leave the random numbers of others as they are.
    """
    ends = ends_of(model, tokenizer)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # of what has ended before the others
    )
    write: Any = model.generate
    with torch.random.fork_rng(), torch.inference_mode(), without_own_defaults(model):
        torch.manual_seed(seed)
        both = write(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    written = (takewhile(lambda token: token not in ends, ids) for ids in both[:, prompts.shape[1] :].tolist())
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in written]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a text: the model may name several, the tokenizer one; not every model marks them as special."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ends = named if isinstance(named, list) else [named]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


@contextmanager
def without_own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Let ``generate`` follow its arguments alone.

    transformers fills whatever a call leaves open from the model's own file: a temperature, top_p or repetition penalty
    there would bend a distribution that is to be measured, sampled or taken greedily.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
