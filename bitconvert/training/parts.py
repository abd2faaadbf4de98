"""What each GPU holds and moves when several split a model between them (FSDP2): arithmetic on what one would hold.

Weights, gradients, optimizer and the teacher's layers are there in parts. A layer is gathered where it computes, in
float32, since its codes are those of the whole latent; the next one comes meanwhile. Embedding, last norm and head are
gathered for a whole forward and backward pass; those of the teacher are never split. Source: Zhao et al., "PyTorch
FSDP" (arXiv 2304.11277).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.head import decoder_layers
from bitconvert.recipe import Recipe
from bitconvert.training.ledger import ACTIVATIONS
from bitconvert.training.rehearsal import CODES, GRADIENTS, OPTIMIZER, TEACHER, WEIGHTS, Account
from bitconvert.training.teacher import has_teacher

GATHERED = "gathered"

_LATENT_BYTES = 4
_LAYERS_AT_ONCE = 2  # the one that computes, and the next
_UPDATE_BYTES = 4  # beside each weight of a part while an optimizer goes over all of them in one operation


@dataclass(frozen=True)
class Parts:
    """A model as it is split.

    Attributes:
        layer: weights of its largest decoder layer.
        layers: of all of them.
        rest: of embedding, last norm and head.
        teacher_bytes: of each weight of the teacher; 0 where none is there at each step.
    """

    layer: int
    layers: int
    rest: int
    teacher_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Parts:
        """A recipe's parts of a model."""
        skeleton = cast(PreTrainedModel, checkpoint.skeleton())
        layers = [sum(each.numel() for each in layer.parameters()) for layer in decoder_layers(skeleton)]
        lives = has_teacher(recipe) and not recipe.distill.cache
        of_teacher = 4 if recipe.training.precision == "float32" else 2
        rest = checkpoint.parameters - sum(layers)
        return cls(max(layers), sum(layers), rest, of_teacher if lives else 0)

    def memory(self, counted: Account, gpus: int) -> dict[str, int]:
        """Bytes by kind on each GPU: each kind at its own peak, which is somewhat more than there is at any moment."""
        whole = counted.highest
        gathered = _LATENT_BYTES * (self.rest + _LAYERS_AT_ONCE * self.layer)  # weights
        gathered += _LATENT_BYTES * self.layer  # gradients of a layer; those of the rest are among the activations
        gathered += self.teacher_bytes * _LAYERS_AT_ONCE * self.layer
        update = _UPDATE_BYTES * (self.layers + self.rest) // gpus
        parts = {kind: -(-whole[kind] // gpus) for kind in (WEIGHTS, GRADIENTS, OPTIMIZER) if kind in whole}
        teacher = self.teacher_bytes * (self.layers // gpus + self.rest)
        return {
            **parts,
            **({TEACHER: teacher} if teacher else {}),
            CODES: whole.get(CODES, 0),
            GATHERED: gathered,
            ACTIVATIONS: max(whole[ACTIVATIONS], update - gathered),
        }

    @property
    def traffic(self) -> int:
        """Bytes that each micro-batch gathers or adds up: layers forward and backward, the rest once, all gradients."""
        weights = 2 * self.layers + self.rest
        return _LATENT_BYTES * (weights + self.layers + self.rest) + self.teacher_bytes * self.layers
