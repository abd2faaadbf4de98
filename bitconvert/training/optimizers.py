"""The optimizers to choose from; they differ in what they keep beside each weight."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Adafactor, PreTrainedModel

from bitconvert.recipe import Optimizer as Options
from bitconvert.ternary.bitlinear import forget_scales

_Groups = list[dict[str, Any]]


def make_optimizer(model: PreTrainedModel, options: Options) -> Optimizer:
    """The recipe's optimizer of a model, in three groups: hidden matrices, other matrices, vectors (norms, biases).

    Rate and decay of each group are set anew before every step. Where ``decays`` says so, a group decays: matrices do,
    vectors do not.
    """
    hidden = _hidden_matrices(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: _Groups = [
        {"params": [p for p in trained if p in hidden], "decays": True},
        {"params": [p for p in trained if p not in hidden and p.ndim >= 2], "decays": True},
        {"params": [p for p in trained if p.ndim < 2], "decays": False},
    ]
    optimizer = _MAKERS[options.name](groups, options)
    optimizer.register_step_post_hook(lambda *_: forget_scales(model))  # fused kernels write unseen by torch
    return optimizer


def _hidden_matrices(model: PreTrainedModel) -> set[Tensor]:
    """The weights of all linear layers but the head, or what is trained of them."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return {matrix for linear in linears for matrix in linear.parameters(recurse=False) if matrix.ndim == 2}


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


def _muon(groups: _Groups, options: Options) -> Optimizer:
    """Muon (Jordan et al., 2024) for the hidden matrices, which orthogonalizes their updates; AdamW for the rest.

    Its updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so that one rate serves both.
    """
    hidden, *rest = groups
    muon = torch.optim.Muon([hidden], lr=options.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return _Together(muon, _adamw(rest, options))


class _Together(Optimizer):
    """Optimizers of different weights as one: the groups of all, one state, one step."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on this one's groups and state, so that they are set, saved and loaded here."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = list(islice(groups, len(part.param_groups)))


_MAKERS: dict[str, Callable[[_Groups, Options], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "muon": _muon,
}
