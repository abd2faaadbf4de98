"""A model ready to be measured: in torch, or in a real llama.cpp, behind the same few verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.perplexity import Predictor, pieces
from bitconvert.evaluation.runtimes import Runtime, open_runtime
from bitconvert.evaluation.windows import TokenizedText, tokenize, tokenized_elsewhere
from bitconvert.models.adapter import checked_gguf_adapter, read_adapter, with_adapter
from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.gguf_source import tensor_types
from bitconvert.models.gguf_types import I2_S
from bitconvert.models.head import head_of, hidden_states
from bitconvert.models.llama_cpp_library import find_library


@dataclass(frozen=True)
class Subject:
    """A model and its tokenizer, loaded.

    Attributes:
        name: the model as the user named it.
        runtime: which program computes: ``torch``, or llama.cpp with its client and version.
        predict: its logits.
        tokenize: text, and whether BOS comes first (None: as the model's own tokenizer has it) -> tokens.
    """

    name: str
    runtime: str
    predict: Predictor
    tokenize: Callable[[str, bool | None], TokenizedText]


@dataclass(frozen=True)
class TorchModel:
    """A model loaded into torch, on the fastest device there is, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, checkpoint: Checkpoint, lora: Path | None = None) -> TorchModel:
        """Load what the file means: rounded, decoded, with int8 activations where it is ternary.

        Args:
            checkpoint: the model.
            lora: an adapter to put beside its weights: a directory of peft's, or a GGUF file.
        """
        adapter = None if lora is None else read_adapter(lora, checkpoint)
        model = checkpoint.load()
        if adapter is not None:
            model = with_adapter(model, adapter)
        model.to(device())  # type: ignore[arg-type]
        return cls(model, checkpoint.tokenizer())

    def predict(self, ids: Tensor, scored: int) -> Iterator[Tensor]:
        """Logits that predict the last ``scored`` tokens of each window: see ``Predictor``."""
        hidden, head = hidden_states(self.model, ids.to(self.model.device)), head_of(self.model)
        for positions in pieces(hidden[:, -scored - 1 : -1]):
            yield head.logits(positions).float()

    def tokenize(self, text: str, bos: bool | None) -> TokenizedText:
        """Tokens of a text: see ``tokenize_by``."""
        return tokenize_by(self.tokenizer, text, bos)

    def as_subject(self, name: str) -> Subject:
        """The same, to be measured under the user's name for it."""
        return Subject(name, "torch", self.predict, self.tokenize)


@contextmanager
def llama_cpp_subject(
    checkpoint: Checkpoint, context: int, threads: int | None, lora: Path | None = None
) -> Iterator[Subject]:
    """A GGUF file (see ``require_gguf``), with an adapter if one is named, in llama.cpp, closed at the block's end.

    Raises:
        BitconvertError: there is no llama.cpp, or it cannot load the file.
    """
    adapter = None if lora is None else checked_gguf_adapter(lora, checkpoint)
    with open_runtime(checkpoint.path, context, lora=adapter, threads=threads) as runtime:

        def predict(ids: Tensor, scored: int) -> Iterator[Tensor]:
            for window in ids.tolist():
                logits = torch.tensor(runtime.logits(window, len(window) - scored - 1))
                yield from pieces(logits[None, :-1])

        def tokenized(text: str, bos: bool | None) -> TokenizedText:
            return _llama_cpp_tokens(runtime, checkpoint, text, bos)

        yield Subject(checkpoint.name, f"{runtime.name} {runtime.version}", predict, tokenized)


def require_gguf(checkpoint: Checkpoint) -> None:
    """Refuse what llama.cpp cannot open.

    Raises:
        UsageError: the model is no GGUF file.
    """
    if checkpoint.kind != "gguf":
        raise UsageError(
            f"{checkpoint.name}: llama.cpp reads GGUF files only",
            "pack its checkpoint as tq2_0; of a packed directory, what `bitconvert unpack` makes of it",
        )


def llama_cpp_reads(checkpoint: Checkpoint) -> bool:
    """Whether a model is a GGUF file of types that llama.cpp knows: I2_S is not among them."""
    return checkpoint.kind == "gguf" and I2_S.name not in tensor_types(checkpoint.path).values()


def has_llama_cpp() -> bool:
    """Whether a llama.cpp library is installed, or named by the user."""
    try:
        find_library()
    except BitconvertError:
        return False
    return True


def tokenize_by(tokenizer: PreTrainedTokenizerFast, text: str, bos: bool | None) -> TokenizedText:
    """Tokens of a text; BOS comes first if asked for, and by default if the tokenizer itself would add it."""
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    adds_bos = len(framed) > 1 and framed[0] == tokenizer.bos_token_id
    return tokenize(text, tokenizer, _chosen_bos(tokenizer.bos_token_id, adds_bos, bos))


def device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _llama_cpp_tokens(runtime: Runtime, checkpoint: Checkpoint, text: str, bos: bool | None) -> TokenizedText:
    """llama.cpp's own ids. Where in the text they begin, only our tokenizer tells, if it gives the same ids."""
    ids = runtime.tokenize(text)
    chosen = _chosen_bos(None if runtime.bos_token_id < 0 else runtime.bos_token_id, runtime.add_bos, bos)
    ours = tokenize(text, checkpoint.tokenizer(), chosen)
    return ours if ours.ids.tolist() == ids else tokenized_elsewhere(text, ids, chosen)


def _chosen_bos(bos_id: int | None, adds_bos: bool, asked: bool | None) -> int | None:
    if asked and bos_id is None:
        raise BitconvertError("this model's tokenizer has no BOS token", "leave the BOS option out")
    return bos_id if (adds_bos if asked is None else asked) else None
