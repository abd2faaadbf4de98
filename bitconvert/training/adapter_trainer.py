"""The trainer of warmup at λ = 1, where an adapter is all that is trained, and only what the labels name is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from bitconvert.models.head import head_of, hidden_states
from bitconvert.recipe import Recipe
from bitconvert.report.reporter import Reporter
from bitconvert.ternary.bitlinear import Lambda
from bitconvert.training.data import ShuffledWindows, Windows
from bitconvert.training.distill import IGNORED, cross_entropy
from bitconvert.training.examples import Conversations, padded
from bitconvert.training.trainer import WarmupTrainer

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterTrainer(WarmupTrainer):
    """Trains an adapter, in one process.

    Args:
        model: frozen but for its adapter.
        recipe: of ``Adaptation.as_recipe``.
        arguments: of ``training_arguments``.
        order: what it is trained on.
        held_out: what it is measured on.
        reporter: where the numbers go.
    """

    def __init__(
        self,
        model: PeftModel,
        recipe: Recipe,
        arguments: TrainingArguments,
        order: ShuffledWindows,
        held_out: Windows,
        reporter: Reporter,
    ) -> None:
        student = cast(PreTrainedModel, model)  # which passes on whatever it is asked for
        super().__init__(student, None, Lambda(1.0), recipe, arguments, order, held_out, reporter)
        self.data_collator = padded
        rows = order.windows
        self._tokens_per_row = rows.tokens / len(rows) if isinstance(rows, Conversations) else rows.context
        learned = sum(_learned(held_out[index]["labels"][None]) for index in range(len(held_out)))
        self._learned_per_row = learned / len(held_out)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Cross-entropy with the tokens that are learned.

        In evaluation each batch counts by its rows, as Trainer averages, so that the whole is the mean over tokens.
        """
        labels = inputs["labels"]
        items = (num_items_in_batch or _learned(labels)) if model.training else self._learned_per_row * len(labels)
        with self.accelerator.autocast():
            hidden = hidden_states(self._student, inputs["input_ids"])
            loss = cross_entropy(hidden, head_of(self._student), labels, items)
        if model.training:
            self._parts = {"ce": self._parts.get("ce", 0.0) + loss.detach()}
        return (loss, {}) if return_outputs else loss

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, without padding; of conversations, the mean."""
        return round(self.recipe.training.batch_size * self._tokens_per_row)


def _learned(labels: Tensor) -> int:
    """Tokens that are predicted of rows of labels."""
    return int((labels[:, 1:] != IGNORED).sum())
