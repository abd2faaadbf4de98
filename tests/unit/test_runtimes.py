"""llama.cpp's tokens and logits against transformers' and tokenizers', on GGUF files written here."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitconvert.errors import BitconvertError
from bitconvert.evaluation.runtimes import LlamaCpp, llama_perplexity, open_runtime
from bitconvert.models.llama_cpp_library import find_library

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 256, 256, 2, 4, 2
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "1 2"]
Q2_0 = 42  # not in gguf 0.19
TEXTS = ["the thin 12 in a", "Grüße, naïve 東京 🙂", "  \n\n\t tabs ", "", "don't 12345 IT'S", "a\x00b", "<|bos|>the"]


def vocabulary() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return ["<|bos|>", "<|eos|>", *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def hf_tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|bos|>", special=True), AddedToken("<|eos|>", special=True)])
    return tokenizer


def ternary(weight: np.ndarray) -> np.ndarray:
    """Codes times one fp16 scale."""
    scale = np.float32(np.float16(np.abs(weight).mean()))
    return np.clip(np.rint(weight / scale), -1, 1).astype(np.float32) * scale


def to_q2_0(weight: np.ndarray) -> np.ndarray:
    """Bytes [rows, in / 64 * 18] of a ternary weight [rows, in]: d as fp16, then 4 values a byte, low bits first."""
    blocks = weight.reshape(-1, 64)
    d = np.abs(blocks).max(axis=1, keepdims=True)
    q = (np.rint(blocks / np.where(d > 0, d, 1)) + 1).astype(np.uint8).reshape(-1, 16, 4)
    packed = q[..., 0] | q[..., 1] << 2 | q[..., 2] << 4 | q[..., 3] << 6
    return np.concatenate([d.astype(np.float16).view(np.uint8), packed], axis=1).reshape(len(weight), -1)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """HF's halves of a head to llama.cpp's interleaved pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model():
    """A random ternary LLaMA whose next-token distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=1024, rms_norm_eps=1e-5,
        initializer_range=0.06, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(torch.from_numpy(ternary(weight.numpy())))
    return model


def write_hparams(writer, add_bos: bool) -> None:
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3, 3] + [1] * (len(vocabulary()) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(add_bos)


def write_gguf(path: Path, model, kind: str, add_bos: bool = False, drop: str = "") -> Path:
    """The model with its linears stored as F32, TQ1_0, TQ2_0 or Q2_0 and all else as F32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(str(path), "llama")
    write_hparams(writer, add_bos)
    for name, tensor in model.state_dict().items():
        target, weight = names.get_name(name, (".weight",)), tensor.numpy()
        if target == drop:
            continue
        if "attn_q" in target or "attn_k." in target:
            weight = permute(weight, HEADS if "attn_q" in target else KV_HEADS)
        if kind == "F32" or not name.endswith("proj.weight"):
            writer.add_tensor(target, np.ascontiguousarray(weight))
        elif kind == "Q2_0":  # int8, so that the writer does not look up a block size that it lacks
            writer.add_tensor(target, to_q2_0(weight).view(np.int8), raw_shape=weight.shape, raw_dtype=Q2_0)
        else:
            qtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: write_gguf(folder / f"{kind}.gguf", model, kind) for kind in ("F32", "TQ1_0", "TQ2_0", "Q2_0")}


@pytest.fixture(scope="module")
def runtime(files):
    with open_runtime(files["F32"], n_ctx=700, threads=2) as runtime:
        yield runtime


def log_probs(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(logits, np.float64)).log_softmax(-1).numpy()


def torch_logits(model, tokens: list[int], int8: bool) -> np.ndarray:
    """Logits [n, vocab]; with int8 the inputs of the ternary linears are rounded to absmax/127 per token."""

    def fake_int8(_, inputs):
        step = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((inputs[0] / step).round() * step,)

    linears = [m for name, m in model.named_modules() if name.endswith("proj")] if int8 else []
    hooks = [linear.register_forward_pre_hook(fake_int8) for linear in linears]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return logits


TOKENS = np.random.default_rng(1).integers(2, len(vocabulary()), 600).tolist()


@pytest.mark.parametrize(
    ("kind", "int8", "kl", "difference"),
    [
        ("F32", False, 1e-5, 0.0003),
        ("TQ1_0", True, 4e-4, 0.018),
        ("TQ2_0", True, 4e-4, 0.018),
        ("Q2_0", False, 4e-4, 0.018),  # int8 per block of 32 or 64 there: nearer to float than to int8 per token
    ],
)
def test_logits_are_those_of_transformers(model, files, kind, int8, kl, difference):
    with open_runtime(files[kind], n_ctx=600, threads=2) as runtime:
        ours = log_probs(runtime.logits(TOKENS))
    theirs = log_probs(torch_logits(model, TOKENS, int8))
    assert ours.shape == (600, len(vocabulary()))
    assert (
        np.abs(theirs - theirs.mean(axis=0)).mean() > 0.5
    )  # a model that says the same everywhere would prove nothing
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).mean() <= kl
    assert np.abs(theirs - ours).mean() <= difference


def test_logits_are_float32_from_an_empty_cache(runtime):
    whole = runtime.logits(TOKENS[:40])
    assert whole.dtype == np.float32
    runtime.logits(TOKENS[300:400])
    np.testing.assert_array_equal(runtime.logits(TOKENS[:40]), whole)


@pytest.mark.parametrize("first", [0, 1, 511, 512, 513, 599])  # llama.cpp is fed 512 tokens at a time
def test_first_leaves_out_the_rows_before_it(runtime, first):
    whole, part = runtime.logits(TOKENS), runtime.logits(TOKENS, first=first)
    assert part.shape == (600 - first, runtime.n_vocab)
    np.testing.assert_allclose(part, whole[first:], atol=1e-4)


@pytest.mark.parametrize("tokens", [[], [0] * 701, [-1], [10_000]])
def test_tokens_that_cannot_be_evaluated(runtime, tokens):
    with pytest.raises(ValueError, match=r"token|context"):
        runtime.logits(tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_tokenizers(runtime, text):
    expected = hf_tokenizer().encode(text, add_special_tokens=False).ids
    assert runtime.tokenize(text, parse_special=True) == expected


def test_special_tokens(runtime, model, tmp_path):
    assert runtime.tokenize("<|eos|>", parse_special=True) == [1]
    assert len(runtime.tokenize("<|eos|>")) > 1
    assert (runtime.add_bos, runtime.bos_token_id) == (False, 0)
    assert runtime.tokenize("a", add_special=True) == runtime.tokenize("a")
    with open_runtime(write_gguf(tmp_path / "bos.gguf", model, "F32", add_bos=True)) as with_bos:
        assert (with_bos.add_bos, with_bos.bos_token_id) == (True, 0)
        assert with_bos.tokenize("a", add_special=True) == [0, *with_bos.tokenize("a")]


def test_facts(runtime):
    assert "xllamacpp" in runtime.name
    assert runtime.version
    assert (runtime.n_ctx, runtime.n_vocab) == (700, len(vocabulary()))


def test_greedy_text_is_the_most_likely_one(runtime):
    ids = runtime.tokenize("the thin")
    for _ in range(20):
        ids.append(int(runtime.logits(ids)[-1].argmax()))
    expected = hf_tokenizer().decode(ids[len(runtime.tokenize("the thin")) :])
    assert 1 not in ids, "the test needs a prompt that does not end early"
    assert runtime.generate("the thin", max_tokens=20) == expected


def test_sampled_text_depends_on_the_seed_only(runtime):
    texts = [runtime.generate("the", 20, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_generation_stops_where_the_context_ends(files):
    with open_runtime(files["F32"], n_ctx=8) as runtime:
        assert runtime.generate("in", max_tokens=1000) is not None
        with pytest.raises(BitconvertError, match="prompt is 9 tokens"):
            runtime.generate("135791357", max_tokens=1)
        assert len(runtime.tokenize("3")) == 1  # a refusal leaves the runtime usable


def test_opened_many_times_closed_twice(files, capfd):
    for _ in range(5):
        runtime = open_runtime(files["Q2_0"], n_ctx=16)
        assert runtime.logits([5]).shape == (1, runtime.n_vocab)
        runtime.close()
        runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.logits([5])
    assert capfd.readouterr() == ("", "")


def test_verbose_lets_the_log_through(files, capfd):
    open_runtime(files["F32"], n_ctx=16, verbose=True).close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "llama_model_loader" in err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100_000])


def other_type(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    path.write_bytes(data[:at] + (36).to_bytes(4, "little") + data[at + 4 :])


def repeat_a_token(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace("«".encode(), "ª".encode(), 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"not a model"), "magic"),
        (lambda path: path.write_bytes(b""), "magic"),
        (truncate, "not within the file bounds"),
        (other_type, "of type 36"),
        (repeat_a_token, r"died \(exit status -6\).*GGML_ASSERT\(id_to_token"),
    ],
)
def test_a_bad_file_is_named(model, tmp_path, capfd, damage, message):
    path = write_gguf(tmp_path / "bad.gguf", model, "F32")
    damage(path)
    with pytest.raises(BitconvertError, match=message) as error:
        open_runtime(path)
    assert str(path) in error.value.message
    assert error.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_missing_tensor_is_named(model, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", model, "F32", drop="blk.1.attn_k.weight")
    with pytest.raises(BitconvertError, match=r"blk\.1\.attn_k\.weight"):
        open_runtime(path)


def test_no_file(tmp_path):
    with pytest.raises(BitconvertError, match="not a file"):
        open_runtime(tmp_path)


def test_llama_cpp_that_dies_in_use_is_an_error(files):
    runtime = LlamaCpp(files["F32"], n_ctx=16)
    os.kill(runtime._child.pid, signal.SIGABRT)
    with pytest.raises(BitconvertError, match=r"F32\.gguf: llama\.cpp died \(exit status -6\)"):
        runtime.logits([5])


def test_no_client(files, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_LIB", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(BitconvertError, match="not installed") as error:
        open_runtime(files["F32"])
    assert "pip install 'bitconvert[llamacpp]'" in error.value.hint


def test_a_library_of_ones_own(files, monkeypatch, tmp_path):
    library, _, _ = find_library()
    monkeypatch.setenv("LLAMA_CPP_LIB", str(library))
    with open_runtime(files["F32"], n_ctx=16) as runtime:
        assert library.name in runtime.name
    monkeypatch.setenv("LLAMA_CPP_LIB", str(tmp_path / "missing.so"))
    with pytest.raises(BitconvertError, match=r"missing\.so"):
        open_runtime(files["F32"])
    libc = next(Path("/lib").glob("*-linux-gnu/libm.so.6"), None)
    if libc is not None:
        monkeypatch.setenv("LLAMA_CPP_LIB", str(libc))
        with pytest.raises(BitconvertError, match="C API"):
            open_runtime(files["F32"])


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_llama_perplexity_is_asked_and_understood(tmp_path, monkeypatch):
    body = f'echo "$@" > {tmp_path}/arguments; echo "[1]18.1,[2]19.2" ; echo "0.41.014.416 I Final estimate: PPL = 19.2856 +/- 0.68330" >&2'  # noqa: E501
    monkeypatch.setenv("LLAMA_PERPLEXITY", str(script(tmp_path / "own", body)))
    assert llama_perplexity("m.gguf", "t.txt", n_ctx=256, threads=3) == (19.2856, 0.6833)
    assert (tmp_path / "arguments").read_text() == "-m m.gguf -f t.txt -c 256 -t 3\n"


def test_llama_perplexity_on_path(tmp_path, monkeypatch):
    script(tmp_path / "llama-perplexity", "echo 'Final estimate: PPL = 5.0000 +/- 0.10000'")
    monkeypatch.delenv("LLAMA_PERPLEXITY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert llama_perplexity("m.gguf", "t.txt").ppl == 5.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'I ok'; echo 'E you need at least 1024 tokens'", "need at least 1024"),
        ("echo 'Final estimate: PPL = 5.0 +/- 0.1'; exit 1", "Final estimate"),
        ("exit 3", "status 3.*nothing"),
    ],
)
def test_llama_perplexity_that_fails(tmp_path, monkeypatch, body, message):
    monkeypatch.setenv("LLAMA_PERPLEXITY", str(script(tmp_path / "own", body)))
    with pytest.raises(BitconvertError, match=message):
        llama_perplexity("m.gguf", "t.txt")


def test_no_llama_perplexity(monkeypatch):
    monkeypatch.setenv("LLAMA_PERPLEXITY", "no-such-binary")
    with pytest.raises(BitconvertError, match="no-such-binary"):
        llama_perplexity("m.gguf", "t.txt")


def test_import_is_light():
    code = "import sys, bitconvert.evaluation.runtimes; print({'torch', 'numpy', 'xllamacpp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
