"""What people and strangers may hand to bitconvert, and the one line that each gets.

Every row is run through the command line in this process, with all that surrounds it watched: no traceback, exactly one
``error:`` and one ``hint:``, nothing where the output would be, no other file written or changed, no code of the
model's run.
"""

from __future__ import annotations

import json
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitconvert.cli import main as cli
from bitconvert.models import chat
from tests.models import write_gguf, write_model
from tests.packed import make_checkpoint

SMALL = {"hidden_size": 64, "intermediate_size": 96, "layers": 1}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER = f"MODEL/{WEIGHTS}: truncated or not safetensors (Error while deserializing header: "
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"

SETS = ("training.tokens=256", "training.context=32", "training.batch_size=4", "data.held_out_tokens=64")
WARMUP = ("warmup", "--model", "MODEL", "--data", "TEXT", "--output", "OUT", *(w for s in SETS for w in ("--set", s)))
ROUND = ("pack", "MODEL", "--format", "tq2_0", "--round", "--output", "OUT")
ROUND_SAFETENSORS = ("pack", "MODEL", "--format", "safetensors", "--round", "--output", "OUT")
PACK = ("pack", "MODEL", "--format", "tq2_0", "--output", "OUT")
UNPACK = ("unpack", "MODEL", "--output", "OUT")
EVAL = ("eval", "MODEL", "--ppl", "--data", "TEXT", "--context", "32")
GENERATE = ("generate", "MODEL", "--prompt", "x", "--max-tokens", "2")
CHAT = (*GENERATE, "--chat")
INSPECT = ("inspect", "MODEL")
PLAN = ("plan", "--model", "MODEL", "--data", "TEXT")
VERIFY = ("verify", "MODEL")
RECIPE = ("warmup", "--model", "MODEL", "--recipe", "HERE/recipe.yaml", "--output", "OUT")

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        damage: of a fresh copy of the model; or what is put beside it.
        error: the line, in which MODEL, TEXT, OUT and HERE stand for paths.
        commands: that meet it; each must say the same.
        kind: of the model: plain, latent or gguf.
        text: name of the text file, in HERE.
        code: exit code.
    """

    damage: Damage
    error: str
    commands: tuple[tuple[str, ...], ...]
    kind: str = "plain"
    text: str = "story.txt"
    code: int = 1


# ---- ways to damage --------------------------------------------------------------------------------------------------


def nothing(_: Path) -> None:
    """The model is well."""


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        document = json.loads((model / name).read_text())
        edit(document)
        (model / name).write_text(json.dumps(document))

    return damage


def config(**changes: Any) -> Damage:
    return edit_json("config.json", lambda it: it.update(changes))


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        edit(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def value(name: str, number: float) -> Damage:
    return weights(lambda it: it[name][0].fill_(number))


def zero(name: str) -> Damage:
    return weights(lambda it: it[name].zero_())


def cast(dtype: torch.dtype) -> Damage:
    return weights(lambda it: it.update({UP: (100 * it[UP]).to(dtype)}))


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the safetensors file, whose length is put right."""

    def damage(model: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        document = json.loads(data[8 : 8 + length])
        edit(document)
        text = json.dumps(document).encode()
        (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def twice_in_the_header(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].replace(GATE.encode(), UP.encode())
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def shards(edit: Callable[[dict[str, str]], object] = len, *, keep: bool = False) -> Damage:
    """Two shards and an index, which is then changed."""

    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        if not keep:
            (model / WEIGHTS).unlink()
        weight_map = {name: "ab"[UP in name] + ".safetensors" for name in tensors}
        for file in set(weight_map.values()):
            held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
            save_file(held, model / file, metadata={"format": "pt"})
        edit(weight_map)
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def in_both_shards(model: Path) -> None:
    shards()(model)
    save_file({**load_file(model / "a.safetensors"), **load_file(model / "b.safetensors")}, model / "a.safetensors")


def write(name: str, content: str | bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def beside(name: str, content: str | bytes) -> Damage:
    return lambda model: write(name, content)(model.parent)


def cut(name: str) -> Damage:
    def damage(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return damage


def remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def link(name: str, to: str) -> Damage:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(to)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda model: [damage(model) for damage in damages]


class Evil:
    """Unpickled, it writes the marker."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


PICKLE = pickle.dumps(Evil())
CODE = "open('ran', 'w')\nclass Evil: pass\n"


def smaller_vocabulary(model: Path) -> None:
    weights(lambda it: it.update({EMBEDDING: it[EMBEDDING][:500].clone()}))(model)
    config(vocab_size=500)(model)


def gguf(place: int, number: int, form: str = "<Q") -> Damage:
    """Overwrite a number of the header: magic at 0, version at 4, count of tensors at 8, of metadata at 16."""

    def damage(model: Path) -> None:
        content = bytearray(model.read_bytes())
        struct.pack_into(form, content, place, number)
        model.write_bytes(content)

    return damage


def gguf_cut(model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])


def parquet(column: str, content: list[Any]) -> Damage:
    def damage(model: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: content}), model.parent / "text.parquet")

    return damage


def template(text: str) -> Damage:
    return write("chat_template.jinja", text)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
DEEP = "[" * 100_000

# ---- the table -------------------------------------------------------------------------------------------------------

TABLE: dict[str, Bad] = {
    # numbers in the weights
    "NaN": Bad(value(UP, float("nan")), f"MODEL: tensor {UP} holds NaN or infinity", (WARMUP, ROUND, EVAL, INSPECT)),
    "infinity in the embedding": Bad(
        value(EMBEDDING, float("inf")), f"MODEL: tensor {EMBEDDING} holds NaN or infinity", (WARMUP, ROUND, GENERATE)
    ),
    "a layer of zeros": Bad(zero(UP), f"MODEL: tensor {UP} is zero all over", (WARMUP, ROUND, ROUND_SAFETENSORS)),
    "a trained layer of zeros": Bad(zero(UP), f"MODEL: tensor {UP} is zero all over", (PACK, UNPACK), "latent"),
    "an embedding of zeros": Bad(zero(EMBEDDING), f"MODEL: tensor {EMBEDDING} is zero all over", (WARMUP, ROUND)),
    "integers for weights": Bad(
        cast(torch.int32),
        f"MODEL: tensor {UP} is I32, which is not a type of plain weights",
        (WARMUP, ROUND, EVAL, INSPECT),
    ),
    "booleans for weights": Bad(
        cast(torch.bool), f"MODEL: tensor {UP} is BOOL, which is not a type of plain weights", (ROUND, INSPECT)
    ),
    "float8 weights without scales": Bad(
        cast(torch.float8_e4m3fn),
        f"MODEL: tensor {UP} is F8_E4M3, which is not a type of plain weights",
        (WARMUP, ROUND, EVAL, INSPECT),
    ),
    # tensors that are not the model's
    "a missing tensor": Bad(
        weights(lambda it: it.pop(UP)), f"MODEL: tensor {UP} is missing (1 in all)", (WARMUP, ROUND, EVAL, GENERATE)
    ),
    "a wrong shape": Bad(
        weights(lambda it: it.update({UP: torch.ones(96, 32)})),
        f"MODEL: tensor {UP} has shape (96, 32), its config.json means (96, 64)",
        (WARMUP, ROUND, EVAL),
    ),
    "a config that claims one layer more": Bad(
        config(num_hidden_layers=2),
        "MODEL: tensor model.layers.1.input_layernorm.weight is missing (9 in all)",
        (WARMUP, ROUND, EVAL),
    ),
    "a tensor that no model has": Bad(
        weights(lambda it: it.update({"bad\nerror: all is well\x1b[2J": torch.ones(1)})),
        "MODEL: tensor bad error: all is well\\x1b[2J has no place in the model that config.json describes",
        (WARMUP, ROUND),
    ),
    "a vocabulary smaller than the tokenizer's": Bad(
        smaller_vocabulary,
        "tokenizer: token 'Ġcounted' has id 500, but the embedding has 500 rows",
        (WARMUP, ROUND, ROUND_SAFETENSORS, EVAL, GENERATE),
    ),
    # the safetensors file
    "a truncated file": Bad(
        cut(WEIGHTS),
        f"{HEADER}incomplete metadata, file not fully covered)",
        (WARMUP, ROUND, EVAL, INSPECT),
    ),
    "an empty file": Bad(
        write(WEIGHTS, b""),
        f"{HEADER}header too small)",
        (ROUND,),
    ),
    "a header of 2^63 bytes": Bad(
        write(WEIGHTS, struct.pack("<Q", 2**63) + b"x" * 99),
        f"{HEADER}header too large)",
        (ROUND,),
    ),
    "two tensors in the same bytes": Bad(
        header(lambda it: it[UP].update(data_offsets=[offset - 4 for offset in it[UP]["data_offsets"]])),
        f"{HEADER}invalid offset for tensor `{UP}`)",
        (ROUND, INSPECT),
    ),
    "an offset beyond the file": Bad(
        header(lambda it: it[UP].update(data_offsets=[0, 2**60])),
        f"{HEADER}invalid offset for tensor `model.layers.0.mlp.up_proj.weight`)",
        (ROUND,),
    ),
    "a shape of 2^80 numbers": Bad(
        header(lambda it: it[UP].update(shape=[2**40, 2**40])),
        f"{HEADER}overflow computing buffer size from shape and/or element type)",
        (ROUND,),
    ),
    "a negative shape": Bad(
        header(lambda it: it[UP].update(shape=[-1, 64])),
        f"{HEADER}invalid JSON in header: invalid value: integer `-1`, expected usize at line 1 column 1223)",
        (ROUND,),
    ),
    "a type that does not exist": Bad(
        header(lambda it: it[UP].update(dtype="F128")),
        f"{HEADER}invalid JSON in header: unknown variant `F128`)",
        (ROUND,),
    ),
    "a tensor twice": Bad(
        twice_in_the_header,
        f"{HEADER}invalid offset for tensor `model.layers.0.mlp.up_proj.weight`)",
        (ROUND, INSPECT),
    ),
    "a pickle called safetensors": Bad(
        write(WEIGHTS, PICKLE),
        f"{HEADER}header too large)",
        (WARMUP, ROUND),
    ),
    "a directory in place of the weights": Bad(
        lambda it: (it.joinpath(WEIGHTS).unlink(), it.joinpath(WEIGHTS).mkdir()),
        "MODEL/model.safetensors: truncated or not safetensors (No such device (os error 19))",
        (ROUND,),
    ),
    # the weight index
    "a shard outside": Bad(
        shards(lambda it: it.update({UP: "../elsewhere/model.safetensors"})),
        "MODEL/model.safetensors.index.json: shard '../elsewhere/model.safetensors' lies outside the directory",
        (WARMUP, ROUND, INSPECT),
    ),
    "a shard by its whole path": Bad(
        shards(lambda it: it.update({UP: "/etc/passwd"})),
        "MODEL/model.safetensors.index.json: shard '/etc/passwd' lies outside the directory",
        (WARMUP, ROUND),
    ),
    "a missing shard": Bad(
        both(shards(), remove("b.safetensors")),
        "MODEL/b.safetensors: missing, but named in model.safetensors.index.json",
        (WARMUP, ROUND),
    ),
    "a tensor in the wrong shard": Bad(
        shards(lambda it: it.update({UP: "a.safetensors"})),
        f"MODEL/a.safetensors: tensor {UP} is missing, though the index says that it is here",
        (WARMUP, ROUND),
    ),
    "a tensor in two shards": Bad(
        in_both_shards, f"MODEL/a.safetensors: tensor {UP} is not the index's", (WARMUP, ROUND, INSPECT)
    ),
    "shards and a whole": Bad(
        shards(keep=True), "MODEL: holds both model.safetensors and model.safetensors.index.json", (WARMUP, ROUND)
    ),
    "an index that is a list": Bad(
        both(shards(), write(INDEX, "[]")), f"MODEL/{INDEX}: not a JSON object", (WARMUP, ROUND)
    ),
    "an index without a map": Bad(
        both(shards(), write(INDEX, "{}")), f"MODEL/{INDEX}: not a weight index (no weight_map)", (ROUND,)
    ),
    "an index of brackets": Bad(
        both(shards(), write(INDEX, DEEP)), f"MODEL/{INDEX}: not valid JSON (nested too deeply)", (ROUND,)
    ),
    # other people's programs
    "pickled weights": Bad(
        both(remove(WEIGHTS), write("pytorch_model.bin", PICKLE)),
        "MODEL/pytorch_model.bin: pickled weights are never loaded",
        (WARMUP, ROUND, EVAL, GENERATE, INSPECT),
    ),
    "a pickled checkpoint of another name": Bad(
        both(remove(WEIGHTS), write("consolidated.00.pth", PICKLE)),
        "MODEL/consolidated.00.pth: pickled weights are never loaded",
        (WARMUP, ROUND),
    ),
    "code of the model's own": Bad(
        both(
            config(
                model_type="evil",
                architectures=["Evil"],
                auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
            ),
            write("evil.py", CODE),
        ),
        "MODEL: architecture 'evil' is not supported",
        (WARMUP, ROUND, EVAL, GENERATE, INSPECT),
    ),
    "a directory without weights": Bad(remove(WEIGHTS), "MODEL: no model.safetensors", (WARMUP, ROUND, EVAL, INSPECT)),
    "an already quantized model": Bad(
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "MODEL: already quantized (gptq)",
        (WARMUP, ROUND, EVAL, INSPECT),
    ),
    # links
    "a config that is a link": Bad(
        link("config.json", "../elsewhere/config.json"),
        "MODEL/config.json: leads out of the model's directory, to HERE/elsewhere/config.json",
        (WARMUP, ROUND, INSPECT),
    ),
    "weights that are a link": Bad(
        link(WEIGHTS, "/etc/passwd"),
        f"MODEL/{WEIGHTS}: leads out of the model's directory, to /etc/passwd",
        (WARMUP, ROUND),
    ),
    "a licence that is a secret": Bad(
        link("LICENSE", "../secret.txt"),
        "MODEL/LICENSE: leads out of the model's directory, to HERE/secret.txt",
        (ROUND_SAFETENSORS,),
    ),
    "a link to itself": Bad(link(WEIGHTS, WEIGHTS), f"MODEL/{WEIGHTS}: a link that leads nowhere", (ROUND,)),
    "a link to nowhere": Bad(link(WEIGHTS, "/none"), f"MODEL/{WEIGHTS}: a link that leads nowhere", (ROUND,)),
    "a pipe in place of the weights": Bad(
        lambda it: (it.joinpath(WEIGHTS).unlink(), os.mkfifo(it / WEIGHTS)),
        f"MODEL/{WEIGHTS}: neither a file nor a directory",
        (WARMUP, ROUND, INSPECT),
    ),
    # config.json
    "no config": Bad(remove("config.json"), "MODEL/config.json: missing", (WARMUP, ROUND, EVAL, INSPECT)),
    "a config of brackets": Bad(
        write("config.json", DEEP), "MODEL/config.json: not valid JSON (nested too deeply)", (WARMUP, INSPECT)
    ),
    "a config that is a directory": Bad(
        lambda it: (it.joinpath("config.json").unlink(), it.joinpath("config.json").mkdir()),
        "MODEL/config.json: not valid JSON (Is a directory)",
        (INSPECT,),
    ),
    "a config that says a thing twice": Bad(
        write("config.json", '{"hidden_size": 64, "hidden_size": 32}'),
        "MODEL/config.json: not valid JSON ('hidden_size' is said twice)",
        (INSPECT,),
    ),
    "a number of thousands of digits": Bad(
        write("config.json", f'{{"hidden_size": {"9" * 5000}}}'),
        "MODEL/config.json: not valid JSON (Exceeds the limit (4300 digits) for integer string "
        "conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit)",
        (INSPECT,),
    ),
    "a config in UTF-16": Bad(
        write("config.json", "{}".encode("utf-16")),
        "MODEL/config.json: not valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        (INSPECT,),
    ),
    "a model of no width": Bad(
        config(hidden_size=0), "MODEL: its configuration says that hidden_size is 0", (ROUND, INSPECT)
    ),
    "no key-value heads": Bad(
        config(num_key_value_heads=0), "MODEL: its configuration says that num_key_value_heads is 0", (ROUND, INSPECT)
    ),
    "2^62 tokens": Bad(
        config(vocab_size=2**62), f"MODEL: its configuration says that vocab_size is {2**62}", (WARMUP, INSPECT)
    ),
    "a context of 2^40": Bad(
        config(max_position_embeddings=2**40),
        f"MODEL: its configuration says that max_position_embeddings is {2**40}",
        (ROUND, EVAL),
    ),
    "an epsilon that is none": Bad(
        config(rms_norm_eps=float("nan")), "MODEL: its configuration says that rms_norm_eps is nan", (ROUND, EVAL)
    ),
    "a rotary base of zero": Bad(
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "MODEL: its configuration says that rope_theta is 0",
        (ROUND, EVAL),
    ),
    "2^31 layers": Bad(
        config(num_hidden_layers=2**31), "MODEL: its config.json tells of 2147483648 layers", (WARMUP, INSPECT)
    ),
    "heads that do not divide": Bad(
        config(num_attention_heads=3),
        "MODEL: its config.json describes no model (Class validation error for validator "
        "'validate_architecture': ValueError: The hidden size (64) is not a "
        "multiple of the number of attention heads (3).)",
        (ROUND,),
    ),
    # records
    "a lineage of brackets": Bad(
        write("bitconvert.json", DEEP),
        "MODEL/bitconvert.json: not a lineage record of this version (1 validation error for Lineage)",
        (PACK, EVAL),
        "latent",
    ),
    "λ of two": Bad(
        edit_json("bitconvert.json", lambda it: it.update(lam=2)),
        "MODEL/bitconvert.json: not a lineage record of this version (1 validation error for Lineage)",
        (PACK,),
        "latent",
    ),
    "a model that is half-way": Bad(
        edit_json("bitconvert.json", lambda it: it.update(lam=0.5)),
        "MODEL: not ternary yet, its training stopped at λ = 0.5",
        (PACK, UNPACK),
        "latent",
    ),
    "generation defaults of brackets": Bad(
        write("generation_config.json", DEEP),
        "MODEL: its generation_config.json does not load (nested too deeply)",
        (EVAL, GENERATE),
    ),
    "a card with a bomb": Bad(
        both(write("README.md", f"---\nlicense: {DEEP}\n---\n"), remove(WEIGHTS)),
        "MODEL: no model.safetensors",
        (ROUND,),
    ),
    # tokenizers
    "no tokenizer": Bad(
        remove("tokenizer.json"),
        "MODEL: no tokenizer.json and no tokenizer.model",
        (WARMUP, ROUND, ROUND_SAFETENSORS, EVAL, GENERATE),
    ),
    "an empty tokenizer": Bad(
        write("tokenizer.json", "{}"),
        "MODEL: its tokenizer does not load (KeyError: 'added_tokens')",
        (WARMUP, ROUND, EVAL),
    ),
    "a tokenizer of bytes": Bad(
        write("tokenizer.json", b"\xff\xfe\x00"),
        "MODEL: its tokenizer does not load (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff "
        "in position 0: invalid start byte)",
        (ROUND, GENERATE),
    ),
    "token number 2^31": Bad(
        edit_json("tokenizer.json", lambda it: it["model"]["vocab"].update(x=2**31)),
        "MODEL: its tokenizer has a token of number 2147483648",
        (WARMUP, ROUND),
    ),
    # chat templates
    "a template that loops": Bad(
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "MODEL: its chat template does not end within 1 seconds",
        (CHAT,),
    ),
    "a template that reads attributes": Bad(
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "MODEL: its chat template fails (SecurityError: access to attribute '__class__' of 'list' object is unsafe.)",
        (CHAT,),
    ),
    "a template that changes what it is given": Bad(
        template("{{ messages.append(1) }}"),
        "MODEL: its chat template fails (SecurityError: access to attribute 'append' of 'list' object is unsafe.)",
        (CHAT,),
    ),
    "a template that fills memory": Bad(
        template("{{ 'x' * 10**10 }}"), "MODEL: its chat template fails (it takes more than 512 MB of memory)", (CHAT,)
    ),
    "a template that writes a book": Bad(
        template("{{ 'x' * 10**7 }}"), "MODEL: its chat template fails (it writes 10000000 characters)", (CHAT,)
    ),
    "a template that includes a file": Bad(
        template("{% include '/etc/passwd' %}"),
        "MODEL: its chat template fails (TypeError: no loader for this environment specified)",
        (CHAT,),
    ),
    "a template that raises": Bad(
        template("{{ raise_exception('only in pairs') }}"),
        "MODEL: its chat template fails (TemplateError: only in pairs)",
        (CHAT,),
    ),
    "a template that does not parse": Bad(
        template("{% for %}"),
        "MODEL: its chat template fails (TemplateSyntaxError: Expected an expression, got 'end of statement block')",
        (CHAT,),
    ),
    "a template that writes nothing": Bad(template(" "), "MODEL: its chat template writes nothing", (CHAT,)),
    # GGUF
    "2^62 tensors": Bad(
        gguf(8, 2**62), "MODEL: tensor , at offset 14584: it has 0 dimensions", (INSPECT, WARMUP), "gguf"
    ),
    "2^62 fields": Bad(
        gguf(16, 2**62),
        "MODEL: metadata field 30 of 4611686018427387904, at offset 13975: 150870587516911616 bytes are "
        "announced where 261481 are left",
        (INSPECT, EVAL),
        "gguf",
    ),
    "a truncated GGUF file": Bad(
        gguf_cut,
        "MODEL: tensor token_embd.weight, at offset 14592: 137216 bytes are announced where 123136 are left",
        (INSPECT, WARMUP, EVAL),
        "gguf",
    ),
    "not GGUF": Bad(gguf(0, 0, "<I"), "MODEL: not a GGUF file", (INSPECT, GENERATE), "gguf"),
    "GGUF of version 99": Bad(gguf(4, 99, "<I"), "MODEL: GGUF of version 99", (INSPECT,), "gguf"),
    "an empty GGUF file": Bad(lambda it: it.write_bytes(b""), "MODEL: empty", (INSPECT, UNPACK), "gguf"),
    # texts
    "a text that is not UTF-8": Bad(
        beside("text.txt", b"caf\xe9"), "TEXT, line 1: not UTF-8", (WARMUP, EVAL), text="text.txt"
    ),
    "an empty text": Bad(beside("text.txt", b" \n"), "TEXT: holds no text", (WARMUP, EVAL), text="text.txt"),
    "records without text": Bad(
        beside("text.jsonl", '{"txt": "x"}\n'),
        "TEXT, line 1: no string field 'text'",
        (WARMUP, EVAL),
        text="text.jsonl",
    ),
    "a record of brackets": Bad(
        beside("text.jsonl", DEEP), "TEXT, line 1: not JSON (nested too deeply)", (WARMUP, EVAL), text="text.jsonl"
    ),
    "a column of another name": Bad(
        parquet("txt", ["x"]), "TEXT: no column 'text'", (WARMUP, EVAL), text="text.parquet"
    ),
    "a column of numbers": Bad(
        parquet("text", [1]), "TEXT, row 1: column 'text' holds no string", (WARMUP, EVAL), text="text.parquet"
    ),
    "a truncated parquet file": Bad(
        both(parquet("text", ["x"]), lambda it: cut("text.parquet")(it.parent)),
        "TEXT: not a readable parquet file (Parquet magic bytes not found in footer. Either the file is "
        "corrupted or this is not a parquet file.)",
        (WARMUP, EVAL),
        text="text.parquet",
    ),
    "a truncated archive": Bad(
        beside("text.txt.xz", lzma.compress(b"text " * 999)[:-20]),
        "TEXT: cannot be read (Compressed file ended before the end-of-stream marker was reached)",
        (WARMUP, EVAL),
        text="text.txt.xz",
    ),
    "a text that is not there": Bad(nothing, "TEXT: no such file or directory", (WARMUP, EVAL), text="none.txt"),
    "a text of another kind": Bad(
        beside("text.pdf", "%PDF"), "TEXT: not a type of text file that is known", (WARMUP, EVAL), text="text.pdf"
    ),
    # recipes
    "aliases in a recipe": Bad(
        beside("recipe.yaml", BOMB),
        'HERE/recipe.yaml: not valid YAML (aliases are not read in "<unicode string>", line 2, column '
        "8: b: &b [*a, *a, *a, *a, *a, *a, *a, *a] ^)",
        (RECIPE,),
        code=2,
    ),
    "a recipe of brackets": Bad(
        beside("recipe.yaml", DEEP), "HERE/recipe.yaml: not valid YAML (nested too deeply)", (RECIPE,), code=2
    ),
    "a recipe that says a thing twice": Bad(
        beside("recipe.yaml", "training: {tokens: 1}\ntraining: {tokens: 2}\n"),
        "HERE/recipe.yaml: not valid YAML ('training' is said twice in \"<unicode string>\", line 2, "
        "column 1: training: {tokens: 2} ^)",
        (RECIPE,),
        code=2,
    ),
    "a recipe that would run code": Bad(
        beside("recipe.yaml", "training: !!python/object/apply:os.system ['touch ran']\n"),
        "HERE/recipe.yaml: not valid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system' in \"<unicode "
        'string>", line 1, column 11: training: !!python/object/apply:os.system ... ^)',
        (RECIPE,),
        code=2,
    ),
    "a recipe of bytes": Bad(
        beside("recipe.yaml", b"\x00\xff"),
        "HERE/recipe.yaml: not valid YAML ('utf-8' codec can't decode byte 0xff in position 1: invalid start byte)",
        (RECIPE,),
        code=2,
    ),
    "a recipe of two megabytes": Bad(
        beside("recipe.yaml", "#" * 2**21),
        "HERE/recipe.yaml: not valid YAML (2097152 characters are too many for a recipe)",
        (RECIPE,),
        code=2,
    ),
    "an override of brackets": Bad(
        nothing,
        "--set training.tokens=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[…: the "
        "value is not valid YAML",
        ((*WARMUP, "--set", f"training.tokens={DEEP[:5000]}"),),
        code=2,
    ),
    # outputs
    "an output that is there": Bad(beside("out", "years of work"), "OUT: exists already", (WARMUP, ROUND), code=2),
    "an output that is not ours": Bad(
        beside("out", "years of work"),
        "OUT: was not written by bitconvert, so --overwrite does not replace it",
        ((*ROUND, "--overwrite"), (*WARMUP, "--overwrite")),
        code=2,
    ),
    "hashes that are none": Bad(
        write("SHA256SUMS", "garbage\n"), "MODEL/SHA256SUMS, line 1: not a hash and the name of a file here", (VERIFY,)
    ),
    "hashes that are gone": Bad(nothing, "MODEL/SHA256SUMS: missing", (VERIFY,)),
}


# ---- and how it is held ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    plain = write_model(root / "plain", "smollm2", **SMALL)
    latent = make_checkpoint(root / "latent", "smollm2", **SMALL)
    return {"plain": plain, "latent": latent, "gguf": write_gguf(plain, root / "model.gguf")}


class Place:
    """A directory in which a model lies, a text beside it and a secret beside that; and all that is in it watched."""

    def __init__(self, root: Path, original: Path, story: Path) -> None:
        self.root = root
        self.model = root / original.name
        shutil.copytree(original, self.model) if original.is_dir() else shutil.copyfile(original, self.model)
        shutil.copyfile(story, root / "story.txt")
        (root / "secret.txt").write_text("{}")
        shutil.copytree(original, root / "elsewhere") if original.is_dir() else None

    def words(self, bad: Bad, command: tuple[str, ...]) -> list[str]:
        return [self._path(word, bad) for word in command]

    def expected(self, bad: Bad) -> str:
        return f"error: {self._path(bad.error, bad)}"

    def _path(self, text: str, bad: Bad) -> str:
        names = {"MODEL": self.model, "TEXT": self.root / bad.text, "OUT": self.root / "out", "HERE": self.root}
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    def state(self) -> dict[str, object]:
        """Every file and directory with its content, links as links."""
        found: dict[str, object] = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            is_file = path.is_file() and not path.is_symlink()
            found[name] = path.read_bytes() if is_file else path.readlink() if path.is_symlink() else None
        return found


@pytest.fixture
def place(request: pytest.FixtureRequest, originals: dict[str, Path], story: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, originals[TABLE[request.getfixturevalue("name")].kind], story)


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)


SLOW = ["a template that changes what it is given", "a template that includes a file", "a template that raises"]
"""A template has a process of its own, which takes a second to start: others stand for these in the default tests."""


def rows() -> Iterator[Any]:
    for name, bad in TABLE.items():
        for command in bad.commands:
            words = [word for word in command if word in ("safetensors", "--overwrite")]
            marks = [pytest.mark.slow] if name in SLOW else []
            yield pytest.param(name, command, id=" ".join([name, "|", command[0], *words]), marks=marks)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60


@pytest.mark.parametrize(("name", "command"), rows())
def test_a_bad_input_gets_one_line(
    name: str,
    command: tuple[str, ...],
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = TABLE[name]
    bad.damage(place.model)
    before = place.state()
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(sys, "argv", ["bitconvert", *place.words(bad, command)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    require_one_line(bad, place, int(stopped.value.code or 0), capsys.readouterr().err)
    assert place.state() == before


REAL = ["pickled weights", "aliases in a recipe"]


@pytest.mark.parametrize(("name", "command"), [(name, TABLE[name].commands[0]) for name in REAL if name in TABLE])
def test_a_real_process_says_the_same(name: str, command: tuple[str, ...], place: Place) -> None:
    bad = TABLE[name]
    bad.damage(place.model)
    before = place.state()
    words = [sys.executable, "-m", "bitconvert", *place.words(bad, command)]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=place.root, env=os.environ | paths, capture_output=True, text=True, check=False)
    require_one_line(bad, place, done.returncode, done.stderr)
    assert place.state() == before


def require_one_line(bad: Bad, place: Place, code: int, said: str) -> None:
    lines = [line for line in said.splitlines() if line.startswith(("error:", "hint:", "Traceback"))]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], said
    assert lines[0] == place.expected(bad)
    assert code == bad.code
