"""docs/compatibility.md: every family, every format, every client, from real loads. No cell is typed by hand.

    python -m tests.compatibility docs/compatibility.md

A tiny random model of each family is packed in all formats that hold it. Each client loads each file and computes the
logits of a text full of odd characters; they are compared with what ``bitconvert eval`` computes for the same file, and
that is the family's own class in transformers with the file's weights and the runtime's int8 activations.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor

from bitconvert.demo.demo import MODEL
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.models.adapter import Adapter, Factors, write_gguf_adapter
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.families import FAMILIES
from bitconvert.models.lineage import Lineage, library_versions
from bitconvert.packing.formats import FORMATS
from bitconvert.packing.pack import pack
from bitconvert.recipe import Packing, Scaling
from bitconvert.report.packing import PackedFile, PackReport
from bitconvert.report.reporter import Silent
from tests.compatibility.clients import Client, Failed, installed_clients, qvac_text, qvac_version
from tests.models import NASTY, VARIANTS, write_model
from tests.texts import STORY

TOKENS = 160
SPOKEN = 24
ADAPTED = "tq2_0 with LoRA"
QVAC_FORMATS = ("tq1_0", "tq2_0", ADAPTED, "f16")
PROMPT = "Once upon a time"
TRAINED = "demo"
"""The trained model that ships with bitconvert, rounded without warmup: what it predicts is not chance."""

PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

console = Console(stderr=True)


@dataclass(frozen=True)
class Distance:
    """How far a client's predictions are from ours: mean KL in nats, share of equal favourites, ppl ratio - 1."""

    kl: float
    top1: float
    ppl: float

    def __str__(self) -> str:
        return f"{self.kl:.0e} · {self.top1:.0%} · {self.ppl:+.2%}"


def main(target: Path) -> None:
    """Measure everything and write the page."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    clients = installed_clients()
    cells: dict[tuple[str, str, str], str] = {}
    refusals: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in _models():
            console.print(variant)
            model = _latent(Path(scratch) / variant, variant)
            report = _packed(model)
            for name, reason in report.refusals.items():
                refusals[variant, name] = reason.removeprefix(f"{model.name}: ")
            cells |= {(variant, *key): cell for key, cell in _measured(model, report, clients)}
    target.write_text(_page(clients, cells, refusals), encoding="utf-8")


# ---- the measurement -------------------------------------------------------------------------------------------------


def _models() -> list[str]:
    return [TRAINED, *VARIANTS]


def _latent(directory: Path, variant: str) -> Checkpoint:
    if variant == TRAINED:
        shutil.copytree(MODEL, directory)
    else:
        write_model(directory, variant)
    (directory / "chat_template.jinja").write_text(PLAIN_CHAT)
    Lineage(source=variant, lam=1.0, scaling=Scaling(estimator="absmean"), tokens_seen=0).save(directory)
    return open_checkpoint(str(directory))


def _packed(model: Checkpoint) -> PackReport:
    output = Path(model.name).with_name(f"{model.base_name}-packed")
    return pack(model, Packing(formats=("all",)), output, reporter=Silent())


def _measured(model: Checkpoint, report: PackReport, clients: list[Client]) -> Iterable[tuple[tuple[str, str], str]]:
    """((client, format), cell) for each pair that there is."""
    text = STORY if model.base_name == TRAINED else "".join(NASTY[3:])
    tokens = model.tokenizer()(text)["input_ids"][:TOKENS]
    files = {file.format: file for file in report.files}
    for form, file in files.items():
        takers = [client for client in clients if form in client.formats]
        if not takers:
            continue
        expected = _logits(files.get("f16", file) if form == "onnx" else file, tokens)
        for client in takers:
            yield (client.name, form), _compared(client, Path(file.path), tokens, expected)
    if qvac_version():
        for form in QVAC_FORMATS:
            if form in files:
                yield ("QVAC Fabric", form), _spoken_alike(Path(files[form].path))
        if "tq2_0" in files:
            path = Path(files["tq2_0"].path)
            yield ("QVAC Fabric", ADAPTED), _spoken_alike(path, _random_adapter(model, path.with_suffix(".lora.gguf")))


def _logits(file: PackedFile, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = open_checkpoint(file.path).load()(torch.tensor([tokens])).logits[0].float()
    return logits


def _compared(client: Client, path: Path, tokens: list[int], expected: Tensor) -> str:
    try:
        given = client.logits(path, tokens)
    except Failed as error:
        return f"does not load: {error}"
    return str(_distance(expected, given[:, : expected.shape[1]], tokens))


def _distance(expected: Tensor, given: Tensor, tokens: list[int]) -> Distance:
    ours, theirs = expected.double().log_softmax(-1), given.double().log_softmax(-1)
    targets = torch.tensor(tokens[1:]).unsqueeze(1)
    gained = (theirs[:-1].gather(1, targets) - ours[:-1].gather(1, targets)).mean()
    return Distance(
        kl=max(0.0, float((ours.exp() * (ours - theirs)).sum(-1).mean())),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        ppl=float((-gained).exp()) - 1,
    )


def _random_adapter(model: Checkpoint, path: Path) -> Path:
    """An adapter that changes what a model says."""
    generator = torch.Generator().manual_seed(0)
    linears = model.family.ternary_modules(name.removesuffix(".weight") for name in model.weights())
    factors = {}
    for name in linears:
        rows, columns = model.weights()[f"{name}.weight"]
        a, b = (torch.randn(shape, generator=generator) for shape in ((8, columns), (rows, 8)))
        factors[name] = Factors(0.1 * a, 0.1 * b)
    write_gguf_adapter(Adapter(8.0, factors), model, path)
    return path


def _spoken_alike(path: Path, lora: Path | None = None) -> str:
    """How much of the greedy text two runtimes have in common, from its beginning."""
    with open_runtime(path, n_ctx=256, lora=lora, threads=1) as runtime:
        expected = runtime.generate(PROMPT, SPOKEN)
    try:
        given = qvac_text(path, PROMPT, SPOKEN, lora)
    except Failed as error:
        return f"does not load: {error}"
    expected, given = (text.replace("\ufffd", "") for text in (expected, given))  # QVAC drops broken UTF-8 silently
    alike = next((i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), len(expected))
    return f"{alike} of {len(expected)} characters"


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(clients: list[Client], cells: dict[tuple[str, str, str], str], refusals: dict[tuple[str, str], str]) -> str:
    parts = [_head()]
    for client in clients:
        parts.append(f"## {client.name}\n\n{_table(client.name, client.formats, cells)}")
    if qvac_version():
        parts.append(
            f"## QVAC Fabric (@qvac/llm-llamacpp {qvac_version()}, npm, CPU)\n\nIt gives text, no logits: how far its "
            "greedy text equals llama.cpp's. Around a prompt for Qwen 3 it puts a template of its own.\n\n"
            f"{_table('QVAC Fabric', QVAC_FORMATS, cells)}"
        )
    parts.append(f"## What was refused\n\n{_refused(refusals)}")
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items() if name != "accelerate")
    return (
        "# Compatibility\n\nWritten by `make compatibility`; do not edit.\n\n"
        "A cell is: KL(bitconvert || client) in nats per token · tokens on whose most likely successor both agree · "
        "difference of the perplexities. Empty: refused, see the end. The first row is the trained model that ships "
        "with bitconvert, rounded, on a story; the others are tiny random models with large logits, on odd characters; "
        f"{TOKENS} tokens each. Where activations are int8, torch and the client may round a value the other way, and "
        "models like these feel that far more than well-trained ones. No client here reads I2_S: its bytes are held "
        "against the layout in tests/unit/test_formats.py.\n\n"
        f"{date.today().isoformat()}, {versions}. Families: {', '.join(FAMILIES)}."
    )


def _table(client: str, formats: tuple[str, ...], cells: dict[tuple[str, str, str], str]) -> str:
    shown = [form for form in (*FORMATS, ADAPTED) if form in formats]
    rows = [["model", *shown], ["---"] * (len(shown) + 1)]
    for variant in _models():
        rows.append([variant, *(cells.get((variant, client, form), "") for form in shown)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _refused(refusals: dict[tuple[str, str], str]) -> str:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for (variant, form), reason in refusals.items():
        by_reason.setdefault((form, reason), []).append(variant)
    rows = [f"| {form} | {', '.join(variants)} | {reason} |" for (form, reason), variants in by_reason.items()]
    return "\n".join(["| format | model | reason |", "|---|---|---|", *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
