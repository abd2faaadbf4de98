"""Task suites by lm-eval (an optional dependency), over a model that is already loaded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.subjects import TorchModel

TaskResults = dict[str, dict[str, float]]


def run_tasks(loaded: TorchModel, tasks: Sequence[str], limit: int | None = None) -> TaskResults:
    """Run lm-eval's tasks on a model.

    Args:
        loaded: the model and its tokenizer.
        tasks: names that lm-eval knows, or YAML files of one's own.
        limit: examples per task; None for all.

    Returns:
        task -> metric -> value, as lm-eval names them; of several filters, the metric is "metric,filter".

    Raises:
        BitconvertError: lm-eval is missing, or it does not know a task or cannot get its data.
    """
    evaluator, wrapper = _lm_eval()
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the report
        wrapped = wrapper(pretrained=loaded.model, tokenizer=loaded.tokenizer)
        try:
            found = evaluator.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, log_samples=False)
        except (KeyError, ValueError, OSError, ConnectionError) as error:
            raise BitconvertError(
                f"lm-eval cannot run {', '.join(tasks)}: {str(error).strip().splitlines()[0]}",
                "`lm-eval ls tasks` lists what it knows; most tasks download their data from the Hugging Face hub",
            ) from error
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _lm_eval() -> tuple[Any, Any]:
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BitconvertError("lm-eval is not installed", "pip install 'bitconvert[tasks]'") from error
    return evaluator, HFLM


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Only the numbers, without the name of the filter where there is no filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
