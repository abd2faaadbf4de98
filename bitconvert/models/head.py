"""The end of a model: from hidden states to logits, which a caller may want for a few positions at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bitconvert.models.families import FAMILIES


@dataclass(frozen=True)
class Head:
    """What a family does with hidden states after its decoder's last norm.

    Attributes:
        weight: of the output layer, or the embedding where the two are one; shape (vocab, hidden).
        divisor: logits are divided by it.
        softcap: they are bent smoothly so that none is larger; None to leave them.
    """

    weight: Tensor
    divisor: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, shape (..., vocab), of hidden states (..., hidden) of the weight's dtype."""
        return self.scaled(functional.linear(hidden, self.weight))

    def scaled(self, products: Tensor) -> Tensor:
        """Logits from what the output layer gives; the very tensor where the family leaves it alone."""
        logits = products if self.divisor == 1.0 else products / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model; it shares the model's weight."""
    family = FAMILIES[model.config.model_type]
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    return Head(
        weight,
        divisor=getattr(model.config, family.logits_divisor) if family.logits_divisor else 1.0,
        softcap=getattr(model.config, family.logits_softcap) if family.logits_softcap else None,
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder, in order; each gives hidden states of shape (batch, context, hidden)."""
    layers: nn.ModuleList = model.get_decoder().layers  # type: ignore[no-untyped-call]
    return layers


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the decoder gives for token ids (batch, context): shape (batch, context, hidden), after its last norm."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden
