"""What ``demo`` tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo.

    Attributes:
        name: original, rounded only, warmed up or control.
        ppl: on held-out stories, computed by torch.
        llama_cpp_ppl: the same computed by llama.cpp from the GGUF; None for a model that was not packed.
        nbytes: of its weight file.
        bits_per_weight: of that file, embeddings included.
    """

    name: str
    ppl: float
    llama_cpp_ppl: float | None
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class DemoReport:
    """What ``bitconvert demo`` showed.

    Attributes:
        output: directory with everything it made.
        rows: original first.
        tokens_scored: per model.
        prompt: given to the packed model.
        text: what it went on with.
        spoken_by: which program computed that text.
        seconds: wall time.
    """

    output: str
    rows: tuple[DemoRow, ...]
    tokens_scored: int
    prompt: str
    text: str
    spoken_by: str
    seconds: float
