"""What a Hugging Face directory holds beside its weights: the config and the companions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.lineage import LINEAGE_FILE
from bitconvert.models.rope import in_older_words

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    LINEAGE_FILE,
    "LICENSE*",
    "NOTICE*",
)
"""What is copied as it is, by pattern: the vocabulary, the chat template, generation defaults, history, licence."""

_REWRITTEN = ("torch_dtype", "rope_scaling", "quantization_config")


def write_config(checkpoint: Checkpoint, directory: Path, said: Mapping[str, Any]) -> None:
    """The model's config with its rope written for every reader, and what this kind of output has to say.

    transformers 5 reads ``rope_parameters``; mlx-lm, transformers.js and transformers 4 read ``rope_theta`` and
    ``rope_scaling``. Keys are sorted, as transformers sorts them: the same config is the same file.
    """
    config: dict[str, Any] = {
        **{key: value for key, value in checkpoint.config.items() if key not in _REWRITTEN},
        "dtype": "float32",
        "rope_parameters": checkpoint.complete.rope_parameters,
        **in_older_words(checkpoint.complete),
        **said,
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_companions(source: Path, directory: Path) -> None:
    """Copy what belongs to a model and is no weight, as far as it is there."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
