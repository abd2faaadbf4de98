"""Text from a model as it is, not as its ``generation_config.json`` would have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel


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
