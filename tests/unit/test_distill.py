"""The loss: its value against its definition, its gradient under accumulation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bitconvert.recipe import Distillation
from bitconvert.training.distill import distillation_loss

BATCH, CONTEXT, VOCAB = 6, 9, 17
ITEMS = BATCH * (CONTEXT - 1)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(BATCH, CONTEXT, VOCAB, generator=generator).requires_grad_()
    teacher = torch.randn(BATCH, CONTEXT, VOCAB, generator=generator)
    return student, teacher, torch.randint(VOCAB, (BATCH, CONTEXT), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_sum_of_its_definition(logits, temperature: float) -> None:
    student, teacher, tokens = logits
    options = Distillation(kl=0.7, ce=0.2, temperature=temperature)
    loss, kl, ce = distillation_loss(student, teacher, tokens, options, ITEMS)
    p = functional.softmax(teacher[:, :-1] / temperature, -1)
    q = functional.softmax(student[:, :-1] / temperature, -1)
    by_hand_kl = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    by_hand_ce = -functional.softmax(student[:, :-1], -1).gather(-1, tokens[:, 1:, None]).log().mean()
    torch.testing.assert_close(kl, by_hand_kl.detach())
    torch.testing.assert_close(ce, by_hand_ce.detach())
    torch.testing.assert_close(loss, 0.7 * by_hand_kl + 0.2 * by_hand_ce)


def test_equal_distributions_have_no_divergence(logits) -> None:
    student, _, tokens = logits
    assert distillation_loss(student, student.detach(), tokens, Distillation(), ITEMS).kl.item() == pytest.approx(0)


def test_micro_batches_add_up_to_the_whole_batch(logits) -> None:
    student, teacher, tokens = logits
    (whole,) = torch.autograd.grad(distillation_loss(student, teacher, tokens, Distillation(), ITEMS).loss, student)
    parts = sum(
        torch.autograd.grad(
            distillation_loss(student[i : i + 2], teacher[i : i + 2], tokens[i : i + 2], Distillation(), ITEMS).loss,
            student,
        )[0]
        for i in range(0, BATCH, 2)
    )
    torch.testing.assert_close(parts, whole)


def test_without_a_teacher_there_is_only_cross_entropy(logits) -> None:
    student, _, tokens = logits
    loss, kl, ce = distillation_loss(student, None, tokens, Distillation(kl=0.0, ce=1.0), ITEMS)
    assert kl.item() == 0
    torch.testing.assert_close(loss, ce)
