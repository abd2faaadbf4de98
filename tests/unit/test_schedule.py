"""λ, learning rate and weight decay over progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitconvert.ternary.schedule import LAMBDA_CURVES, LR_SCHEDULES, lambda_at, lr_at, weight_decay_at

shares = st.floats(0, 1)


@pytest.mark.parametrize("curve", sorted(LAMBDA_CURVES))
@given(t=shares, later=shares, reach=st.floats(0.01, 1))
def test_lambda_rises_from_zero_to_one(curve: str, t: float, later: float, reach: float) -> None:
    first, second = sorted((t, later))
    assert 0 <= lambda_at(first, curve, reach) <= lambda_at(second, curve, reach) + 1e-12 <= 1 + 1e-12
    assert lambda_at(reach, curve, reach) == 1
    if curve != "instant":
        assert lambda_at(0, curve, reach) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("curve", "at_quarter", "at_half"),
    [
        ("linear", 0.25, 0.5),
        ("cosine", 0.1464466, 0.5),
        ("quadratic", 0.4375, 0.75),
        ("exponential", 0.0168935, 0.0758582),
        ("sigmoid", 0.0701037, 0.5),
        ("instant", 1.0, 1.0),
    ],
)
def test_lambda_curves(curve: str, at_quarter: float, at_half: float) -> None:
    assert lambda_at(0.125, curve, 0.5) == pytest.approx(at_quarter, abs=1e-6)
    assert lambda_at(0.25, curve, 0.5) == pytest.approx(at_half, abs=1e-6)


@pytest.mark.parametrize("curve", LAMBDA_CURVES)
def test_lambda_without_a_ramp_is_one(curve: str) -> None:
    assert lambda_at(0.0, curve, 0.0) == 1.0


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@given(t=shares)
def test_learning_rate_stays_between_zero_and_its_peak(schedule: str, t: float) -> None:
    assert 0 <= lr_at(t, schedule, 0.1, 0.5) <= 1


def test_warm_up_then_cosine() -> None:
    points = [lr_at(t, "cosine", 0.1, 0.2) for t in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert points == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])


def test_warm_up_then_linear() -> None:
    points = [lr_at(t, "linear", 0.1, 0.2) for t in (0.05, 0.1, 0.55, 1.0)]
    assert points == pytest.approx([0.5, 1.0, 0.6, 0.2])


def test_two_stages_follow_bitnets_own_numbers() -> None:
    # BitNet b1.58 2B4T: 1.5e-3 falls to about half of it, then 5e-4 falls to 0.
    rates = [1.5e-3 * lr_at(t, "two_stage", 0.02, 2 / 3) for t in (0.02, 0.4999999, 0.5, 1.0)]
    assert rates == pytest.approx([1.47e-3, 7.5e-4, 5e-4, 0.0], abs=1e-8)


def test_weight_decay() -> None:
    assert [weight_decay_at(t, "two_stage", 0.1) for t in (0, 0.49, 0.5, 1)] == [0.1, 0.1, 0.0, 0.0]
    assert [weight_decay_at(t, "constant", 0.1) for t in (0, 1)] == [0.1, 0.1]
