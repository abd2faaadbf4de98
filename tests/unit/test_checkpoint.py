"""Opening models: every kind, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitconvert.errors import BitconvertError
from bitconvert.models.checkpoint import Checkpoint, open_checkpoint
from bitconvert.models.families import FAMILIES, Family
from bitconvert.models.latent import claims_bitnet
from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Scaling
from bitconvert.ternary.bitlinear import BitLinear, bitlinears
from tests.models import write_gguf, write_model

COMMIT = "0123456789abcdef" * 2 + "01234567"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def copy(smollm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smollm, tmp_path / "model"))


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- what can be opened ----


def test_a_plain_model_is_read_tensor_by_tensor(smollm: Path) -> None:
    checkpoint, tensors = open_checkpoint(str(smollm)), load_file(smollm / WEIGHTS)
    assert (checkpoint.kind, checkpoint.lineage, checkpoint.family) == ("plain", None, FAMILIES["llama"])
    assert set(checkpoint.tensor_names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == "F32"
        assert torch.equal(checkpoint.read(name), tensor)
    assert not bitlinears(checkpoint.load())


def test_shards_are_one_model(copy: Path, smollm: Path) -> None:
    shard(copy)
    whole, sharded = open_checkpoint(str(smollm)).load().state_dict(), open_checkpoint(str(copy)).load().state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_low_precision_weights_become_float32(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    model = open_checkpoint(str(copy)).load_latent()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_rounded_model_is_ternary_everywhere(smollm: Path) -> None:
    model = open_checkpoint(str(smollm)).load_rounded()
    assert len(bitlinears(model)) == 14
    assert all(len(layer.codes.unique()) == 3 for layer in bitlinears(model))


def test_each_latent_is_rounded_before_the_next_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the floats of a large model never exist all at once."""
    Lineage(source="tiny", lam=1.0, scaling=Scaling(), tokens_seen=1).save(copy)
    events: list[object] = []
    read, freeze = Checkpoint.read_weight, BitLinear.freeze
    monkeypatch.setattr(Checkpoint, "read_weight", lambda self, name: (events.append(name), read(self, name))[1])
    monkeypatch.setattr(BitLinear, "freeze", lambda self: (events.append(self), freeze(self))[1])
    model = open_checkpoint(str(copy)).load()
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            assert events[events.index(f"{name}.weight") + 1] is module
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_gguf_file_is_a_model_too(smollm: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_gguf(smollm, tmp_path / "model.gguf")))
    assert checkpoint.kind == "gguf"
    before, after = load_file(smollm / WEIGHTS), checkpoint.load_latent().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_hub_id_is_fetched(smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, object]] = []
    snapshot = shutil.copytree(smollm, tmp_path / "snapshots" / COMMIT)

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        assert not any("bin" in str(pattern) or "py" in str(pattern) for pattern in options["allow_patterns"])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, revision in (("owner/model", None), ("owner/model@v1.0", "v1.0")):
        checkpoint = open_checkpoint(name)
        assert (checkpoint.name, checkpoint.path, checkpoint.revision) == (name, snapshot, COMMIT)
        assert (checkpoint.unpinned_name, checkpoint.base_name) == ("owner/model", "model")
        assert asked.pop() == ("owner/model", revision)


def test_a_gguf_file_on_the_hub_is_fetched(smollm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    file = write_gguf(smollm, tmp_path / "model.gguf")
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert open_checkpoint("owner/model/sub/model.gguf").kind == "gguf"
    assert open_checkpoint("owner/model@main/sub/model.gguf").base_name == "model.gguf"
    assert asked == [("owner/model", "sub/model.gguf", None), ("owner/model", "sub/model.gguf", "main")]


def test_only_absmean_per_tensor_at_one_claims_bitnet() -> None:
    lineage = Lineage(source="x", lam=1.0, scaling=Scaling(estimator="absmean"), tokens_seen=0)
    assert claims_bitnet(lineage)
    assert not claims_bitnet(lineage.model_copy(update={"lam": 0.9}))
    assert not claims_bitnet(lineage.model_copy(update={"scaling": Scaling(estimator="mse")}))
    assert not claims_bitnet(lineage.model_copy(update={"scaling": Scaling(estimator="absmean", granularity="row")}))


def test_a_family_names_its_linears() -> None:
    family = Family("x", "X", "x", ("mlp.up_proj",), permute_rope=False)
    names = ["model.layers.0.mlp.up_proj", "model.layers.12.mlp.up_proj", "model.layers.0.mlp.up_projx", "lm_head"]
    assert family.ternary_modules(names) == names[:2]


# ---- what cannot ----


def truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def escape(directory: Path) -> None:
    shard(directory)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def lose_a_shard(directory: Path) -> None:
    shard(directory)
    (directory / "b.safetensors").unlink()


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "wrong architecture": (lambda d: edit_config(d, model_type="mamba"), "architecture 'mamba' is not supported"),
    "already quantized": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        "already quantized \\(gptq\\)",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "no model.safetensors"),
    "pickled weights": (pickle_only, "pytorch_model.bin: pickled weights are never loaded"),
    "truncated": (truncate, "model.safetensors: truncated or not safetensors"),
    "garbage": (
        lambda d: (d / WEIGHTS).write_bytes(b"garbage!" * 9),
        "model.safetensors: truncated or not safetensors",
    ),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "model.safetensors: truncated or not safetensors"),
    "NaN": (lambda d: edit_weights(d, poison), "tensor model.layers.1.mlp.up_proj.weight holds NaN"),
    "missing tensor": (
        lambda d: edit_weights(d, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        "tensor model.layers.0.mlp.up_proj.weight is missing",
    ),
    "homeless tensor": (
        lambda d: edit_weights(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)})),
        "tensor model.layers.0.self_attn.q_proj.bias has no place in the model",
    ),
    "wrong shape": (lambda d: edit_config(d, intermediate_size=1024), r"down_proj.weight has shape \(256, 512\)"),
    "a word for a number": (lambda d: edit_config(d, hidden_size="wide"), "describes no model .*hidden_size"),
    "heads that do not divide": (lambda d: edit_config(d, num_attention_heads=3), "describes no model"),
    "unknown activation": (lambda d: edit_config(d, hidden_act="wobble"), "describes no model .*wobble"),
    "quantized in a word": (lambda d: edit_config(d, quantization_config="int4"), "is not an object"),
    "an index beside a whole": (lambda d: (d / INDEX).write_text("[]"), "holds both"),
    "shard outside": (escape, "lies outside the directory"),
    "lost shard": (lose_a_shard, "b.safetensors: missing"),
    "broken lineage": (lambda d: (d / "bitconvert.json").write_text("{}"), "bitconvert.json: not a lineage record"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_named(case: str, copy: Path) -> None:
    damage, message = BROKEN[case]
    damage(copy)
    with pytest.raises(BitconvertError, match=message) as caught:
        open_checkpoint(str(copy)).load_latent()
    assert caught.value.hint


@pytest.mark.parametrize("name", ["./nothing", "/no/such/dir", "one two", "nothing", "a/b/c"])
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(BitconvertError, match="no such file or directory"):
        open_checkpoint(name)


def test_a_hub_id_that_is_not_there() -> None:
    with pytest.raises(BitconvertError, match="nobody/nothing: neither a local path nor"):
        open_checkpoint("nobody/nothing")


def test_code_of_the_model_never_runs(copy: Path) -> None:
    (copy / "evil.py").write_text("open('/tmp/bitconvert-evil', 'w')\nclass Evil: pass\n")
    edit_config(copy, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})
    Path("/tmp/bitconvert-evil").unlink(missing_ok=True)
    open_checkpoint(str(copy)).load()
    assert not Path("/tmp/bitconvert-evil").exists()


def test_an_untied_head_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", "falcon3")
    edit_weights(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BitconvertError, match="tensor lm_head.weight is missing"):
        open_checkpoint(str(directory)).load()
