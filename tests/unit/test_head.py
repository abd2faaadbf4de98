"""The end of every family, taken apart: hidden states and a head give the model's own logits."""

from __future__ import annotations

import pytest
import torch

from bitconvert.models.head import head_of, hidden_states
from tests.models import VARIANTS, random_model


@pytest.mark.parametrize(
    ("variant", "changes"),
    [*((variant, {}) for variant in VARIANTS), ("gemma3", {"final_logit_softcapping": 2.0})],
)
@torch.no_grad()
def test_it_gives_the_models_own_logits(variant: str, changes: dict[str, float]) -> None:
    model = random_model(variant, pad_token_id=None, **changes).train(False)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(head_of(model).logits(hidden_states(model, tokens)), model(tokens).logits)
