"""Whatever stands in the small files that bitconvert reads: each is read, or refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from transformers.utils.chat_template_utils import render_jinja_template

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.prompts import read_prompts
from bitconvert.models.adapter import read_adapter
from bitconvert.models.baked import BAKED_FILE, read_baked
from bitconvert.models.chat_child import answer
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.conversations import read_conversations
from bitconvert.models.lineage import LINEAGE_FILE, Lineage, read_lineage
from bitconvert.models.location import hub_name, locate
from bitconvert.models.manifest import MANIFEST, read_manifest
from bitconvert.models.record import read_json_object
from bitconvert.models.texts import read_texts
from bitconvert.recipe import Recipe, Scaling, load_recipe
from bitconvert.training.gpus import Kernels, read_kernels
from bitconvert.training.metrics import METRICS, read_metrics
from bitconvert.training.run_directory import unfinished_run
from tests.models import write_model

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=2000)

NUMBERS = st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@contextlib.contextmanager
def refused_in_a_line() -> Iterator[None]:
    """Our own exception may come, with a message of one line; every other one is a failure."""
    refusals: list[BitconvertError] = []
    try:
        yield
    except BitconvertError as error:
        refusals.append(error)
    for refusal in refusals:
        assert refusal.message.isprintable()
        assert len(refusal.message) < 20_000
        assert refusal.hint


def edited(document: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """A document with a value of it, however deep, taken out or put in another's place."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(document)
    holder, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        holder[key] = draw(VALUES)
    else:
        del holder[key]
    return document


@st.composite
def recipes(draw: Any) -> str:
    document = Recipe().model_dump(mode="json")
    for _ in range(draw(st.integers(1, 3))):
        document = edited(document, draw)
    return yaml.safe_dump(document, allow_unicode=True)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """A file's content with a range of it taken out, doubled, or replaced by other bytes."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 64)))
    middle = draw(st.sampled_from([b"", content[begin:end] * 2, draw(st.binary(max_size=64))]))
    return content[:begin] + middle + content[end:]


def lineage_json() -> dict[str, Any]:
    lineage = Lineage(source="owner/model", lam=1.0, scaling=Scaling(), tokens_seen=1, data_files={"a.txt": "0" * 64})
    return json.loads(lineage.model_dump_json())


@st.composite
def lineages(draw: Any) -> bytes:
    return json.dumps(edited(lineage_json(), draw)).encode()


def parquet_file(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"] * 20}), path)
    return path.read_bytes()


YAML = recipes() | st.text(max_size=200) | st.text("{}[]&*!|>-:, \n'\"ab1", max_size=60)
JSON = lineages() | st.binary(max_size=200) | st.text('{}[],:"\\u0e1', max_size=60).map(str.encode)


# ---- one reader each -------------------------------------------------------------------------------------------------


def recipe(directory: Path, text: str) -> None:
    file = directory / "recipe.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    load_recipe(str(file))


def override(_: Path, text: str) -> None:
    load_recipe(None, [f"optimizer.lr={text}"])


def lineage(directory: Path, content: bytes) -> None:
    (directory / LINEAGE_FILE).write_bytes(content)
    read_lineage(directory)


def baked(directory: Path, content: bytes) -> None:
    (directory / BAKED_FILE).write_bytes(content)
    read_baked(directory)


def json_object(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    read_json_object(directory / "config.json", "a hint")


def manifest(directory: Path, content: bytes) -> None:
    (directory / MANIFEST).write_bytes(content)
    read_manifest(directory)


def run_record(directory: Path, content: bytes) -> None:
    run = directory / "out.partial"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_bytes(content)
    (run / "recipe.yaml").write_text(Recipe().to_yaml())
    unfinished_run(directory / "out", Recipe)


def metrics(directory: Path, content: bytes) -> None:
    (directory / METRICS).write_bytes(content)
    for line in read_metrics(directory / METRICS):
        assert isinstance(line["step"], int)


def kernels(directory: Path, content: bytes) -> None:
    (directory / "kernels.json").write_bytes(content)
    read_kernels(directory / "kernels.json")


def conversations(directory: Path, content: bytes) -> None:
    (directory / "chats.jsonl").write_bytes(content)
    for messages in read_conversations([str(directory / "chats.jsonl")]):
        assert all(isinstance(message["content"], str) for message in messages)


def prompts(directory: Path, content: bytes) -> None:
    for ending in ("txt", "jsonl"):
        (directory / f"prompts.{ending}").write_bytes(content)
        with contextlib.suppress(BitconvertError):  # of the other type
            read_prompts(directory / f"prompts.{ending}")


def peft_config(directory: Path, content: bytes) -> None:
    peft(directory, {"adapter_config.json": content})


def peft_weights(directory: Path, content: bytes) -> None:
    peft(directory, {"adapter_model.safetensors": content})


def peft(directory: Path, changed: dict[str, bytes]) -> None:
    """An adapter of a tiny model, with a file of it changed."""
    if not (directory / "model").exists():
        write_model(directory / "model", "smollm2", layers=1)
    for name, content in (PEFT | changed).items():
        (directory / name).write_bytes(content)
    read_adapter(directory, open_checkpoint(str(directory / "model")))


def json_lines(directory: Path, content: bytes) -> None:
    (directory / "text.jsonl").write_bytes(content)
    list(read_texts([str(directory / "text.jsonl")]))


def plain_text(directory: Path, content: bytes) -> None:
    (directory / "text.txt").write_bytes(content)
    list(read_texts([str(directory / "text.txt")]))


def archive(directory: Path, content: bytes) -> None:
    (directory / "text.txt.xz").write_bytes(content)
    list(read_texts([str(directory / "text.txt.xz")]))


def parquet(directory: Path, content: bytes) -> None:
    (directory / "text.parquet").write_bytes(content)
    list(read_texts([str(directory / "text.parquet")]))


def chat_template(_: Path, template: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    asked = {"messages": messages, "asks_for_more": True, "marks_turns": False, "tokens": {}, "megabytes": 1}
    said = answer(render_jinja_template, {"template": template, **asked})
    assert said.keys() in ({"text", "said"}, {"refusal"})


def name(_: Path, text: str) -> None:
    locate(text)
    hub_name(text)


TEMPLATES = st.lists(
    st.sampled_from(
        [
            *("{{", "}}", "{%", "%}", " for i in messages ", " endfor ", " if ", " endif ", " set x = "),
            *("messages", "['role']", ".__class__", ".__init__", "|tojson", "|join", "|map('upper')", "cycler", "()"),
            *(
                "self",
                "range(3)",
                " ~ ",
                "+",
                "*",
                "'a'",
                "0",
                " in ",
                " is ",
                "x",
                "loop.index",
                "\n",
                "raise_exception",
            ),
        ]
    ),
    max_size=12,
).map("".join)

CONVERSATION = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
KERNELS = dataclasses.asdict(Kernels("h100", "h100", 700.0, 1400.0, 50.0, 3.0))
PEFT = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}).encode(),
    "adapter_model.safetensors": save(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 256),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(256, 2),
        }
    ),
}

READERS: dict[str, tuple[Callable[[Path, Any], None], st.SearchStrategy[Any]]] = {
    "recipe": (recipe, YAML),
    "override": (override, YAML),
    "lineage": (lineage, JSON),
    "baked": (baked, JSON),
    "json_object": (json_object, JSON),
    "manifest": (manifest, damaged(f"{'0' * 64}  a\n\\{'1' * 64}  b\\nc\n".encode()) | st.binary(max_size=100)),
    "run_record": (run_record, JSON | damaged(b'{"model": "owner/model"}')),
    "json_lines": (json_lines, damaged(b'{"text": "one"}\n{"text": "two"}\n') | st.binary(max_size=100)),
    "plain_text": (plain_text, st.binary(max_size=100)),
    "archive": (archive, damaged(lzma.compress(b"some text " * 20)) | st.binary(max_size=100)),
    "metrics": (metrics, damaged(b'{"step": 0, "original_ppl": 3.5}\n{"step": 1}\n') | JSON),
    "kernels": (kernels, damaged(json.dumps(KERNELS).encode()) | JSON),
    "conversations": (conversations, damaged(CONVERSATION * 2) | JSON),
    "prompts": (prompts, damaged(b'{"text": "one"}\n\n') | JSON),
    "peft_config": (peft_config, damaged(PEFT["adapter_config.json"]) | JSON),
    "peft_weights": (peft_weights, damaged(PEFT["adapter_model.safetensors"]) | st.binary(max_size=200)),
    "chat_template": (chat_template, TEMPLATES),
    "name": (name, st.text(max_size=60) | st.from_regex(r"\w+/[\w.-]+(@[\w.-]+)?(/\w+\.gguf)?", fullmatch=True)),
}


def run(reader: str, options: settings, place: Path) -> None:
    read, inputs = READERS[reader]

    @options
    @given(inputs)
    def reads_or_refuses(content: Any) -> None:
        with refused_in_a_line():
            read(place, content)

    reads_or_refuses()


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_reads_or_refuses(reader: str, tmp_path: Path) -> None:
    run(reader, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_reads_or_refuses_whatever_comes(reader: str, tmp_path: Path) -> None:
    run(reader, MANY, tmp_path)


@pytest.mark.slow
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path) -> None:
    content = parquet_file(tmp_path / "good.parquet")

    @settings(MANY, max_examples=500)
    @given(damaged(content))
    def reads_or_refuses(changed: bytes) -> None:
        with refused_in_a_line():
            parquet(tmp_path, changed)

    reads_or_refuses()
