"""bitconvert: an existing LLaMA-style model in, a working 1.58-bit model out.

The names below are the public API, each imported on first use (PEP 562), so that ``import bitconvert`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitconvert.version import __version__ as __version__

if TYPE_CHECKING:
    from bitconvert.conversion.convert import convert
    from bitconvert.conversion.foresight import plan
    from bitconvert.diagnosis import doctor
    from bitconvert.errors import BitconvertError
    from bitconvert.evaluation.compare import compare
    from bitconvert.evaluation.difference import difference
    from bitconvert.evaluation.evaluate import evaluate
    from bitconvert.evaluation.generate import generate
    from bitconvert.evaluation.inspect import inspect
    from bitconvert.models.checkpoint import open_checkpoint
    from bitconvert.packing.pack import pack
    from bitconvert.packing.unpack import unpack
    from bitconvert.recipe import Packing, Recipe, Scaling, load_adaptation, load_recipe
    from bitconvert.report.reporter import Reporter, Silent
    from bitconvert.ternary.bitlinear import BitLinear
    from bitconvert.ternary.quantize import TernaryTensor, ternarize
    from bitconvert.training.adapt import adapt
    from bitconvert.training.warmup import warmup

_HOMES = {
    "BitLinear": "bitconvert.ternary.bitlinear",
    "BitconvertError": "bitconvert.errors",
    "Packing": "bitconvert.recipe",
    "Recipe": "bitconvert.recipe",
    "Reporter": "bitconvert.report.reporter",
    "Scaling": "bitconvert.recipe",
    "Silent": "bitconvert.report.reporter",
    "TernaryTensor": "bitconvert.ternary.quantize",
    "adapt": "bitconvert.training.adapt",
    "compare": "bitconvert.evaluation.compare",
    "convert": "bitconvert.conversion.convert",
    "difference": "bitconvert.evaluation.difference",
    "doctor": "bitconvert.diagnosis",
    "evaluate": "bitconvert.evaluation.evaluate",
    "generate": "bitconvert.evaluation.generate",
    "inspect": "bitconvert.evaluation.inspect",
    "load_adaptation": "bitconvert.recipe",
    "load_recipe": "bitconvert.recipe",
    "open_checkpoint": "bitconvert.models.checkpoint",
    "pack": "bitconvert.packing.pack",
    "plan": "bitconvert.conversion.foresight",
    "ternarize": "bitconvert.ternary.quantize",
    "unpack": "bitconvert.packing.unpack",
    "warmup": "bitconvert.training.warmup",
}

__all__ = [
    "BitLinear",
    "BitconvertError",
    "Packing",
    "Recipe",
    "Reporter",
    "Scaling",
    "Silent",
    "TernaryTensor",
    "adapt",
    "compare",
    "convert",
    "difference",
    "doctor",
    "evaluate",
    "generate",
    "inspect",
    "load_adaptation",
    "load_recipe",
    "open_checkpoint",
    "pack",
    "plan",
    "ternarize",
    "unpack",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitconvert' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
