"""Real programs that load packed files: what each takes, and the logits or the text it gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import open_runtime

HERE = Path(__file__).parent
NPM = HERE.parents[1] / ".venv" / "npm"
"""Where ``make compatibility`` installs the packages for node and bare."""

_REASON = re.compile("invalid ggml type")  # the first cause, which a binding buries under its own words
_LAST_WORDS = 160  # of a program that failed


class Failed(Exception):
    """A client refused a file, in its own words."""


class Client(Protocol):
    """A program that computes logits from a packed model."""

    name: str
    formats: tuple[str, ...]

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """Logits (tokens, vocabulary), float32.

        Raises:
            Failed: it does not load the file.
        """


@dataclass(frozen=True)
class XllamaCpp:
    """llama.cpp as the xllamacpp wheel brings it."""

    name: str = f"llama.cpp (xllamacpp {version('xllamacpp')})"
    formats: tuple[str, ...] = ("tq1_0", "tq2_0", "q2_0", "q8_0", "f16", "bf16")

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """See ``Client``."""
        try:
            with open_runtime(path, n_ctx=len(tokens), threads=1) as runtime:
                return torch.from_numpy(runtime.logits(tokens).copy())
        except BitconvertError as error:
            raise Failed(error.message.removeprefix(f"{path}: ")[:_LAST_WORDS]) from error


@dataclass(frozen=True)
class Cyllama:
    """llama.cpp as the cyllama wheel brings it: older, and of another hand."""

    name: str = "llama.cpp (cyllama)"
    formats: tuple[str, ...] = ("tq1_0", "tq2_0", "q8_0", "f16", "bf16")

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """See ``Client``."""
        with tempfile.TemporaryDirectory() as scratch:
            given, made = Path(scratch) / "tokens.npy", Path(scratch) / "logits.npy"
            np.save(given, np.array(tokens))
            _run([sys.executable, str(HERE / "cyllama_client.py"), str(path), str(given), str(made)])
            return torch.from_numpy(np.load(made))


@dataclass(frozen=True)
class Transformers:
    """Stock transformers, with nothing of bitconvert in between."""

    name: str = f"transformers {version('transformers')}"
    formats: tuple[str, ...] = ("safetensors", "compressed-tensors")

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """See ``Client``."""
        from transformers import AutoModelForCausalLM

        with _uncompiled(), torch.no_grad():
            try:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                logits: Tensor = model(torch.tensor([tokens])).logits[0].float()
            except Exception as error:
                raise Failed(f"{type(error).__name__}: {error}"[:_LAST_WORDS]) from error
        return logits


@dataclass(frozen=True)
class OnnxRuntime:
    """onnxruntime on the CPU."""

    name: str = "onnxruntime"
    formats: tuple[str, ...] = ("onnx",)

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """See ``Client``."""
        import onnxruntime

        (graph,) = (path / "onnx").glob("*.onnx")
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], _onnx_inputs(session, tokens))
        return torch.from_numpy(logits[0])


@dataclass(frozen=True)
class TransformersJs:
    """transformers.js on node, which brings an ONNX Runtime of its own."""

    name: str = "transformers.js"
    formats: tuple[str, ...] = ("onnx",)

    def logits(self, path: Path, tokens: list[int]) -> Tensor:
        """See ``Client``."""
        with tempfile.TemporaryDirectory() as scratch:
            given, made = Path(scratch) / "tokens.json", Path(scratch) / "logits.f32"
            given.write_text(json.dumps(tokens))
            _run(["node", str(_beside_packages("transformers_js_client.mjs")), str(path), str(given), str(made)])
            return torch.from_numpy(np.fromfile(made, np.float32)).view(len(tokens), -1)


def qvac_text(path: Path, prompt: str, tokens: int, lora: Path | None = None) -> str:
    """What QVAC Fabric says after a prompt, greedily, with a LoRA adapter if one is given.

    Raises:
        Failed: it does not load the file.
    """
    bare = NPM / "node_modules" / ".bin" / "bare"
    words = [str(bare), str(_beside_packages("qvac_client.js")), str(path), prompt, str(tokens)]
    words += [] if lora is None else [str(lora)]
    lines = _run(words).splitlines()
    return str(json.loads(next(line for line in lines if line.startswith('{"text"')))["text"])


def installed_clients() -> list[Client]:
    """Those of the clients above that this environment has."""
    clients: list[Client] = [XllamaCpp(), Transformers()]
    if find_spec("cyllama"):
        clients.insert(1, Cyllama(f"llama.cpp (cyllama {version('cyllama')})"))
    if find_spec("onnxruntime"):
        clients.append(OnnxRuntime(f"onnxruntime {version('onnxruntime')}"))
    if number := _npm_version("@huggingface/transformers"):
        clients.append(TransformersJs(f"transformers.js {number}"))
    return clients


def qvac_version() -> str:
    """Of QVAC's npm package; empty if it is not installed."""
    return _npm_version("@qvac/llm-llamacpp")


def _npm_version(package: str) -> str:
    described = NPM / "node_modules" / package / "package.json"
    return str(json.loads(described.read_text())["version"]) if described.exists() else ""


def _beside_packages(script: str) -> Path:
    """A script where node finds the packages that it imports."""
    return Path(shutil.copy(HERE / script, NPM))


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        reasons = [line for line in said if _REASON.search(line)] or said[-1:]
        raise Failed(reasons[0][:_LAST_WORDS])
    return done.stdout


def _onnx_inputs(session: object, tokens: list[int]) -> dict[str, np.ndarray]:
    ids = np.array([tokens], np.int64)
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
    }
    inputs = {}
    for wanted in session.get_inputs():  # type: ignore[attr-defined]
        if wanted.name in given:
            inputs[wanted.name] = given[wanted.name]
        else:  # the empty cache: (batch, heads, 0, head_dim)
            _, heads, _, head_dim = wanted.shape
            inputs[wanted.name] = np.zeros((1, heads, 0, head_dim), np.float32)
    return inputs


@contextmanager
def _uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")  # transformers compiles BitLinear: the same numbers, only later
    try:
        yield
    finally:
        torch.compiler.set_stance("default")
