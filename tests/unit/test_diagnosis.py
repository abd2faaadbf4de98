"""``bitconvert doctor``: what is there, what is missing, what is broken, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from bitconvert import diagnosis as module
from bitconvert.diagnosis import OPTIONAL, doctor, require_healthy
from bitconvert.errors import BitconvertError
from bitconvert.report.doctor import DoctorReport, Finding

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def named(findings: tuple[Finding, ...], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return doctor()


def test_what_is_needed_is_there(report: DoctorReport) -> None:
    assert report.healthy
    require_healthy(report)
    assert named(report.needed, "torch") == Finding("torch", "ok", importlib.metadata.version("torch"))
    assert {finding.state for finding in report.needed} == {"ok"}


def test_the_hardware_is_what_torch_says(report: DoctorReport) -> None:
    assert f"torch uses {torch.get_num_threads()} thread" in named(report.hardware, "CPU").found
    assert named(report.hardware, "GPU").state == ("ok" if torch.accelerator.is_available() else "missing")
    has_compiler = shutil.which("g++") is not None
    assert named(report.hardware, "C++ compiler").state == ("ok" if has_compiler else "missing")


@pytest.mark.parametrize("fast", [True, False])
def test_instructions_are_those_that_training_asks_for(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: fast)
    found = tuple(module._hardware())
    assert ("bf16" if fast else "float32") in named(found, "bf16").found
    assert [named(found, name).state for name in ("bf16", "int8")] == ["ok" if fast else "missing"] * 2


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_without_a_compiler_it_says_what_to_install() -> None:
    compiler = named(tuple(module._hardware()), "C++ compiler")
    assert (compiler.state, compiler.remedy) == ("missing", "apt install g++, or xcode-select --install")


def test_every_extra_can_be_got_by_the_command_shown() -> None:
    commands = {part.package: part.install for part in OPTIONAL}
    for extra, requirements in PYPROJECT["optional-dependencies"].items():
        for requirement in requirements if extra != "dev" else ():
            assert commands[requirement.partition(">=")[0]] == f"'bitconvert[{extra}]'"


def test_a_package_that_is_not_installed() -> None:
    part = module.Part("no-such-package", "nothing", "no-such-package")
    assert module._optional(part) == Finding(
        "no-such-package", "missing", "not installed", "nothing", "pip install no-such-package"
    )


def test_a_needed_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.99: cannot open shared object file")

    monkeypatch.setattr(module.importlib, "import_module", broken)
    found = module._required("gguf>=0.17.1")
    assert found.state == "broken"
    assert "does not import: libcudart.so.99: cannot open" in found.found
    assert found.remedy == "pip install --upgrade 'gguf>=0.17.1'"


def test_what_a_package_prints_does_not_reach_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.importlib, "import_module", lambda name: print(f"Welcome to {name}!"))
    assert module._required("gguf>=0.17.1").state == "ok"
    assert capsys.readouterr() == ("", "Welcome to gguf!\n")


def test_a_needed_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
    found = module._required("gguf>=0.17.1")
    assert (found.state, found.found) == ("broken", "0.1, but gguf>=0.17.1 is needed")


def test_what_is_broken_is_the_error() -> None:
    broken = Finding("torch", "broken", "2.0 does not import", remedy="pip install --upgrade 'torch>=2.11'")
    sick = DoctorReport(False, (Finding("python", "ok", "3.11"), broken), (), (), (), ())
    with pytest.raises(BitconvertError, match="bitconvert needs what does not work here: torch") as raised:
        require_healthy(sick)
    assert (raised.value.hint, raised.value.exit_code) == (broken.remedy, 1)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="the programs are shell scripts")
@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("echo 'version: 4242 (abc)' >&2", "ok", "4242 (abc)"),
        ("echo 'ollama version is 0.9.1'", "ok", "0.9.1"),
        ("exit 3", "ok", "of unknown version"),
        ("exec sleep 60", "broken", "timed out"),
        ("", "broken", "Permission denied"),
    ],
)
def test_programs_on_path(script: str, state: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "llama-cli", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if not script:  # root may run all but what nobody may
        (tmp_path / "llama-cli").chmod(0o644)
        monkeypatch.setattr(shutil, "which", lambda program: str(tmp_path / program))
    monkeypatch.setattr(module, "_VERSION_SECONDS", 0.5)
    told = named(tuple(module._runtimes()), "llama-cli")
    assert told.state == state
    assert found in told.found


def test_a_library_that_the_user_named_wrongly_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB", "/no/such/libllama.so")
    told = named(tuple(module._runtimes()), "llama.cpp library")
    assert told.state == "broken"
    assert "/no/such/libllama.so, which is not a file" in told.found


def test_disk_where_things_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITCONVERT_CACHE", str(tmp_path / "not" / "yet"))
    found = tuple(module._disk())
    free = shutil.disk_usage(tmp_path).free / 1e9
    for name, directory in (("here", tmp_path), ("token cache", tmp_path / "not" / "yet")):
        told = named(found, name)
        assert told.found.endswith(f"GB free in {directory}")
        assert float(told.found.split()[0]) == pytest.approx(free, abs=1)


def test_a_disk_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    here = named(tuple(module._disk()), "here")
    assert (here.state, here.found) == ("broken", f"{tmp_path}: not writable")
