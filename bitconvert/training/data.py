"""Text into token blocks: tokenized once, kept in a memory-mapped file, found again by the content it was made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitconvert.atomic import atomic_file
from bitconvert.errors import BitconvertError
from bitconvert.models.generation import without_own_defaults
from bitconvert.models.manifest import hashes
from bitconvert.models.texts import BETWEEN_DOCUMENTS, TEXT_FIELD, ending_of, hub_dataset, read_texts, text_files
from bitconvert.recipe import Data
from bitconvert.report.reporter import Reporter
from bitconvert.training.tokenizing import encode, in_batches

_LAYOUT = "tokens-2"  # part of every cache key: change it when the meaning of the cached bytes changes
_SAMPLED_AT_ONCE = 32
_NOT_COMPUTED = ("_name_or_path", "transformers_version")  # what of a config says nothing of its model


class Text(Protocol):
    """What is trained on, to be told of."""

    @property
    def amount(self) -> str:
        """How much of it there is."""

    @property
    def identity(self) -> str:
        """Which it is: where it comes from, and a checksum."""

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of the texts on disk that it comes from, by path; none where it is read as it is needed."""


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids on disk.

    Attributes:
        ids: memory map, shape (tokens,), uint16 or uint32.
        key: sha256 of all that decided them; also the cache file's name.
        description: where they come from, in words.
        files: SHA-256 of the texts on disk that they come from, by path.
    """

    ids: np.ndarray[Any, np.dtype[Any]]
    key: str
    description: str
    files: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def amount(self) -> str:
        """See ``Text``."""
        return f"{len(self):,} tokens of text"

    @property
    def identity(self) -> str:
        """See ``Text``."""
        return f"{self.description} (sha256 of tokenizer and content {self.key[:16]})"


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of ``context`` tokens out of a stream; what does not fill the last one is left out."""

    def __init__(self, ids: np.ndarray[Any, np.dtype[Any]], context: int) -> None:
        self._ids = ids
        self.context = context

    def __len__(self) -> int:
        return len(self._ids) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        window = torch.from_numpy(self._ids[start : start + self.context].astype(np.int64))
        return {"input_ids": window, "labels": window}


class TrainingWindows(Dataset[dict[str, Tensor]]):
    """The windows of a run in the order of the training, which is the same whenever it is asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """How many the run takes, those counted again that come again."""

    @property
    @abstractmethod
    def distinct(self) -> int:
        """At least so many come before any comes again."""


class ShuffledWindows(TrainingWindows):
    """``count`` windows in a seeded order, every window once before any comes again.

    The order is a function of the seed and the position alone, so a resumed run continues exactly where it stopped.
    """

    def __init__(self, windows: Windows, count: int, seed: int) -> None:
        self.windows = windows
        self._count = count
        self._seed = seed
        self._epoch: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.windows[self.window_at(index)]

    @property
    def distinct(self) -> int:
        """See ``TrainingWindows``."""
        return min(self._count, len(self.windows))

    def window_at(self, index: int) -> int:
        """Which window comes at a place of the order."""
        epoch, position = divmod(index, len(self.windows))
        return int(self._permutation(epoch)[position])

    def visited(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The windows that come at all, ascending."""
        return np.sort(self._permutation(0)[: self._count])

    def _permutation(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, seeded_order(self._seed, epoch, len(self.windows))
        return self._epoch[1]


def seeded_order(seed: int, turn: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The numbers below ``count`` in an order that the seed decides, another at each turn."""
    return np.random.default_rng((seed, turn)).permutation(count)


def split_held_out(tokens: Tokens, held_out_tokens: int, context: int) -> tuple[Windows, Windows]:
    """Training windows, and held-out ones from the end of the stream (at most a tenth of it).

    Raises:
        BitconvertError: the text is too short for one window of each.
    """
    held_out = min(held_out_tokens, len(tokens) // 10) // context * context or context
    training = Windows(tokens.ids[: len(tokens) - held_out], context)
    if len(tokens) < 2 * context or not len(training):
        raise _too_short(tokens, context)
    return training, Windows(tokens.ids[len(tokens) - held_out :], context)


def first_windows(tokens: Tokens, held_out_tokens: int, context: int) -> Windows:
    """Windows from the start of a text given to measure on."""
    windows = Windows(tokens.ids[: max(held_out_tokens, context)], context)
    if not len(windows):
        raise _too_short(tokens, context)
    return windows


def text_of(windows: Windows, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the tokens of all windows stand for, the special ones left out: documents, an empty line between two."""
    ids = torch.cat([windows[index]["input_ids"] for index in range(len(windows))]).tolist()
    documents = [list(group) for is_end, group in groupby(ids, end_of_text(tokenizer).__eq__) if not is_end]
    return BETWEEN_DOCUMENTS.join(tokenizer.batch_decode(documents, skip_special_tokens=True))


def tokenize(sources: Iterable[str], tokenizer: PreTrainedTokenizerFast, reporter: Reporter) -> Tokens:
    """Tokenize local files, directories or a hub dataset, or find the result of having done so.

    Each document is tokenized with the special tokens that the tokenizer adds, and ended by its end-of-text token.

    Raises:
        BitconvertError: a source is missing, malformed or holds no text.
    """
    sources = list(sources)
    digest = hashlib.sha256(f"{_LAYOUT}\n{tokenizer.backend_tokenizer.to_str()}\n{end_of_text(tokenizer)}".encode())
    documents, files = _documents(sources, digest)
    key = digest.hexdigest()
    path = cache_directory() / f"{key}.bin"
    dtype = id_dtype(len(tokenizer))
    if not path.exists():
        reporter.stage(f"tokenizing {', '.join(sources)}")
        _write(path, _encode(documents, tokenizer), dtype)
    return Tokens(_memory_map(path, dtype, sources), key, ", ".join(sources), files)


def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    options: Data,
    context: int,
    seed: int,
    reporter: Reporter,
) -> Tokens:
    """Text sampled from the original model itself, for when there is no other (data-free distillation).

    Every window starts at the token that begins a text and is drawn from the model's own distribution at temperature 1
    (Liu et al., "LLM-QAT", arXiv 2305.17888). Cached by the model's weights, the seed and the amount.
    """
    windows = -(-options.sampled_tokens // context)
    described = f"{_LAYOUT}\nsampled {windows} {context} {seed}\n{model_key(model)}\n"
    key = hashlib.sha256(described.encode()).hexdigest()
    path = cache_directory() / f"{key}.bin"
    dtype = id_dtype(model.config.vocab_size)
    if not path.exists():
        reporter.stage("sampling text from the original model")
        _write(path, _sample(model, tokenizer, windows, context, seed, reporter), dtype)
    return Tokens(_memory_map(path, dtype, []), key, f"{windows * context} tokens sampled from the original model")


def model_key(model: PreTrainedModel) -> str:
    """sha256 of all that decides what a model computes: its config and weights, not its name."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where token blocks, and what a teacher made of them, are kept.

    $BITCONVERT_CACHE, else $XDG_CACHE_HOME/bitconvert, else ~/.cache/bitconvert.
    """
    if "BITCONVERT_CACHE" in os.environ:
        return Path(os.environ["BITCONVERT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bitconvert"


def prepare_cache() -> None:
    """Make the cache's directory.

    Raises:
        BitconvertError: nothing can be written there.
    """
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission, or a read-only disk")
    except OSError as error:
        raise BitconvertError(
            f"{directory}: cannot be written ({error.strerror})",
            "set BITCONVERT_CACHE to a directory that can be written",
        ) from error


def _documents(sources: list[str], digest: Any) -> tuple[Iterator[str], dict[str, str]]:
    """The documents behind the sources, and the hashes of their files; what they are goes into ``digest`` at once."""
    name = hub_dataset(sources)
    if name is not None:
        return _hub_documents(name, digest), {}
    found = hashes(text_files(sources))
    for file, content in found.items():
        digest.update(ending_of(file).encode())  # the same bytes read in another way are another text
        digest.update(bytes.fromhex(content))
    return read_texts(sources), {str(file): content for file, content in found.items()}


@contextmanager
def hub_errors_named(name: str, what: str, hint: str) -> Iterator[None]:
    """Tell what went wrong with a hub dataset: ``datasets`` raises whatever its many back ends raise."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BitconvertError(f"{name}: {what} ({reason[0]})", hint) from error


def open_hub_dataset(name: str, **options: Any) -> Any:
    """The training split of a hub dataset, by ``datasets.load_dataset``.

    Raises:
        BitconvertError: it is not to be had.
    """
    import datasets

    with hub_errors_named(
        name,
        "neither a local text nor a dataset to be had from the Hugging Face hub",
        "check the spelling and the network",
    ):
        return datasets.load_dataset(name, split="train", **options)


def _hub_documents(name: str, digest: Any) -> Iterator[str]:
    dataset = open_hub_dataset(name)
    if TEXT_FIELD not in dataset.column_names:
        raise BitconvertError(f"{name}: no column '{TEXT_FIELD}'", f"its columns are {', '.join(dataset.column_names)}")
    digest.update(dataset._fingerprint.encode())
    return (row[TEXT_FIELD] for row in dataset)


def _encode(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    for batch in in_batches(documents):
        yield from encode(tokenizer.backend_tokenizer, end_of_text(tokenizer), batch)


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    windows: int,
    context: int,
    seed: int,
    reporter: Reporter,
) -> Iterator[list[int]]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BitconvertError(
            "the tokenizer has no token that begins a text, so none can be sampled", "give a text with --data"
        )
    with torch.random.fork_rng(), without_own_defaults(model):
        torch.manual_seed(seed)
        for done in range(0, windows, _SAMPLED_AT_ONCE):
            prompts = torch.full((min(_SAMPLED_AT_ONCE, windows - done), 1), start, device=model.device)
            yield from _sample_windows(model, prompts, context)
            reporter.advance(min(done + _SAMPLED_AT_ONCE, windows), windows)


def _sample_windows(model: PreTrainedModel, prompts: Tensor, context: int) -> list[list[int]]:
    """Sample without ever stopping: an end-of-text token is followed by the next text, as in the training stream."""
    windows: Tensor = model.generate(  # type: ignore[operator]
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=context - 1,
        max_new_tokens=context - 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return windows.tolist()


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that ends a document, if the tokenizer has one."""
    end: int | None = tokenizer.eos_token_id
    return end


def id_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest unsigned integer, of 16 bits or 32, that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _write(path: Path, token_lists: Iterator[list[int]], dtype: np.dtype[Any]) -> None:
    prepare_cache()
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        for ids in token_lists:
            stream.write(np.asarray(ids, dtype).tobytes())


def _memory_map(path: Path, dtype: np.dtype[Any], sources: list[str]) -> np.ndarray[Any, np.dtype[Any]]:
    if path.stat().st_size == 0:
        raise BitconvertError(f"{', '.join(sources)}: holds no text", "give a file with text in it")
    if path.stat().st_size % dtype.itemsize:
        raise BitconvertError(f"{path}: damaged, it ends within a token", "remove it: it is made again")
    return np.memmap(path, dtype, mode="r")


def _too_short(tokens: Tokens, context: int) -> BitconvertError:
    return BitconvertError(
        f"{tokens.description}: {len(tokens)} tokens are too few for windows of {context}",
        "give more text, or lower training.context",
    )
