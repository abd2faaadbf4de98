"""A GGUF file, or the shards of one, written front to back: everything but one tensor's data stays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from bitconvert.models.checkpoint import Checkpoint
from bitconvert.models.gguf_rope import rope_tensors
from bitconvert.models.gguf_source import LINEAGE_KEY
from bitconvert.packing.gguf.hparams import add_hparams, require_expressible
from bitconvert.packing.gguf.vocabulary import Vocabulary


class GgufContainer:
    """Announce every tensor with ``add_tensor``, then ``begin``, then ``write`` the data in the same order, in parts.

    Metadata and the tensors that some rotary embeddings need come from the checkpoint by themselves.

    Attributes:
        files: what is written to: the file, or the shards of it in their order; known once it has begun.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        file_type: int,
        max_shard_size: int | None = None,
    ) -> None:
        """Prepare the metadata; nothing is written yet.

        Args:
            path: the file to write; the caller moves it into place.
            checkpoint: where config and lineage come from.
            vocabulary: one token for each row of the embedding.
            file_type: ``general.file_type`` (llama_ftype) of the type that most weights have.
            max_shard_size: bytes of tensor data at most in a file; what is more goes into several, named as by
                gguf-split (``NAME-00001-of-00002.gguf``) and with the metadata in the first. A tensor is never cut.

        Raises:
            BitconvertError: llama.cpp cannot compute this model.
        """
        config = checkpoint.complete
        require_expressible(config, checkpoint.name)
        self._writer = GGUFWriter(path, checkpoint.family.gguf_arch, split_max_size=max_shard_size or 0)
        self._path = path
        self._announced: list[tuple[str, int]] = []
        self._written = 0  # tensors that are complete
        self._part = 0  # bytes of the next one
        _add_general(self._writer, checkpoint, vocabulary.model_name(checkpoint.title), file_type)
        add_hparams(self._writer, config, len(vocabulary.tokens))
        vocabulary.add_to(self._writer)
        self._rope = rope_tensors(config)
        for name, factors in self._rope.items():
            self.add_tensor(name, factors.shape, GGMLQuantizationType.F32, factors.nbytes)

    def add_tensor(self, name: str, shape: tuple[int, ...], raw_dtype: GGMLQuantizationType | int, nbytes: int) -> None:
        """Announce a tensor.

        Args:
            name: its GGUF name.
            shape: (out, in) as in PyTorch, in weights and not bytes.
            raw_dtype: how its data is stored; an id that the ``gguf`` package does not know is written as it is.
            nbytes: length of its data.
        """
        # A float dtype beside raw_dtype tells GGUFWriter that the shape counts weights.
        self._writer.add_tensor_info(
            name,
            shape,
            np.dtype(np.float32),
            nbytes,
            raw_dtype=raw_dtype,  # type: ignore[arg-type]
        )
        self._announced.append((name, nbytes))

    def begin(self) -> None:
        """Write the header, the metadata and the list of tensors."""
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        files = self._writer.fout or []
        self.files = [Path(file.name) for file in files]
        self._header_bytes = [file.tell() for file in files]
        self._file_of = [file for file, held in zip(files, self._writer.tensors, strict=True) for _ in held]
        for factors in self._rope.values():
            self.write(factors)

    @property
    def nbytes(self) -> int:
        """Bytes that all files will have; known once they are begun."""
        parts = (*self._header_bytes, *(nbytes for _, nbytes in self._announced))
        return sum(GGUFWriter.ggml_pad(part, self._writer.data_alignment) for part in parts)

    def write(self, data: NDArray[Any]) -> None:
        """Write the data of the next tensor, or the next part of it.

        Raises:
            ValueError: it is more than was announced, or no further tensor was announced.
        """
        if self._written == len(self._announced):
            raise ValueError(f"{self._path}: all {self._written} announced tensors are written")
        name, nbytes = self._announced[self._written]
        file = self._file_of[self._written]
        end = self._part + data.nbytes
        if end > nbytes:
            raise ValueError(f"{self._path}: tensor {name} has {end} bytes or more, announced were {nbytes}")
        if self._part == 0:
            self._writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._part = end
        if end == nbytes:
            self._writer.write_padding(file, nbytes)
            self._written, self._part = self._written + 1, 0

    def close(self) -> None:
        """Close the file. Harmless when repeated, or when nothing was begun."""
        self._writer.close()


def _add_general(writer: GGUFWriter, checkpoint: Checkpoint, name: str, file_type: int) -> None:
    writer.add_type("model")
    writer.add_name(name)
    if checkpoint.license:
        writer.add_license(checkpoint.license)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if checkpoint.lineage is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, checkpoint.lineage.source)
        writer.add_string(LINEAGE_KEY, checkpoint.lineage.model_dump_json())
