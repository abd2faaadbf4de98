"""A bed: the model, the texts, the tokens and the seeds that methods are compared on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from benchmarks.quality.files import Section

EMBEDDED = "demo"
"""The model that bitconvert brings along; its texts are stories, written when they are needed."""

Tier = Literal["screening", "real", "long"]


class Bed(Section):
    """What every cell of a grid has in common."""

    name: str = Field(description="of the file")
    about: str = Field(description="one line")
    tier: Tier = Field(description="an hour on two cores; a real model, hours; a million tokens, a night")
    model: str = Field(description="`demo`, or a directory or GGUF file below --models")
    training: tuple[str, ...] = Field((), description="texts below --models; none for `demo`")
    held_out: str = Field("", description="a text below --models that nobody trains on; none for `demo`")
    watched_bytes: int = Field(
        gt=0, description="of the held-out text: measured in training, and what learning rates are chosen by"
    )
    judged_tokens: int = Field(gt=0, description="of the rest of it: what the results are measured on")
    recipe: str = Field(description="the recipe that all cells start from")
    set: dict[str, Any] = Field(description="what all cells have otherwise than it: section.key -> value")
    seeds: tuple[int, ...] = Field(min_length=1, description="learning rates are chosen on the first")
    lr: tuple[float, ...] = Field(min_length=1, description="learning rates that every cell is tried with")
    control_lr: tuple[float, ...] = Field(min_length=1, description="the same for the control, which needs less")
