"""The command line from the outside: exit codes, one error line and one hint, JSON and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest

from bitconvert.training.run_directory import partial_directory
from tests.commands import Outcome

COMMANDS = (
    "convert",
    "warmup",
    "plan",
    "pack",
    "unpack",
    "eval",
    "generate",
    "adapt",
    "inspect",
    "compare",
    "verify",
    "recipes",
    "demo",
    "doctor",
)

TINY = ["training.tokens=256", "training.context=32", "training.batch_size=4", "data.held_out_tokens=64"]
SETS = [word for override in TINY for word in ("--set", override)]


@pytest.fixture(scope="module")
def ternary(smollm: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "ternary"
    command = [
        sys.executable,
        "-m",
        "bitconvert",
        "warmup",
        "--model",
        smollm,
        "--data",
        story,
        "--output",
        output,
        *SETS,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return output


# ---- it works ----


def test_the_three_commands(bitconvert, ternary: Path, smollm: Path, story: Path, tmp_path: Path) -> None:
    packed = bitconvert("pack", ternary, "--format", "tq2_0", "--format", "safetensors", "--output", tmp_path, "--json")
    assert packed.code == 0, packed.err
    files = json.loads(packed.out)["files"]
    assert [file["format"] for file in files] == ["tq2_0", "safetensors"]
    for file in files:
        evaluated = bitconvert(
            "eval", file["path"], "--ppl", "--data", story, "--context", 64, "--against", smollm, "--json"
        )
        assert evaluated.code == 0, evaluated.err
        report = json.loads(evaluated.out)
        assert report["perplexity"]["context"] == 64
        assert report["comparison"]["kl"] > 0
        inspected = bitconvert("inspect", file["path"], "--json")
        assert json.loads(inspected.out)["ternary_share"] > 0.5
        written = bitconvert("generate", file["path"], "--prompt", "The quick", "--max-tokens", 5)
        assert written.code == 0, written.err
        assert written.out.startswith("The quick")


def test_a_changed_output_is_told_in_words_in_json_and_by_the_exit_code(
    bitconvert, ternary: Path, tmp_path: Path
) -> None:
    assert bitconvert("pack", ternary, "--format", "tq2_0", "--output", tmp_path / "o").code == 0
    told = bitconvert("verify", tmp_path / "o")
    assert (told.code, told.out.partition(" (")[0]) == (0, "2 files are as they were written")
    (tmp_path / "o" / "README.md").write_text("")
    told = bitconvert("verify", tmp_path / "o")
    assert (told.code, told.error()) == (1, f"error: {tmp_path / 'o'}: not as it was written (1 changed)")
    assert re.search(r"README\.md +changed", told.out)
    told = bitconvert("verify", tmp_path / "o", "--json")
    assert (told.code, json.loads(told.out)["changed"]) == (1, ["README.md"])


def test_names_in_a_file_are_no_orders_to_the_terminal(bitconvert, smollm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(smollm, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    evil = {"[/red]": tensors["model.norm.weight"] + 2, "\x1b[2J\nall is well": tensors["model.norm.weight"] + 1}
    save_file({**tensors, **evil}, model / "model.safetensors", metadata={"format": "pt"})
    told = bitconvert("inspect", model)
    assert told.code == 0
    assert "[/red]" in told.out
    assert "\\x1b[2J" in told.out
    assert "\x1b" not in told.out


def test_unpack_and_what_can_be_done_with_it(bitconvert, ternary: Path, story: Path, tmp_path: Path) -> None:
    packed = bitconvert("pack", ternary, "--format", "tq2_0", "--output", tmp_path, "--json")
    file = Path(json.loads(packed.out)["files"][0]["path"])
    told = bitconvert("unpack", file)
    assert told.code == 0, told.err
    baked = tmp_path / f"{file.stem}-baked"
    assert f"saved {baked}\nnext: bitconvert pack {baked} --format" in told.out
    assert bitconvert("unpack", file, "--output", baked).error() == f"error: {baked}: exists already"
    again = bitconvert("unpack", file, "--output", baked, "--overwrite", "--json")
    assert json.loads(again.out)["kind"] == "gguf"
    evaluated = bitconvert("eval", baked, "--ppl", "--data", story, "--context", 64, "--json")
    assert json.loads(evaluated.out)["kind"] == "baked"
    inspected = json.loads(bitconvert("inspect", baked, "--json").out)
    assert inspected["ternary_share"] > 0.5
    assert {tensor["type"] for tensor in inspected["tensors"] if tensor["ternary"]} == {"F32, ternary values"}
    repacked = bitconvert("pack", baked, "--format", "tq2_0", "--output", tmp_path / "again", "--json")
    assert Path(json.loads(repacked.out)["files"][0]["path"]).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("command", ["inspect", "eval", "pack"])
def test_tables_for_people(command: str, bitconvert, ternary: Path, story: Path, tmp_path: Path) -> None:
    arguments = {
        "inspect": [ternary],
        "eval": [ternary, "--ppl", "--data", story, "--context", 64],
        "pack": [ternary, "--format", "q2_0", "--output", tmp_path],
    }
    expected = {"inspect": "latent ternary", "eval": "perplexity", "pack": "bits per weight"}
    outcome = bitconvert(command, *arguments[command])
    assert outcome.code == 0, outcome.err
    assert expected[command] in outcome.out
    assert command != "eval" or re.search(r"window \d+/\d+ · [\d,]+ tokens/s · ETA", outcome.err)


def test_warmup_prints_one_json_document(bitconvert, smollm: Path, story: Path, tmp_path: Path) -> None:
    outcome = bitconvert("warmup", "--model", smollm, "--data", story, "--output", tmp_path / "o", *SETS, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["steps"] == 2
    assert "held-out ppl at λ = 1" in outcome.err
    assert "next checkpoint at" in outcome.err


def test_a_plan_is_told_and_writes_nothing(bitconvert, smollm: Path, tmp_path: Path) -> None:
    arguments = ("plan", "--model", smollm, "--gpu", "rtx-4090", *SETS)
    outcome = bitconvert(*arguments, "--set", "scaling.granularity=row")
    assert outcome.code == 0, outcome.err
    for words in (
        "becomes ternary",
        "at the peak of memory",
        "activations",
        "rtx-4090",
        "(estimate)",
        "never measured",
    ):
        assert words in outcome.out
    assert "per row: transformers' BitLinear has one scale per tensor" in " ".join(outcome.out.split())
    document = json.loads(bitconvert(*arguments, "--json").out)
    assert document["recipe"]["lam"]["reach_one_at"] == 0.25
    assert [forecast["measured"] for forecast in document["forecasts"]] == [True, False]
    assert document["forecasts"][0]["total_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_devices_that_train_in_different_ways_tells_them_in_order(bitconvert, smollm: Path) -> None:
    batch = ("training.batch_size=16", "training.micro_batch_size=1", "training.tokens=16384", "training.context=32")
    overrides = ("init.method=auto", "lam.curve=auto", "init.epochs=1", "data.held_out_tokens=64", *batch)
    outcome = bitconvert(
        *("plan", "--model", smollm, "--gpu", "8xh100"), *(word for each in overrides for word in ("--set", each))
    )
    assert outcome.code == 0, outcome.err
    rows = ["initialisation", "training, λ < 1", "training, λ = 1 ", "optimizer", "evaluations", "checkpoints"]
    places = [outcome.out.index(f"  {row}") for row in rows]
    assert places[:3] == sorted(places[:3])
    assert places[-1] == max(places)


def test_a_dry_run_is_a_plan(bitconvert, smollm: Path, tmp_path: Path) -> None:
    common = ("--model", smollm, "--output", tmp_path / "o", "--json", *SETS)
    told = json.loads(bitconvert("warmup", "--dry-run", *common).out)
    plan = json.loads(bitconvert("plan", *common).out)
    assert told["files"] == plan["files"]
    assert (told["disk_bytes"], told["recipe"]) == (plan["disk_bytes"], plan["recipe"])
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_goes_on_by_its_output_alone(
    bitconvert, smollm: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitconvert.conversion import convert as conversion

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "tiny"
    options = ("--data", story, "--format", "tq2_0", *SETS, "--set", "init.method=none")
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "pack", interrupted)
        stopped = bitconvert("convert", "--model", smollm, "--output", output, *options)
    assert stopped.code == 130
    assert "hint: continue with: bitconvert convert --resume --output" in stopped.err
    outcome = bitconvert("convert", "--resume", "--output", output)
    assert outcome.code == 0, outcome.err
    assert "tiny-TQ2_0.gguf" in outcome.out
    assert "agreement" in outcome.out
    assert f"saved {output}" in outcome.out


def test_resume_needs_only_the_output(bitconvert, smollm: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stopper = (
        "from bitconvert.cli import main as cli\n"
        "from bitconvert.training.trainer import WarmupTrainer as Trainer\n"
        "old = Trainer.set_progress\n"
        "def stop_after_this_step(self, step):\n    old(self, step); self.stop_requested = True\n"
        "Trainer.set_progress = stop_after_this_step\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", stopper, "warmup", "--model", smollm, "--data", story, "--output", output, *SETS]
    subprocess.run(command, capture_output=True, check=False)
    assert partial_directory(output).exists()
    outcome = bitconvert("warmup", "--resume", "--output", output, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["steps"] == 2


def test_recipes_are_listed_and_shown(bitconvert) -> None:
    assert "demo" in bitconvert("recipes").out
    assert json.loads(bitconvert("recipes", "demo", "--json").out)["training"]["context"] == 256


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help(command: tuple[str, ...], bitconvert) -> None:
    outcome = bitconvert(*command, "--help")
    assert outcome.code == 0
    assert "Usage: bitconvert" in outcome.out
    assert all(word in outcome.out for word in (COMMANDS if not command else ["--json"]))


WITHOUT = (
    "import contextlib, io, json, sys\n"
    "sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))  # an import of None fails\n"
    "from bitconvert.cli import main as cli\n"
    "outcomes = []\n"
    "for arguments in json.loads(sys.argv[2]):\n"
    "    sys.argv = ['bitconvert', *arguments]\n"
    "    out, err = io.StringIO(), io.StringIO()\n"
    "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):\n"
    "        cli.main()\n"
    "    outcomes.append(out.getvalue() + err.getvalue())\n"
    "print(json.dumps(outcomes))"
)
"""Run several command lines in a process in which some modules cannot be imported."""


def said_without(modules: list[str], commands: list[list[str]]) -> list[str]:
    words = [sys.executable, "-c", WITHOUT, json.dumps(modules), json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


def test_help_needs_next_to_nothing() -> None:
    (help_,) = said_without(["torch", "transformers", "numpy", "rich", "yaml", "pydantic"], [["--help"]])
    assert help_.startswith("Usage: bitconvert")
    of_commands = said_without(
        ["torch", "transformers", "numpy", "rich", "yaml"], [[name, "--help"] for name in COMMANDS]
    )
    assert all(help_.startswith(f"Usage: bitconvert {name}") for name, help_ in zip(COMMANDS, of_commands, strict=True))


def test_what_is_wrong_with_arguments_is_told_without_torch(story: Path) -> None:
    """Importing torch takes seconds, loading a model minutes."""
    nowhere, text = "/no/such", ["--ppl", "--data", str(story)]
    expected = {
        "bitconvert 0.1": ["--version"],
        "description: ": ["recipes", "demo"],
        "the embedded story teller": ["recipes"],
        "No such command 'frobnicate'": ["frobnicate"],
        "No such option: --frobnicate": ["pack", "x", "--frobnicate"],
        "Missing option '--prompt'": ["generate", "x"],
        "error: --set nope.x: unknown key\n": ["warmup", "--set", "nope.x=1"],
        "--set scaling.estimater: unknown key, did you mean scaling.estimator?": [
            "demo",
            "--set",
            "scaling.estimater=x",
        ],
        "none: no such recipe": ["warmup", "--model", "x", "--recipe", "none"],
        "--model is missing": ["warmup"],
        f"{nowhere}: no such": ["warmup", "--model", nowhere],
        "error: --set nein.x: unknown key": ["plan", "--model", "x", "--set", "nein.x=1"],
        "--private is for --push-to-hub": ["convert", "--model", "owner/x", "--private"],
        f"error: {nowhere}: no such file or directory\nhint: give": ["convert", "--model", nowhere],
        "--gpu abacus: not in the table": ["plan", "--model", "owner/x", "--gpu", "abacus"],
        f"{nowhere}: no such file or directory": ["plan", "--model", nowhere],
        f"error: {nowhere}: no": ["pack", nowhere, "--format", "tq2_0"],
        f"error: {nowhere}: no such": ["unpack", nowhere],
        f"error: {nowhere}: no such file": ["inspect", nowhere],
        f"error: {nowhere}: not a directory": ["verify", nowhere],
        f"error: {nowhere}: no such file or": ["generate", nowhere, "--prompt", "x"],
        f"error: {nowhere}: no such file or directory": ["eval", nowhere, *text],
        f"error: {nowhere}: no such file or directory\nhint: give a dir": [
            "eval",
            "owner/x",
            *text,
            "--against",
            nowhere,
        ],
        "error: no/text.jsonl: no such file": ["warmup", "--model", "owner/x", "--data", "no/text.jsonl"],
        "error: no/held-out.txt: no such file": ["warmup", "--model", "owner/x", "--held-out", "no/held-out.txt"],
        "error: /no/text.txt: no such file": ["eval", "owner/x", "--ppl", "--data", "/no/text.txt"],
        "--ppl needs a text": ["eval", "x", "--ppl"],
        "through torch only": ["eval", "x", "--tasks", "arc", "--runtime", "llama.cpp"],
        "--temperature is nan": ["generate", "x", "--prompt", "y", "--temperature", "nan"],
        "one model cannot be compared": ["compare", "owner/x"],
        f"error: {nowhere}: no such file or directory\n": ["compare", "owner/x", "owner/y", nowhere],
        "error: /no/prompts.txt: no such file": ["compare", "owner/x", "owner/y", "--prompts", "/no/prompts.txt"],
        "--energy and --plot tell of one model": ["inspect", "owner/x", "owner/y", "--energy"],
        "--plot picture.bmp: not a kind": ["inspect", "owner/x", "--plot", "picture.bmp"],
        "--max-shard-size: ": ["pack", "x", "--format", "f16", "--max-shard-size", "-1"],
    }
    said = said_without(["torch", "transformers"], list(expected.values()))
    for words, outcome in zip(expected, said, strict=True):
        assert words in outcome


def test_the_doctor_helps_where_torch_does_not_import() -> None:
    told, document = said_without(["torch"], [["doctor"], ["doctor", "--json"]])
    assert re.search(r"✗ +torch +\S+ does not import", told)
    assert re.search(r"error: bitconvert needs what does not work here: .*torch", told)
    assert re.search(r"hint: pip install --upgrade '\w+>=", told)
    report = json.loads(document[: document.index("\n}\n") + 2])
    assert report["healthy"] is False
    assert {finding["name"]: finding["state"] for finding in report["needed"]}["rich"] == "ok"
    assert report["disk"][0]["state"] == "ok"


@pytest.mark.slow
def test_help_is_fast() -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "bitconvert", "--help"], capture_output=True, check=True)
        times.append(time.monotonic() - started)
    assert min(times) < 0.3


def test_two_models_are_compared_in_words(bitconvert, ternary: Path, smollm: Path, story: Path) -> None:
    arguments = ("compare", smollm, ternary, "--prompt", "The [quick] brown", "--max-tokens", 4)
    outcome = bitconvert(*arguments, "--data", story)
    assert outcome.code == 0, outcome.err
    assert "The [quick] brown" in outcome.out
    assert re.search(r"plain +torch.*100\.00%\n", outcome.out)
    assert re.search(r"latent +torch .* ± .* ± .*%\n", outcome.out)
    document = json.loads(bitconvert(*arguments, "--json").out)
    assert [model["kind"] for model in document["models"]] == ["plain", "latent"]


def test_what_differs_is_told_and_exits_with_0(bitconvert, ternary: Path, smollm: Path) -> None:
    outcome = bitconvert("inspect", smollm, ternary)
    assert outcome.code == 0, outcome.err
    assert "lineage.source: nothing -> " in outcome.out
    assert re.search(r"\d+ tensors hold other values, \d+ the same", outcome.out)
    assert json.loads(bitconvert("inspect", ternary, ternary, "--json").out)["changed_codes"] == 0.0


def test_energy_and_a_picture(bitconvert, ternary: Path, smollm: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "tiny.png"
    outcome = bitconvert("inspect", ternary, "--energy", "--plot", picture, "--against", smollm)
    assert outcome.code == 0, outcome.err
    assert re.search(r"ternary linears +INT8 additions", outcome.out)
    assert "arXiv 2402.17764" in outcome.out
    assert f"against {smollm}" in outcome.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(picture.parent.iterdir()) == [picture]
    refused = bitconvert("inspect", smollm, "--plot", tmp_path / "none.png")
    assert (refused.code, (tmp_path / "none.png").exists()) == (1, False)
    assert "none of its linear layers is ternary" in refused.error()


# ---- it does not ----


def test_ctrl_c_is_told_apart_from_success(bitconvert, smollm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitconvert.evaluation.inspect.inspect", interrupted)
    outcome = bitconvert("inspect", smollm)
    assert (outcome.code, outcome.error()) == (130, "error: interrupted")


@pytest.mark.parametrize("command", ["warmup", "pack"])
def test_a_full_disk_is_named(command: str, ternary: Path, smollm: Path, story: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    words = {
        "warmup": ["warmup", "--model", smollm, "--data", story, "--output", tmp_path / "o", *SETS],
        "pack": ["pack", ternary, "--format", "tq2_0", "--output", tmp_path / "o"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", "bitconvert", *map(str, words)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 1
    assert "the disk is full" in outcome.error()
    assert not list(tmp_path.rglob("*.gguf")) + list(tmp_path.rglob("*.safetensors"))


def test_no_command_shows_the_help(bitconvert) -> None:
    outcome = bitconvert()
    assert (outcome.code, outcome.err) == (2, "")
    assert "warmup" in outcome.out


def test_files_of_a_hub_model_do_not_go_into_the_hubs_cache(
    bitconvert, ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = shutil.copytree(ternary, tmp_path / "hub" / "snapshots" / "0123abc")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert bitconvert("pack", "owner/model-ternary", "--format", "tq2_0").code == 0
    packed = tmp_path / "here" / "model-ternary-packed"
    assert {path.name for path in packed.iterdir()} == {"model-ternary-TQ2_0.gguf", "README.md", "SHA256SUMS"}
    file = gguf.GGUFReader(packed / "model-ternary-TQ2_0.gguf")
    assert file.fields["general.name"].contents() == "model-ternary"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["pack", "x"], "Missing option '--format'"),
        (["pack"], "Missing argument 'checkpoint'"),
        (["warmup"], "--model is missing"),
        (["warmup", "--model", "x", "--recipe", "none"], "none: no such recipe"),
        (
            ["warmup", "--model", "x", "--set", "a.b=1", "--set", "optimizer.lr=no"],
            "--set optimizer.lr: .*--set a.b: unknown key",
        ),
        (["warmup", "--resume"], "--output is missing"),
        (["convert"], "--model is missing"),
        (["convert", "--resume"], "--output is missing"),
        (["convert", "--resume", "--output", "nothing-here"], "no unfinished conversion to resume"),
        (["convert", "--model", "owner/x", "--push-to-hub", "x"], "--push-to-hub x: not of the form owner/model"),
        (["plan", "--model", "x", "--gpu", "9xh100"], "9 GPUs do not fill machines of 8"),
        (["warmup", "--resume", "--output", "nothing-here"], "no unfinished run to resume"),
        (["eval", "x"], "nothing to measure"),
        (["eval", "x", "--ppl"], "--ppl needs a text"),
        (["eval", "x", "--ppl", "--data", "d", "--convention", "mine"], "Invalid value for '--convention'"),
        (["generate", "x"], "Missing option '--prompt'"),
        (["generate", "x", "--prompt", "y", "--temperature", "nan"], "--temperature is nan"),
        (["generate", "x", "--prompt", "y", "--seed", "-1"], "Invalid value for '--seed'"),
        (["eval", "x", "--ppl", "--data", "d", "--max-tokens", "-1"], "Invalid value for '--max-tokens'"),
        (["eval", "x", "--ppl", "--data", "d", "--threads", "0"], "Invalid value for '--threads'"),
        (["eval", "x", "--ppl", "--data", "d", "--context", "0"], "Invalid value for '--context'"),
        (["recipes", "none"], "none: no such recipe"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, bitconvert) -> None:
    outcome = bitconvert(*arguments)
    assert outcome.code == 2

    assert re.search(message, outcome.error())
    assert outcome.out == ""


@pytest.mark.parametrize("command", ["warmup", "pack", "eval", "generate", "inspect"])
def test_a_model_that_is_not_there_exits_with_1(command: str, bitconvert, story: Path, tmp_path: Path) -> None:
    rest = {
        "warmup": ["--output", tmp_path / "out"],
        "pack": ["--format", "tq2_0", "--output", tmp_path / "out"],
        "eval": ["--ppl", "--data", story],
        "generate": ["--prompt", "x"],
        "inspect": [],
    }[command]
    model = ["--model", "/no/such"] if command == "warmup" else ["/no/such"]
    outcome = bitconvert(command, *model, *rest)
    assert outcome.code == 1
    assert "/no/such: no such file or directory" in outcome.error()
    assert [path for path in tmp_path.iterdir() if path.name != "out.partial"] == []


def test_unknown_format_is_refused(bitconvert, ternary: Path, tmp_path: Path) -> None:
    outcome = bitconvert("pack", ternary, "--format", "q4_0", "--output", tmp_path / "o")
    assert (outcome.code, list(tmp_path.iterdir())) == (2, [])
    assert "q4_0" in outcome.error()


def test_a_plain_model_is_packed_only_on_request(bitconvert, smollm: Path, tmp_path: Path) -> None:
    refused = bitconvert("pack", smollm, "--format", "tq2_0", "--output", tmp_path / "o")
    assert refused.code == 1
    assert "never trained to be ternary" in refused.error()
    assert list(tmp_path.iterdir()) == []
    rounded = bitconvert("pack", smollm, "--format", "tq2_0", "--output", tmp_path / "o", "--round")
    assert rounded.code == 0
    assert "rounded without any training" in rounded.err


def test_an_empty_text_is_refused(bitconvert, smollm: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    outcome = bitconvert(
        "warmup", "--model", smollm, "--data", tmp_path / "empty.txt", "--output", tmp_path / "o", *SETS
    )
    assert outcome.code == 1
    assert "empty.txt: holds no text" in outcome.error()
    assert not (tmp_path / "o").exists()


def test_an_output_that_cannot_be_written(bitconvert, smollm: Path, story: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = bitconvert("warmup", "--model", smollm, "--data", story, "--output", tmp_path / "file" / "o", *SETS)
    assert outcome.code == 1
    assert "cannot be written" in outcome.error()


def test_a_split_model_is_named_after_the_whole(bitconvert, ternary: Path, tmp_path: Path) -> None:
    arguments = ("--format", "q2_0", "--max-shard-size", "100kB", "--output", str(tmp_path))
    assert bitconvert("pack", str(ternary), *arguments).code == 0
    first = next(tmp_path.glob("*-Q2_0-00001-of-*.gguf"))
    assert bitconvert("unpack", str(first)).code == 0
    assert (tmp_path / f"{ternary.name}-Q2_0-baked").is_dir()


@pytest.mark.parametrize("size", ["abc", "-1", "0", "2XB"])
def test_a_shard_size_that_is_none_is_told(bitconvert, ternary: Path, tmp_path: Path, size: str) -> None:
    outcome = bitconvert(
        "pack", str(ternary), "--format", "TQ2_0", f"--max-shard-size={size}", "--output", str(tmp_path)
    )
    assert outcome.code == 2
    assert f"(given: {size}" in outcome.err
    assert "2GB or 500MB" in outcome.err


def test_text_from_an_i2_s_file_comes_through_torch(bitconvert, ternary: Path, tmp_path: Path) -> None:
    assert bitconvert("pack", str(ternary), "--format", "I2_S", "--output", str(tmp_path)).code == 0
    outcome = bitconvert(
        "generate", str(next(tmp_path.glob("*.gguf"))), "--prompt", "Once", "--max-tokens", "2", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["runtime"] == "torch"


def test_sigterm_leaves_nothing_half_written(ternary: Path, tmp_path: Path) -> None:
    """The signal comes while tensors are written: a handler of the test sends it from inside."""
    code = (
        "import os, signal, sys\n"
        "from bitconvert.models.safetensors_file import SafetensorsFile\n"
        "SafetensorsFile.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from bitconvert.cli.main import main\n"
        "sys.argv = ['bitconvert', 'pack', '--format', 'safetensors',\n"
        f"            {str(ternary)!r}, '--output', {str(tmp_path)!r}]\n"
        "main()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 143
    assert list(tmp_path.iterdir()) == []
