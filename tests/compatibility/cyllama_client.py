"""Logits of every position through cyllama's llama.cpp: ``python cyllama_client.py model.gguf tokens.npy logits.npy``.

A process of its own, because llama.cpp aborts the one it lives in and brings an OpenMP runtime beside torch's.
"""

from __future__ import annotations

import sys

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """The binding's context asks its model for ``n_vocab``, which this version of the binding forgot."""

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.get_vocab().n_vocab)


def logits_of(path: str, tokens: list[int]) -> np.ndarray:
    """Feed one token at a time, since this binding only reads the first row of logits: float32 (tokens, vocabulary)."""
    llama_cpp.llama_backend_init()
    model_options = llama_cpp.LlamaModelParams()
    model_options.n_gpu_layers = 0
    model = Model(path, model_options)
    options = llama_cpp.LlamaContextParams()
    options.n_ctx = len(tokens) + 8
    options.n_threads = 1
    context = llama_cpp.LlamaContext(model, options)
    rows = []
    for position, token in enumerate(tokens):
        batch = llama_cpp.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        batch.add(token, position, [0], True)
        context.decode(batch)
        rows.append(np.array(context.get_logits(), np.float32))
    return np.stack(rows)


if __name__ == "__main__":
    gguf, tokens_file, logits_file = sys.argv[1:]
    np.save(logits_file, logits_of(gguf, np.load(tokens_file).tolist()))
