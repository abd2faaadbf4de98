"""The optimizers to choose from; they differ in what they keep beside each weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import Adafactor

from bitconvert.recipe import Optimizer as Options

_Groups = list[dict[str, Any]]


def make_optimizer(parameters: Iterable[Parameter], options: Options) -> Optimizer:
    """The recipe's optimizer, in two groups: matrices decay, vectors (norms, biases) do not.

    The rate and the decay of each group are set anew before every step; of a group, ``decays`` says whether to.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: _Groups = [
        {"params": [p for p in trained if p.ndim >= 2], "decays": True},
        {"params": [p for p in trained if p.ndim < 2], "decays": False},
    ]
    optimizer = _MAKERS[options.name](groups, options)
    optimizer.register_step_post_hook(_tell_that_weights_changed)
    return optimizer


def _adamw(groups: _Groups, options: Options) -> Optimizer:
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=0.0)


def _adamw8bit(groups: _Groups, options: Options) -> Optimizer:
    """Both moments in blocks of 256 that share a scale (Dettmers et al., arXiv 2110.02861); vectors keep float32."""
    make: Callable[..., Optimizer] = importlib.import_module("bitsandbytes.optim").AdamW8bit
    return make(groups, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=0.0)


def _adafactor(groups: _Groups, options: Options) -> Optimizer:
    """No first moment, and of a matrix's second one the means of rows and columns (Shazeer, Stern, arXiv 1804.04235).

    Neither scaled by the weights nor by a schedule of its own, so that the recipe's rate means what it means to AdamW.
    """
    return Adafactor(  # type: ignore[no-untyped-call]
        groups, lr=options.lr, scale_parameter=False, relative_step=False, weight_decay=0.0
    )


def _tell_that_weights_changed(optimizer: Optimizer, *_: object) -> None:
    """Fused kernels, and those of bitsandbytes, write unseen by torch: a scale that is kept would never be renewed."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


_MAKERS: dict[str, Callable[[_Groups, Options], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
}
