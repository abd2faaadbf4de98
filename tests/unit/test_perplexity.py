"""Perplexity: against the loops of the programs whose conventions it claims, and against statistics done by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation import perplexity
from bitconvert.evaluation.perplexity import (
    Predictor,
    Scores,
    clustered_standard_error,
    compare,
    kl_of,
    nll_of,
    pieces,
    score,
    standard_error,
    summarize,
)
from bitconvert.evaluation.subjects import TorchModel
from bitconvert.evaluation.windows import (
    Convention,
    TokenizedText,
    first_tokens,
    tokenize,
    tokenized_elsewhere,
    windows,
)
from bitconvert.models.tokenizers import load_tokenizer
from bitconvert.report.evaluation import Perplexity
from bitconvert.report.reporter import Silent
from tests.recording import Recorder

VOCABULARY = 160


@pytest.fixture(scope="module")
def model(smollm: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(smollm)


@pytest.fixture(scope="module")
def text(story: Path) -> str:
    return story.read_text(encoding="utf-8")[:1500]


def predictor(model: LlamaForCausalLM) -> Predictor:
    return TorchModel(model, None).predict  # type: ignore[arg-type]


def of_ids(count: int, bos: int | None = None) -> TokenizedText:
    """A text of ``count`` tokens 1, 2, 3 …, of three bytes each."""
    return TokenizedText(torch.arange(1, count + 1), 3 * torch.arange(count + 1), "hash", bos)


def logits_after(ids: Tensor) -> Tensor:
    """Logits that depend on the token alone, as uneven as a model's."""
    rows = torch.stack([torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(i)) for i in range(200)])
    return 3 * rows[ids]


def invented(ids: Tensor, scored: int) -> Iterator[Tensor]:
    """A model that computes them."""
    return pieces(logits_after(ids[:, -scored - 1 : -1]))


def measured(
    text: TokenizedText, model: Predictor, convention: Convention, context: int, stride: int | None = None
) -> Perplexity:
    cuts = windows(text, convention, context, stride)
    return summarize(score(cuts, model, None, Silent()), text, convention, context, stride)


# ---- the conventions, against the programs that they come from ----------------------------------------------------


def hugging_face_loop(model: LlamaForCausalLM, ids: Tensor, max_length: int, stride: int) -> float:
    """The loop of transformers' perplexity guide, written down from its description there."""
    total, count, scored_up_to = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = ids[begin:end].unsqueeze(0)
        labels = inputs.clone()
        labels[:, : -(end - scored_up_to)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        valid = int((labels != -100).sum()) - 1  # the guide takes one off, since the labels are shifted
        total, count, scored_up_to = total + float(loss) * valid, count + valid, end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 64), (64, 32), (64, 20), (100, 7)])
@pytest.mark.parametrize("bos", [None, 0])
def test_hf_is_the_perplexity_guides_number(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    context: int,
    stride: int | None,
    bos: int | None,
) -> None:
    tokens = tokenize(text, tokenizer, bos)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    ids = ids if bos is None else torch.cat([torch.tensor([bos]), ids])
    found = measured(tokens, predictor(model), "hf", context, stride)
    assert found.ppl == pytest.approx(hugging_face_loop(model, ids, context, stride or context), rel=0.005)
    # Without overlap the guide's count is exact, and so must the agreement be.
    if stride in (None, context):
        assert found.ppl == pytest.approx(hugging_face_loop(model, ids, context, context), rel=1e-5)


def llama_perplexity_loop(model: LlamaForCausalLM, ids: list[int], n_ctx: int, bos: int | None) -> tuple[float, float]:
    """What llama-perplexity does, token by token in float64, written down from its source: ppl and its ±."""
    ids = ids if bos is None else [bos, *ids]  # the text is tokenized with special tokens
    nll = nll2 = 0.0
    count, first = 0, n_ctx // 2
    for chunk in range(len(ids) // n_ctx):
        window = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        seen = window if bos is None else [bos, *window[1:]]
        with torch.no_grad():
            logits = model(torch.tensor([seen])).logits[0].double()
        for position in range(first, n_ctx - 1):
            value = -float(logits[position].log_softmax(-1)[window[position + 1]])
            nll, nll2, count = nll + value, nll2 + value * value, count + 1
    nll, nll2 = nll / count, nll2 / count
    return math.exp(nll), math.sqrt((nll2 - nll * nll) / (count - 1)) * math.exp(nll)


@pytest.mark.parametrize("context", [64, 65, 200])
@pytest.mark.parametrize("bos", [None, 0])
def test_llama_cpp_is_llama_perplexitys_number(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, context: int, bos: int | None
) -> None:
    tokens = tokenize(text, tokenizer, bos)
    ppl, stderr = llama_perplexity_loop(model, tokens.ids.tolist(), context, bos)
    found = measured(tokens, predictor(model), "llama.cpp", context)
    assert found.ppl == pytest.approx(ppl, rel=1e-5)
    assert found.stderr == pytest.approx(stderr, rel=1e-4)
    assert (found.convention, found.context, found.stride, found.bos) == (
        "llama.cpp",
        context,
        context,
        bos is not None,
    )


# ---- windows ------------------------------------------------------------------------------------------------------


def shown(cuts: list[perplexity.Window]) -> list[tuple[list[int], int, int]]:
    return [(cut.ids.tolist(), cut.scored, cut.bytes_scored) for cut in cuts]


def test_hf_windows() -> None:
    assert shown(windows(of_ids(7), "hf", 3)) == [([1, 2, 3], 2, 6), ([4, 5, 6], 2, 6)]  # nothing comes before 7
    assert shown(windows(of_ids(8), "hf", 3))[-1] == ([7, 8], 1, 3)
    overlapping = [([1, 2, 3, 4], 3, 9), ([3, 4, 5, 6], 2, 6), ([5, 6, 7], 1, 3)]
    assert shown(windows(of_ids(7), "hf", 4, 2)) == overlapping


def test_hf_windows_with_bos_before_the_text() -> None:
    assert shown(windows(of_ids(5, bos=0), "hf", 3)) == [([0, 1, 2], 2, 6), ([3, 4, 5], 2, 6)]


def test_llama_cpp_windows() -> None:
    assert shown(windows(of_ids(11), "llama.cpp", 4)) == [([1, 2, 3, 4], 1, 3), ([5, 6, 7, 8], 1, 3)]
    assert shown(windows(of_ids(10), "llama.cpp", 5)) == [([1, 2, 3, 4, 5], 2, 6), ([6, 7, 8, 9, 10], 2, 6)]
    with_bos = [([0, 1, 2, 3], 1, 3), ([0, 5, 6, 7], 1, 3)]
    assert shown(windows(of_ids(9, bos=0), "llama.cpp", 4)) == with_bos


@pytest.mark.parametrize(
    ("convention", "context", "tokens", "what"),
    [("hf", 8, 7, "one window of 8"), ("llama.cpp", 8, 15, "two windows of 8"), ("hf", 8, 0, "one window of 8")],
)
def test_a_text_too_short_is_an_error(convention: Convention, context: int, tokens: int, what: str) -> None:
    with pytest.raises(BitconvertError, match=f"too short for {what}.* it has {tokens}"):
        windows(of_ids(tokens), convention, context)
    assert windows(of_ids(tokens + 1 if tokens else context), convention, context)


@pytest.mark.parametrize(
    ("convention", "context", "stride"),
    [("hf", 8, 9), ("hf", 8, 0), ("hf", 1, None), ("llama.cpp", 8, 4), ("llama.cpp", 2, None)],
)
def test_impossible_windows_are_usage_errors(convention: Convention, context: int, stride: int | None) -> None:
    with pytest.raises(UsageError):
        windows(of_ids(100), convention, context, stride)


def test_tokens_know_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Grüße aus 東京 🙂! Ein zweiter Satz, ganz ASCII."
    tokens = tokenize(text, tokenizer, None)
    assert int(tokens.starts[0]) == 0
    assert int(tokens.starts[-1]) == len(text.encode())
    assert bool((tokens.starts.diff() >= 0).all())
    third = tokenizer.convert_ids_to_tokens(tokens.ids.tolist()).index("!")
    assert text.encode()[tokens.starts[third] :].decode().startswith("! Ein")
    assert sum(cut.bytes_scored for cut in windows(tokens, "hf", 4, 2)) == len(text.encode()) - int(tokens.starts[1])


def test_bytes_of_tokens_from_elsewhere_are_shared_out() -> None:
    tokens = tokenized_elsewhere("ä" * 10, [5, 6, 7, 8], None)
    assert tokens.starts.tolist() == [0, 5, 10, 15, 20]
    assert tokens.sha256 == tokenized_elsewhere("ä" * 10, [1], None).sha256


def test_the_first_tokens_of_a_text() -> None:
    assert shown(windows(first_tokens(of_ids(9), 4), "hf", 4)) == [([1, 2, 3, 4], 3, 9)]


# ---- the numbers --------------------------------------------------------------------------------------------------


def test_batches_and_pieces_do_not_change_the_number(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = windows(tokenize(text, tokenizer, None), "hf", 50, 40)

    def flatter(ids: Tensor, scored: int) -> Iterator[Tensor]:
        return (0.5 * logits for logits in predictor(model)(ids, scored))

    whole = score(cuts, predictor(model), flatter, Silent())
    monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(perplexity, "_POSITIONS_AT_ONCE", 3)
    parts = score(cuts, predictor(model), flatter, Silent())
    assert whole.bytes_scored == parts.bytes_scored
    assert torch.equal(whole.window, parts.window)
    for name in ("nll", "original_nll", "kl", "agree"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_windows_go_together_and_logits_come_in_pieces(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, ...]] = []
    sizes: list[int] = []
    monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", 200)
    monkeypatch.setattr(perplexity, "_POSITIONS_AT_ONCE", 16)

    def watched(ids: Tensor, scored: int) -> Iterator[Tensor]:
        passes.append(tuple(ids.shape))
        for logits in predictor(model)(ids, scored):
            sizes.append(len(logits))
            yield logits

    score(windows(first_tokens(tokenize(text, tokenizer, None), 330), "hf", 50), watched, None, Silent())
    assert passes == [(4, 50), (2, 50), (1, 30)]
    assert sizes == 6 * [16, 16, 16, 1] + [16, 13]  # of a window of 50 tokens, 49 are predicted


def test_progress_is_told_with_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", 100)
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(perplexity.time, "monotonic", lambda: next(clock))
    told: list[dict[str, float]] = []
    reporter = Recorder()
    monkeypatch.setattr(reporter, "metrics", told.append)
    score(windows(of_ids(150), "hf", 10), invented, None, reporter)
    assert told == [
        {"window": 10, "windows": 15, "tokens_per_second": 50, "eta_seconds": 1},
        {"window": 15, "windows": 15, "tokens_per_second": 37.5, "eta_seconds": 0},
    ]


def test_every_token_is_scored_by_hand() -> None:
    text = of_ids(20)
    found = measured(text, invented, "hf", 10)
    pairs = [(at, at + 1) for at in range(1, 20) if at != 10]  # token 11 begins a window
    nll = [-float(logits_after(torch.tensor(a)).double().log_softmax(-1)[b]) for a, b in pairs]
    assert found.ppl == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(np.sum(nll) / math.log(2) / (3 * len(nll)), rel=1e-6)
    assert found.stderr == pytest.approx(found.ppl * np.std(nll, ddof=1) / math.sqrt(len(nll)), rel=1e-5)
    assert (found.tokens_scored, found.bytes_scored, found.text_sha256) == (18, 54, "hash")


def test_one_window_has_no_error_by_windows() -> None:
    assert measured(of_ids(10), invented, "hf", 10).window_stderr is None


def test_the_clustered_error_is_that_of_window_means() -> None:
    values = torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values += torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    window = torch.arange(12).repeat_interleave(30)
    of_means = float(values.mean(dim=1).std()) / math.sqrt(12)
    assert clustered_standard_error(values.flatten(), window) == pytest.approx(of_means, rel=1e-9)
    assert standard_error(values.flatten()) < of_means / 2  # tokens of a window go together here


def test_kl_and_nll_against_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = (4 * torch.randn(6, 1000, generator=generator) for _ in range(2))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    torch.testing.assert_close(kl_of(p, q).double(), exact, rtol=1e-5, atol=0)
    targets = torch.arange(6)
    torch.testing.assert_close(
        nll_of(p, targets).double(), -p.double().log_softmax(-1)[range(6), targets], rtol=1e-5, atol=1e-6
    )


def test_a_comparison_by_hand() -> None:
    def sharper_after(ids: Tensor) -> Tensor:
        logits = 1.5 * logits_after(ids)
        logits[ids % 4 == 0] *= -1  # every fourth position prefers another token
        return logits

    def sharper(ids: Tensor, scored: int) -> Iterator[Tensor]:
        return pieces(sharper_after(ids[:, -scored - 1 : -1]))

    text = of_ids(40)
    scores = score(windows(text, "hf", 40), sharper, invented, Silent())
    found = compare(scores, "original")
    alone = measured(text, sharper, "hf", 40), measured(text, invented, "hf", 40)
    assert found.original == "original"
    assert found.original_ppl == pytest.approx(alone[1].ppl)
    assert found.ppl_ratio == pytest.approx(alone[0].ppl / alone[1].ppl)
    assert found.top1_agreement == pytest.approx(30 / 39)
    p, q = (after(text.ids[:-1]).double().log_softmax(-1) for after in (logits_after, sharper_after))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_stderr == pytest.approx(float(kl.std()) / math.sqrt(39), rel=1e-4)
    ratio_error = float((scores.nll - scores.original_nll).std()) / math.sqrt(39)
    assert found.ppl_ratio_stderr == pytest.approx(found.ppl_ratio * ratio_error)


def test_a_model_is_no_distance_from_itself() -> None:
    found = compare(score(windows(of_ids(40), "hf", 10), invented, invented, Silent()), "itself")
    assert (found.kl, found.ppl_ratio, found.ppl_ratio_stderr, found.top1_agreement) == (0, 1, 0, 1)


def test_without_an_original_there_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="without an original"):
        compare(score(windows(of_ids(40), "hf", 10), invented, None, Silent()), "nothing")


def test_numbers_that_are_none_are_errors() -> None:
    broken = Scores(nll=torch.tensor([1.0, math.nan]).double(), window=torch.zeros(2).long(), bytes_scored=6)
    with pytest.raises(BitconvertError, match="not finite"):
        summarize(broken, of_ids(3), "hf", 3, None)


def test_a_hopeless_model_keeps_a_number_that_json_can_hold() -> None:
    hopeless = Scores(nll=torch.full((2,), 5000.0).double(), window=torch.zeros(2).long(), bytes_scored=6)
    assert math.isfinite(summarize(hopeless, of_ids(3), "hf", 3, None).ppl)
