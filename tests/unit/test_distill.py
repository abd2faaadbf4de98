"""The loss: value and gradient against their definition, in one chunk and in many; the likeliest tokens against all."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bitconvert.models.head import Head
from bitconvert.recipe import Distillation
from bitconvert.training.distill import (
    CHUNK_BYTES,
    DistillationLoss,
    FullTarget,
    TopTarget,
    distillation_loss,
    predicting_positions,
    top_shares,
)

MIXED = Distillation(kl=0.65, ce=0.35)
BATCH, CONTEXT, WIDTH, VOCAB = 6, 9, 5, 17
ITEMS = BATCH * (CONTEXT - 1)


class Case(NamedTuple):
    """A student's and a teacher's hidden states and heads, and the text."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor
    teacher_head: Head
    tokens: Tensor

    def full(self, temperature: float = 1.0) -> FullTarget:
        return FullTarget(predicting_positions(self.teacher_hidden), self.teacher_head, temperature)

    def top(self, k: int, temperature: float = 1.0) -> TopTarget:
        return TopTarget(*top_shares(self.full(temperature).at(slice(None)), k))

    def windows(self, chosen: slice) -> Case:
        parts = (self.hidden[chosen], self.head, self.teacher_hidden[chosen], self.teacher_head, self.tokens[chosen])
        return Case(*parts)


def case(
    seed: int = 0,
    *,
    batch: int = BATCH,
    context: int = CONTEXT,
    width: int = WIDTH,
    vocab: int = VOCAB,
    divisor: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head, teacher_head = (Head(random(vocab, width), divisor, softcap) for _ in range(2))
    head.weight.requires_grad_()
    tokens = torch.randint(vocab, (batch, context), generator=generator)
    return Case(
        random(batch, context, width).requires_grad_(), head, random(batch, context, width), teacher_head, tokens
    )


def by_definition(given: Case, options: Distillation, items: int) -> DistillationLoss:
    """The plain formula, on logits of all positions at once."""
    temperature = options.temperature
    student = given.head.logits(given.hidden[:, :-1])
    q = functional.log_softmax(student / temperature, -1)
    p = functional.log_softmax(given.teacher_head.logits(given.teacher_hidden[:, :-1]) / temperature, -1)
    kl = temperature**2 * (p.exp() * (p - q)).sum() / items
    ce = functional.cross_entropy(student.flatten(0, 1), given.tokens[:, 1:].flatten(), reduction="sum") / items
    return DistillationLoss(options.kl * kl + options.ce * ce, kl, ce)


def gradients(loss: Tensor, given: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [given.hidden, given.head.weight])


# ---- the definition ----


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    context=st.integers(2, 9),
    width=st.integers(1, 8),
    vocab=st.integers(2, 40),
    rows=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    kl=st.sampled_from([0.0, 0.65, 1.0]),
    ce=st.sampled_from([0.0, 0.35, 1.0]),
    divisor=st.sampled_from([1.0, 0.5, 4.0]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_it_and_its_gradient_are_those_of_the_definition(
    seed, batch, context, width, vocab, rows, temperature, kl, ce, divisor, softcap
) -> None:
    if kl + ce == 0:
        kl = 1.0
    options = Distillation(kl=kl, ce=ce, temperature=temperature)
    given = case(seed, batch=batch, context=context, width=width, vocab=vocab, divisor=divisor, softcap=softcap)
    target = given.full(temperature) if kl else None
    ours = distillation_loss(given.hidden, given.head, target, given.tokens, options, 7, chunk_bytes=4 * vocab * rows)
    expected = by_definition(given, options, 7)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.ce, expected.ce)
    if kl:
        torch.testing.assert_close(ours.kl, expected.kl)
    for mine, wanted in zip(gradients(ours.loss * 3, given), gradients(expected.loss * 3, given), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_tied_head_gets_both_gradients() -> None:
    given, options = case(), MIXED
    (expected,) = torch.autograd.grad(
        by_definition(tied(given), options, ITEMS).loss, given.head.weight, materialize_grads=True
    )
    twice = tied(given)
    loss = distillation_loss(twice.hidden, twice.head, given.full(), given.tokens, options, ITEMS, chunk_bytes=500).loss
    torch.testing.assert_close(torch.autograd.grad(loss, given.head.weight)[0], expected)


def tied(given: Case) -> Case:
    """The hidden states made of the head's own rows, as an embedding would."""
    return given._replace(hidden=functional.embedding(given.tokens, given.head.weight).sin())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    given = case()
    parts = {"hidden": given.hidden, "weight": given.head.weight}
    expected = torch.autograd.grad(by_definition(given, MIXED, ITEMS).loss, list(parts.values()))
    parts[frozen].requires_grad_(False)
    distillation_loss(given.hidden, given.head, given.full(), given.tokens, MIXED, ITEMS).loss.backward()
    assert parts[frozen].grad is None
    for part, wanted in zip(parts.values(), expected, strict=True):
        if part.requires_grad:
            torch.testing.assert_close(part.grad, wanted)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    given, options = case(), MIXED
    distillation_loss(given.hidden, given.head, given.full(), given.tokens, options, ITEMS).loss.backward()
    whole = [part.grad.clone() for part in (given.hidden, given.head.weight)]
    for part in (given.hidden, given.head.weight):
        part.grad = None
    for start in range(0, BATCH, 2):
        some = given.windows(slice(start, start + 2))
        distillation_loss(some.hidden, some.head, some.full(), some.tokens, options, ITEMS).loss.backward()
    for part, wanted in zip((given.hidden, given.head.weight), whole, strict=True):
        torch.testing.assert_close(part.grad, wanted)


def test_equal_distributions_have_no_divergence() -> None:
    given = case(dtype=torch.float32)
    itself = FullTarget(predicting_positions(given.hidden).detach(), given.head, 1.0)
    loss = distillation_loss(given.hidden, given.head, itself, given.tokens, Distillation(kl=1.0, ce=0.0), ITEMS)
    assert loss.kl.item() == 0
    assert max(gradient.abs().max().item() for gradient in gradients(loss.loss, given)) == 0


# ---- the circumstances ----


def test_without_gradients_there_is_only_the_loss() -> None:
    given, options = case(vocab=200, width=50), MIXED
    with torch.no_grad(), _Largest() as largest:
        loss = distillation_loss(
            given.hidden, given.head, given.full(), given.tokens, options, ITEMS, chunk_bytes=4 * 200
        )
    assert not loss.loss.requires_grad
    assert largest.elements < given.head.weight.numel()
    for ours, expected in zip(loss, by_definition(given, options, ITEMS), strict=True):
        torch.testing.assert_close(ours, expected.detach())


def test_a_gradient_is_given_once() -> None:
    given = case()
    loss = distillation_loss(given.hidden, given.head, None, given.tokens, Distillation(kl=0.0, ce=1.0), ITEMS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_teacher_in_inference_mode_will_do() -> None:
    given, options = case(), MIXED
    with torch.inference_mode():
        target = FullTarget(given.full().hidden.sin(), given.teacher_head, 1.0)
    assert target.hidden.is_inference()
    expected = by_definition(given._replace(teacher_hidden=given.teacher_hidden.sin()), options, ITEMS).loss
    ours = distillation_loss(given.hidden, given.head, target, given.tokens, options, ITEMS).loss
    for mine, wanted in zip(gradients(ours, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    given, options = case(dtype=torch.float32, width=64, vocab=300), MIXED
    with torch.autocast("cpu", torch.bfloat16):
        ours = distillation_loss(
            given.hidden, given.head, given.full(), given.tokens, options, ITEMS, chunk_bytes=12_000
        )
        products = functional.linear(given.hidden[:, :-1], given.head.weight)
    assert products.dtype == torch.bfloat16
    teacher = given.teacher_head.logits(given.teacher_hidden[:, :-1])
    q, p = (functional.log_softmax(logits.float(), -1) for logits in (products, teacher))
    ce = functional.nll_loss(q.flatten(0, 1), given.tokens[:, 1:].flatten())
    plain = options.kl * (p.exp() * (p - q)).sum() / ITEMS + options.ce * ce
    torch.testing.assert_close(ours.loss, plain, rtol=1e-5, atol=1e-6)
    for mine, wanted in zip(gradients(ours.loss, given), gradients(plain, given), strict=True):
        assert mine.dtype == torch.float32
        assert ((mine - wanted).norm() / wanted.norm()).item() < 0.01


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and not func.is_view:
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("kind", ["full", "top"])
def test_the_logits_of_all_positions_never_exist(kind: str) -> None:
    given = case(batch=4, context=33, vocab=500)
    target = given.full() if kind == "full" else given.top(8)
    rows = 10
    with _Largest() as largest:
        distillation_loss(
            given.hidden, given.head, target, given.tokens, MIXED, ITEMS, chunk_bytes=4 * 500 * rows
        ).loss.backward()
    assert largest.elements == rows * 500


def test_small_models_run_in_one_chunk() -> None:
    assert CHUNK_BYTES // (4 * 2048) >= 8 * 256  # the demo's vocabulary and batch


# ---- the likeliest tokens alone ----


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, VOCAB - 1),
    rows=st.integers(1, 60),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_the_rest_counts_as_one(seed: int, k: int, rows: int, temperature: float) -> None:
    given, options = case(seed), Distillation(kl=0.7, ce=0.2, temperature=temperature)
    target = given.top(k, temperature)
    ours = distillation_loss(
        given.hidden, given.head, target, given.tokens, options, ITEMS, chunk_bytes=4 * VOCAB * rows
    )
    logits = given.head.logits(given.hidden[:, :-1]).flatten(0, 1)
    q = functional.softmax(logits / temperature, -1).gather(-1, target.tokens)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    kl = temperature**2 * (target.shares.exp() * (target.shares - q.log())).sum() / ITEMS
    ce = functional.cross_entropy(logits, given.tokens[:, 1:].flatten())
    torch.testing.assert_close(ours.kl, kl)
    for mine, wanted in zip(gradients(ours.loss, given), gradients(0.7 * kl + 0.2 * ce, given), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_more_of_them_see_more_of_the_divergence_and_all_of_them_all() -> None:
    given, options = case(), Distillation(kl=1.0, ce=0.0)

    def kl(target: FullTarget | TopTarget) -> float:
        return distillation_loss(given.hidden, given.head, target, given.tokens, options, ITEMS).kl.item()

    seen = [kl(given.top(k)) for k in range(1, VOCAB + 1)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-2]
    assert seen[-1] == pytest.approx(kl(given.full()), rel=1e-12)


@pytest.mark.parametrize("k", [3, VOCAB])
def test_a_rest_without_mass_does_no_harm(k: int) -> None:
    given, options = case(dtype=torch.float32), Distillation(kl=1.0, ce=0.0)
    tokens, shares = given.top(k)
    shares[:, -1] = torch.finfo(torch.float16).min if k < VOCAB else -torch.inf
    loss = distillation_loss(given.hidden, given.head, TopTarget(tokens, shares), given.tokens, options, ITEMS)
    assert torch.isfinite(loss.kl)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss.loss, given))
