"""What commands leave behind: ordinary permissions, nothing overwritten unasked, hashes that tell every change."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitconvert.atomic import atomic_directory, atomic_file
from bitconvert.errors import BitconvertError, UsageError
from bitconvert.evaluation.verify import verify
from bitconvert.models.checkpoint import open_checkpoint
from bitconvert.models.lineage import Lineage, Origin
from bitconvert.models.manifest import MANIFEST, files_below, read_manifest, require_free, sha256, write_manifest
from bitconvert.packing.pack import pack
from bitconvert.packing.unpack import unpack
from bitconvert.recipe import Packing, Scaling, load_recipe
from bitconvert.report.packing import PackReport
from bitconvert.report.reporter import Silent
from bitconvert.training.trainer import WarmupTrainer
from bitconvert.training.warmup import partial_directory, warmup
from tests.models import write_model
from tests.packed import make_checkpoint
from tests.recipes import FROM_THE_ORIGINAL

SHORT = (
    *FROM_THE_ORIGINAL,
    "training.tokens=256",
    "training.context=32",
    "training.batch_size=4",
    "data.held_out_tokens=64",
)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "layers": 1}


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", **SMALL)


@pytest.fixture
def packed(latent: Path, tmp_path: Path) -> Path:
    run_pack(latent, tmp_path / "packed", "tq2_0", "safetensors")
    return tmp_path / "packed"


def run_pack(model: Path, output: Path, *formats: str, **options: bool) -> PackReport:
    return pack(open_checkpoint(str(model)), Packing(formats=formats), output, reporter=Silent(), **options)


def content(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): sha256(path) for path in directory.rglob("*") if path.is_file()}


# ---- permissions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_of_every_writer_has_ordinary_permissions(
    umask: int, mode: int, latent: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        formats = ("tq2_0", "safetensors", "compressed-tensors")
        report = run_pack(latent, tmp_path / "packed", *formats)
        unpack(open_checkpoint(report.files[0].path), tmp_path / "baked", reporter=Silent())
        with atomic_directory(tmp_path / "theirs") as directory:
            save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
        with atomic_file(tmp_path / "one.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
    directories = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()}
    assert directories == {0o777 & ~umask}


# ---- what is there already -------------------------------------------------------------------------------------------


def test_an_output_is_neither_merged_into_nor_replaced_unasked(latent: Path, packed: Path) -> None:
    before = content(packed)
    for again in ("tq2_0", "q2_0"):
        with pytest.raises(UsageError, match="packed: exists already") as refused:
            run_pack(latent, packed, again)
        assert "--overwrite" in refused.value.hint
    assert content(packed) == before


def test_overwriting_replaces_all_of_it(latent: Path, packed: Path) -> None:
    run_pack(latent, packed, "q2_0", overwrite=True)
    assert set(content(packed)) == {"tiny-Q2_0.gguf", "README.md", "Modelfile", MANIFEST}
    assert list(packed.parent.iterdir()) == [packed]


def test_an_overwriting_run_that_fails_leaves_the_old_output(latent: Path, packed: Path) -> None:
    class Impatient(Silent):
        def advance(self, done: int, total: int) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

    before = content(packed)
    with pytest.raises(KeyboardInterrupt):
        options = Packing(formats=("q2_0",))
        pack(open_checkpoint(str(latent)), options, packed, overwrite=True, reporter=Impatient())
    assert content(packed) == before
    assert list(packed.parent.iterdir()) == [packed]


def taken_by_notes(output: Path) -> None:
    (output / "tiny-bitnet" / "notes.txt").write_text("years of work")


def taken_by_something_else(output: Path) -> None:
    (output / MANIFEST).unlink()


def taken_by_a_file(output: Path) -> None:
    shutil.rmtree(output)
    output.write_text("years of work")


def taken_by_a_link(output: Path) -> None:
    output.rename(output.with_name("elsewhere"))
    output.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("take", "reason"),
    [
        (taken_by_notes, "holds tiny-bitnet/notes.txt, which bitconvert did not write"),
        (taken_by_something_else, "was not written by bitconvert, so --overwrite does not replace it"),
        (taken_by_a_file, "was not written by bitconvert, so --overwrite does not replace it"),
        (taken_by_a_link, "was not written by bitconvert, so --overwrite does not replace it"),
    ],
)
def test_what_bitconvert_did_not_write_is_never_replaced(
    take: Callable[[Path], None], reason: str, latent: Path, packed: Path
) -> None:
    take(packed)
    before = content(packed.parent)
    with pytest.raises(UsageError, match=re.escape(reason)):
        run_pack(latent, packed, "q2_0", overwrite=True)
    assert content(packed.parent) == before


def test_an_output_that_holds_its_own_source_is_not_replaced(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="holds the model that is to be read"):
        unpack(open_checkpoint(str(packed / "tiny-TQ2_0.gguf")), packed, overwrite=True, reporter=Silent())
    monkeypatch.chdir(packed / "tiny-bitnet")
    with pytest.raises(UsageError, match="holds the directory that you are in"):
        require_free(packed, overwrite=True)


def test_an_empty_directory_is_free(latent: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_pack(latent, tmp_path / "out", "tq2_0")
    assert (tmp_path / "out" / "tiny-TQ2_0.gguf").exists()


def test_what_appears_while_a_run_is_at_work_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(BitconvertError, match="cannot be written"), atomic_directory(tmp_path / "out") as directory:
        (directory / "ours").write_text("")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_warmup_and_unpack_overwrite_only_when_told(tmp_path: Path, story: Path) -> None:
    model = write_model(tmp_path / "plain", "smollm2", **SMALL)
    recipe = load_recipe(None, [*SHORT, f"data.sources=[{story}]"])
    for overwrite in (False, True):
        warmup(str(model), tmp_path / "out", recipe, overwrite=overwrite, reporter=Silent())
    lineage = open_checkpoint(str(tmp_path / "out")).lineage
    assert lineage is not None
    assert lineage.data_files == {str(story): sha256(story)}
    assert lineage.origin.files["model.safetensors"] == sha256(model / "model.safetensors")
    assert {"config.json", "tokenizer.json"} <= lineage.origin.files.keys()
    assert verify(tmp_path / "out", Silent()).problems == {}
    with pytest.raises(UsageError, match="out: exists already"):
        warmup(str(model), tmp_path / "out", recipe, reporter=Silent())
    assert not partial_directory(tmp_path / "out").exists()
    made = run_pack(tmp_path / "out", tmp_path / "packed", "tq2_0")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert f"| `model.safetensors` | `{lineage.origin.files['model.safetensors']}` |" in card
    assert f"| `model.safetensors` | `{made.inputs['model.safetensors']}` |" in card
    opened = open_checkpoint(made.files[0].path)
    assert opened.lineage is not None
    assert opened.lineage.origin == lineage.origin
    unpack(opened, tmp_path / "baked", reporter=Silent())
    with pytest.raises(UsageError, match="baked: exists already"):
        unpack(opened, tmp_path / "baked", reporter=Silent())
    unpack(opened, tmp_path / "baked", overwrite=True, reporter=Silent())
    recorded = open_checkpoint(str(tmp_path / "baked")).baked
    assert recorded is not None
    assert recorded.origin.files == {"out-TQ2_0.gguf": sha256(Path(made.files[0].path))}


# ---- the original ----------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_same_original_only(
    tmp_path: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "plain", "smollm2", **SMALL)
    recipe = load_recipe(None, [*SHORT, f"data.sources=[{story}]"])

    set_progress = WarmupTrainer.set_progress

    def stop_after_this_step(self: WarmupTrainer, step: int) -> None:
        set_progress(self, step)
        self.stop_requested = True

    monkeypatch.setattr(WarmupTrainer, "set_progress", stop_after_this_step)
    with pytest.raises(BitconvertError, match="interrupted at step"):
        warmup(str(model), tmp_path / "out", recipe, reporter=Silent())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(BitconvertError, match=r"config\.json is not the one that this run was begun with"):
        warmup(str(model), tmp_path / "out", recipe, resume=True, reporter=Silent())
    assert partial_directory(tmp_path / "out").exists()


def test_the_revision_of_a_hub_model_is_recorded(latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    cache = tmp_path / "models--owner--tiny"
    snapshot = as_in_the_hubs_cache(latent, cache, commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    checkpoint = open_checkpoint("owner/tiny@main")
    origin = checkpoint.origin()
    assert origin.revision == commit
    assert origin.files["model.safetensors"] == sha256(latent / "model.safetensors")
    Lineage(source=checkpoint.unpinned_name, origin=origin, lam=1.0, scaling=Scaling(), tokens_seen=1).save(
        shutil.copytree(latent, tmp_path / "warm", dirs_exist_ok=True)
    )
    run_pack(tmp_path / "warm", tmp_path / "packed", "tq2_0")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "base_model: owner/tiny\n" in card
    assert f"owner/tiny, the original at {commit} | `model.safetensors`" in card


def as_in_the_hubs_cache(model: Path, cache: Path, commit: str) -> Path:
    """A snapshot whose files are links to blobs two levels up, as huggingface_hub leaves it."""
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, cache / "blobs" / sha256(file))
        (snapshot / file.name).symlink_to(f"../../blobs/{sha256(file)}")
    return snapshot


def test_only_the_hubs_own_links_lead_out_of_a_model(latent: Path, tmp_path: Path) -> None:
    snapshot = as_in_the_hubs_cache(latent, tmp_path / "cache", "0" * 40)
    assert open_checkpoint(str(snapshot)).kind == "latent"
    (tmp_path / "cache" / "secret").write_text("{}")
    (snapshot / "LICENSE").symlink_to("../../secret")
    with pytest.raises(BitconvertError, match="LICENSE: leads out of the model's directory"):
        open_checkpoint(str(snapshot))
    (snapshot / "LICENSE").unlink()
    (tmp_path / "cache" / "blobs" / "evil").symlink_to("../secret")
    (snapshot / "NOTICE").symlink_to("../../blobs/evil")
    with pytest.raises(BitconvertError, match="NOTICE: leads out of the model's directory"):
        open_checkpoint(str(snapshot))


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_a_manifest_covers_every_file_and_sha256sum_agrees(packed: Path) -> None:
    assert set(read_manifest(packed)) == set(files_below(packed))
    assert "tiny-bitnet/config.json" in read_manifest(packed)
    for directory in (packed, packed / "tiny-bitnet"):
        assert verify(directory, Silent()).problems == {}
        if shutil.which("sha256sum"):
            subprocess.run(["sha256sum", "--strict", "--quiet", "-c", MANIFEST], cwd=directory, check=True)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="GNU coreutils are not installed")
def test_strange_names_are_written_as_sha256sum_writes_them(tmp_path: Path) -> None:
    names = ["plain", " two  spaces", "back\\slash", "line\nbreak", "\r", "\\n", "é", "next\x85line", "*star"]
    for name in names:
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    assert set(read_manifest(tmp_path)) == set(names)
    theirs = subprocess.run(["sha256sum", "--", *sorted(names)], cwd=tmp_path, capture_output=True, check=True).stdout
    assert (tmp_path / MANIFEST).read_bytes() == theirs


def damage_a_byte(directory: Path) -> None:
    file = directory / "tiny-TQ2_0.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problems"),
    [
        (damage_a_byte, {"changed": ["tiny-TQ2_0.gguf"]}),
        (lambda d: (d / "tiny-bitnet" / "config.json").unlink(), {"missing": ["tiny-bitnet/config.json"]}),
        (lambda d: (d / "new").write_text(""), {"not written by bitconvert": ["new"]}),
        (lambda d: ((d / "README.md").unlink(), (d / "README.md").symlink_to("/none")), {"changed": ["README.md"]}),
        (lambda d: ((d / "README.md").unlink(), os.mkfifo(d / "README.md")), {"changed": ["README.md"]}),
    ],
)
def test_every_change_is_found(damage: Callable[[Path], object], problems: dict[str, list[str]], packed: Path) -> None:
    damage(packed)
    report = verify(packed, Silent())
    assert report.problems == problems
    assert report.intact == len(read_manifest(packed)) - sum(map(len, (report.changed, report.missing)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("garbage", "not a hash"),
        (f"{'0' * 64}  ../outside", "not a hash"),
        (f"{'0' * 64}  /etc/passwd", "not a hash"),
        (f"{'0' * 63}  short", "not a hash"),
        (f"{'g' * 64}  letters", "not a hash"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_line(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(f"{'0' * 64}  good\n{line}\n")
    with pytest.raises(BitconvertError, match=f"{MANIFEST}, line 2: {reason}"):
        verify(tmp_path, Silent())


def test_a_directory_without_hashes_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(BitconvertError, match=f"{MANIFEST}: missing"):
        verify(tmp_path, Silent())
    with pytest.raises(BitconvertError, match="nothing: not a directory"):
        verify(tmp_path / "nothing", Silent())


def test_an_origin_without_hub_has_no_revision(latent: Path) -> None:
    assert open_checkpoint(str(latent)).origin().revision == Origin().revision == ""
