"""``bitconvert adapt``: an adapter that learns, that peft and llama.cpp compute alike, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.evaluate import evaluate
from bitconvert.evaluation.generate import generate
from bitconvert.evaluation.runtimes import open_runtime
from bitconvert.evaluation.subjects import TorchModel
from bitconvert.models.adapter import read_adapter
from bitconvert.models.chat import ChatTemplate
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.conversations import encode_chat
from bitconvert.models.lineage import read_lineage
from bitconvert.packing.unpack import unpack
from bitconvert.recipe import Adaptation, load_adaptation
from bitconvert.report.reporter import Silent
from bitconvert.report.training import AdaptReport
from bitconvert.training.adapt import adapt
from bitconvert.training.run_directory import Interrupted
from tests.models import write_gguf, write_model
from tests.packed import make_checkpoint, pack_directory
from tests.recording import Recorder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = (
    "training.context=32",
    "training.batch_size=4",
    "training.epochs=0.1",
    "training.eval_every=4",
    "training.save_every=4",
    "training.precision=float32",
    "data.held_out_tokens=128",
    "lora.rank=4",
    "optimizer.lr=5e-3",
)
IDS = torch.randint(5, 500, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def options(source: Path, *overrides: str) -> Adaptation:
    return load_adaptation(None, [*SMALL, f"data.sources=[{source}]", *overrides])


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model of the llama family, whose q and k have other rows in GGUF, with a chat template."""
    directory = make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "smollm2")
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture(scope="module")
def tq2_0(latent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_directory(latent, "tq2_0", tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def done(tq2_0: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdaptReport]:
    output = tmp_path_factory.mktemp("adapt") / "lora"
    return output, adapt(str(tq2_0), output, options(story), reporter=Silent())


def by_torch(model: Path, lora: Path | None = None) -> Tensor:
    """Log-probabilities (tokens, vocabulary)."""
    loaded = TorchModel.load(open_checkpoint(str(model)), lora).model
    with torch.no_grad():
        return loaded(torch.tensor([IDS])).logits[0].double().log_softmax(-1)


def by_llama_cpp(model: Path, lora: Path | None = None) -> Tensor:
    with open_runtime(model, len(IDS), lora=lora, threads=1) as runtime:
        return torch.tensor(runtime.logits(IDS)).double().log_softmax(-1)


def kl(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


# ---- what comes out ------------------------------------------------------------------------------------------------


def test_it_learns_the_text(done: tuple[Path, AdaptReport], tq2_0: Path, story: Path) -> None:
    output, report = done
    assert report.held_out_ppl < 0.5 * report.original_ppl
    assert sorted(file.name for file in output.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "recipe.yaml",
        "tiny-TQ2_0-lora.gguf",
        "training.png",
    ]
    assert not output.with_name("lora.partial").exists()
    assert load_adaptation(output / "recipe.yaml") == options(story)
    assert report.modules == 14
    assert report.parameters == sum(t.numel() for t in load_file(output / "adapter_model.safetensors").values())


def test_llama_cpp_computes_what_was_trained(done: tuple[Path, AdaptReport], tq2_0: Path) -> None:
    pytest.importorskip("xllamacpp")
    output, report = done
    theirs, theirs_adapted = by_llama_cpp(tq2_0), by_llama_cpp(tq2_0, Path(report.gguf))
    ours, ours_adapted = by_torch(tq2_0), by_torch(tq2_0, output)
    assert kl(theirs, ours) <= 1e-3  # int8 activations that round to the other side; in float it is 1e-6: test_families
    assert kl(theirs_adapted, ours_adapted) <= 1e-3
    assert kl(theirs, theirs_adapted) > 0.1  # or there would be nothing to compare


def test_the_gguf_file_is_the_adapter_of_peft(done: tuple[Path, AdaptReport], tq2_0: Path) -> None:
    output, report = done
    checkpoint = open_checkpoint(str(tq2_0))
    by_peft, by_gguf = read_adapter(output, checkpoint), read_adapter(Path(report.gguf), checkpoint)
    assert by_peft.alpha == by_gguf.alpha == 32
    assert by_peft.factors.keys() == by_gguf.factors.keys()
    for name, factors in by_peft.factors.items():
        assert all(map(torch.equal, factors, by_gguf.factors[name])), name


def test_the_gguf_file_says_what_llama_cpp_wants_to_know(done: tuple[Path, AdaptReport]) -> None:
    reader = gguf.GGUFReader(done[1].gguf)
    said = {name: reader.fields[name].contents() for name in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # the row length first
    assert shapes["blk.1.ffn_down.weight.lora_a"] == [512, 4]
    assert shapes["blk.1.ffn_down.weight.lora_b"] == [4, 256]
    assert len(shapes) == 28


def test_stock_peft_computes_the_same_over_stock_transformers(latent: Path, story: Path, tmp_path: Path) -> None:
    """Over an absmean latent checkpoint transformers rounds by itself; its layers are linears to peft."""
    model = tmp_path / "online"
    shutil.copytree(latent, model)
    lineage = read_lineage(model)
    assert lineage is not None
    lineage.model_copy(update={"scaling": lineage.scaling.model_copy(update={"estimator": "absmean"})}).save(model)
    config = json.loads((model / "config.json").read_text())
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    online["modules_to_not_convert"] = ["lm_head"]
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": online}))
    adapt(str(model), tmp_path / "lora", options(story, "training.epochs=0.05"), reporter=Silent())
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(stock, str(tmp_path / "lora")).eval()
        theirs = adapted(torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    assert kl(theirs, by_torch(model, tmp_path / "lora")) <= 1e-6
    assert kl(theirs, by_torch(model)) > 0.1


def test_stock_peft_over_packed_bitnet_needs_to_be_told_of_its_layers(
    latent: Path, story: Path, tmp_path: Path
) -> None:
    from transformers.integrations.bitnet import BitLinear

    model = pack_directory(latent, "safetensors", tmp_path)
    adapt(str(model), tmp_path / "lora", options(story, "training.epochs=0.05"), reporter=Silent())
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with pytest.raises(ValueError, match="BitLinear.* is not supported"):
            peft.PeftModel.from_pretrained(stock, str(tmp_path / "lora"))
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = peft.LoraConfig.from_pretrained(str(tmp_path / "lora"))
        config._register_custom_module({BitLinear: peft.tuners.lora.Linear})
        adapted = peft.PeftModel.from_pretrained(stock, str(tmp_path / "lora"), config=config).eval()
        theirs = adapted(torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    assert kl(theirs, by_torch(model, tmp_path / "lora")) <= 1e-6


@pytest.mark.parametrize("kind", ["latent", "baked"])
def test_every_kind_of_ternary_model_can_be_adapted(
    kind: str, latent: Path, tq2_0: Path, story: Path, tmp_path: Path
) -> None:
    model = latent
    if kind == "baked":
        unpack(open_checkpoint(str(tq2_0)), tmp_path / "baked", reporter=Silent())
        model = tmp_path / "baked"
    report = adapt(str(model), tmp_path / "lora", options(story, "training.epochs=0.05"), reporter=Silent())
    assert report.held_out_ppl < report.original_ppl


def test_eval_and_generate_take_the_adapter_in_both_runtimes(
    done: tuple[Path, AdaptReport], tq2_0: Path, story: Path
) -> None:
    pytest.importorskip("xllamacpp")
    output, _ = done

    def ppl(runtime, lora: Path | None) -> float:
        report = evaluate(str(tq2_0), data=story, max_tokens=256, context=64, runtime=runtime, lora=lora)
        assert report.lora == (None if lora is None else str(lora))
        assert report.perplexity is not None
        return report.perplexity.ppl

    plain, adapted = ppl("torch", None), ppl("torch", output)
    assert adapted < 0.5 * plain
    assert ppl("llama.cpp", output) == pytest.approx(adapted, rel=1e-3)
    texts = [generate(str(tq2_0), "Once", max_tokens=8, lora=output, runtime=r).text for r in ("torch", "llama.cpp")]
    assert texts[0] == texts[1] != generate(str(tq2_0), "Once", max_tokens=8, runtime="torch").text


# ---- conversations ---------------------------------------------------------------------------------------------------

TWO_TURNS = [
    {"role": role, "content": content}
    for role, content in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four."))
]


def chats(path: Path, count: int = 30) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count to {number}."},
                {"role": "assistant", "content": "One two three."},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_learns_what_the_assistant_says(latent: Path, tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl")
    report = adapt(
        str(latent), tmp_path / "lora", options(source, "training.epochs=2", "training.context=64"), reporter=Silent()
    )
    assert report.held_out_ppl < 0.2 * report.original_ppl


def test_held_out_ppl_is_that_of_what_the_assistant_says(latent: Path, tmp_path: Path) -> None:
    source, held_out = chats(tmp_path / "chats.jsonl", 8), tmp_path / "held_out.jsonl"
    talks = [[TWO_TURNS[0], TWO_TURNS[1]], TWO_TURNS, [TWO_TURNS[2], TWO_TURNS[3]]]  # in batches of two: one is padded
    held_out.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    chosen = options(source, f"data.held_out=[{held_out}]", "training.context=64")
    report = adapt(str(latent), tmp_path / "lora", chosen, reporter=Silent())
    loaded = TorchModel.load(open_checkpoint(str(latent)))
    surprise: list[float] = []
    with ChatTemplate(loaded.tokenizer, "it") as template:
        learned = [encode_chat(loaded.tokenizer, template, talk) for talk in talks]
    for encoded in learned:
        assert encoded.said is not None
        ids = torch.tensor(encoded.ids[:64])
        with torch.no_grad():
            log_probs = loaded.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        surprise += (-log_probs[torch.tensor(encoded.said[1:64])]).tolist()
    assert report.original_ppl == pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-4)


def learned(model: Path, messages: list[dict[str, str]], template: str) -> list[str | None]:
    """What the assistant says, as the tokens tell it: None for each stretch that it does not."""
    tokenizer = open_checkpoint(str(model)).tokenizer()
    tokenizer.chat_template = template
    with ChatTemplate(tokenizer, "it") as template:
        encoded = encode_chat(tokenizer, template, messages)
    if encoded.said is None:
        return []
    stretches = groupby(zip(encoded.said, encoded.ids, strict=True), key=itemgetter(0))
    return [tokenizer.decode([token for _, token in stretch]) if said else None for said, stretch in stretches]


def test_an_assistants_turn_is_learned_with_its_end(latent: Path) -> None:
    assert learned(latent, TWO_TURNS, CHATML) == [None, "Two.<|end|>\n", None, "Four.<|end|>\n"]


def test_a_template_that_marks_the_turns_is_believed(latent: Path) -> None:
    marked = (
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}.{% endfor %}"
    )
    assert learned(latent, TWO_TURNS, marked) == [None, "Two.", None, "Four.", None]


def test_a_template_that_tells_earlier_turns_anew_is_learned_whole(latent: Path) -> None:
    forgetful = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}\n{% endfor %}"
    assert learned(latent, TWO_TURNS, forgetful) == []


def test_long_and_silent_conversations_are_told_of(latent: Path, tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl", 5)
    long = [{"role": "user", "content": "Why? " * 40}, {"role": "assistant", "content": "So."}]
    with source.open("a") as file:
        file.write(json.dumps({"messages": long}) + "\n" + json.dumps({"messages": long[:1]}) + "\n")
    recorder = Recorder()
    adapt(
        str(latent), tmp_path / "lora", options(source, "training.epochs=1", "training.context=64"), reporter=recorder
    )
    assert [warning.split()[0] for warning in recorder.warnings] == ["2", "2"]
    assert "cut off" in recorder.warnings[0]
    assert "left out" in recorder.warnings[1]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"messages": "hello"}', "line 2: no list 'messages'"),
        ('{"messages": []}', "line 2: no list 'messages'"),
        ('{"text": "hello"}', "line 2: no list 'messages'"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 has no string 'content'"),
        ('{"messages": [{"role": "user", "content": "a\\ud800"}]}', "line 2: message 1: half of a surrogate"),
        ('{"messages": [', "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(row: str, named: str, latent: Path, tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl", 1)
    source.write_text(source.read_text() + row + "\n")
    with pytest.raises(BitconvertError, match=named):
        adapt(str(latent), tmp_path / "lora", options(source), reporter=Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


# ---- stopping and going on -------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    done: tuple[Path, AdaptReport], tq2_0: Path, story: Path, tmp_path: Path
) -> None:
    class Signalled(Silent):
        def metrics(self, values) -> None:
            if values["step"] == 5 and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "lora"
    with pytest.raises(Interrupted) as caught:
        adapt(str(tq2_0), output, options(story), reporter=Signalled())
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert caught.value.hint == f"continue with: bitconvert adapt --resume --output {output}"
    (saved,) = (tmp_path / "lora.partial" / "checkpoints").glob("checkpoint-6/model.safetensors")
    assert all(".lora_" in name for name in load_file(saved))
    with pytest.raises(UsageError, match="other options"):
        adapt(str(tq2_0), output, options(story, "lora.rank=8"), resume=True, reporter=Silent())
    adapt(str(tq2_0), output, options(story), resume=True, reporter=Silent())
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (done[0] / name).read_bytes()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_plain_model_is_refused(smollm: Path, story: Path, tmp_path: Path) -> None:
    with pytest.raises(BitconvertError, match="not ternary"):
        adapt(str(smollm), tmp_path / "lora", options(story), reporter=Silent())
    with pytest.raises(BitconvertError, match="not ternary"):
        adapt(str(write_gguf(smollm, tmp_path / "plain.gguf")), tmp_path / "lora", options(story), reporter=Silent())


def test_a_model_that_is_half_way_is_refused(latent: Path, story: Path, tmp_path: Path) -> None:
    half = shutil.copytree(latent, tmp_path / "half")
    lineage = read_lineage(half)
    assert lineage is not None
    lineage.model_copy(update={"lam": 0.5}).save(half)
    with pytest.raises(BitconvertError, match="λ = 0.5"):
        adapt(str(half), tmp_path / "lora", options(story), reporter=Silent())


@pytest.mark.parametrize(
    ("override", "named"), [("lora.modules=[head]", "no linear head"), ("training.context=4096", "up to 512 tokens")]
)
def test_options_that_the_model_has_no_place_for(
    override: str, named: str, latent: Path, story: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=named):
        adapt(str(latent), tmp_path / "lora", options(story, override), reporter=Silent())
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_more_than_a_low_rank_product_is_refused(
    done: tuple[Path, AdaptReport], tq2_0: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(done[0], tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(BitconvertError, match="use_dora is True"):
        read_adapter(copy, open_checkpoint(str(tq2_0)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, "lm_head.weight is no matrix"),
        (lambda tensors: dict(list(tensors.items())[1:]), "A or B alone"),
        (lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()}, "NaN"),
        (lambda tensors: {name: tensor[:, :-1] for name, tensor in tensors.items()}, "do not fit"),
        (lambda tensors: {name.replace("q_proj", "x_proj"): t for name, t in tensors.items()}, "none of the linears"),
        (lambda tensors: {}, "no matrix"),
    ],
)
def test_damaged_adapters_are_named(change, named: str, done, tq2_0: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done[0], tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(weights)).items()}, weights)
    with pytest.raises(BitconvertError, match=named) as caught:
        read_adapter(copy, open_checkpoint(str(tq2_0)))
    assert str(copy) in caught.value.message


def test_files_that_are_no_adapter(done: tuple[Path, AdaptReport], tq2_0: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tq2_0))
    (tmp_path / "cut.gguf").write_bytes(Path(done[1].gguf).read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for path in (tq2_0, tmp_path / "cut.gguf", tmp_path / "empty", tmp_path / "none.gguf"):
        with pytest.raises(BitconvertError) as caught:
            read_adapter(path, checkpoint)
        assert str(path) in caught.value.message


def test_an_adapter_of_another_model(done: tuple[Path, AdaptReport], tmp_path: Path) -> None:
    other = open_checkpoint(str(write_model(tmp_path / "other", "smollm2", layers=1)))
    for path in (done[0], Path(done[1].gguf)):
        with pytest.raises(BitconvertError, match="not an adapter of"):
            read_adapter(path, other)
    qwen = open_checkpoint(str(write_model(tmp_path / "qwen", "qwen3")))
    with pytest.raises(BitconvertError, match="it is one for llama"):
        read_adapter(Path(done[1].gguf), qwen)
