"""The demo: short in the default run, whole in the slow one, where its promise is held against it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitconvert.evaluation.subjects import has_llama_cpp
from tests.commands import document


def demo(output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bitconvert", "demo", "--output", str(output), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return document("demo", done.stdout)


def test_a_short_demo(tmp_path: Path) -> None:
    small = ("training.tokens=24576", "data.held_out_tokens=2048", "init.tokens=2048")
    report = demo(tmp_path / "out", *(word for override in small for word in ("--set", override)))
    rows = {row["name"]: row for row in report["rows"]}
    original, rounded, warmed = (rows[name]["ppl"] for name in ("original", "rounded only", "warmed up, tq2_0"))
    assert original < warmed < rounded
    assert rows["warmed up, safetensors"]["ppl"] == pytest.approx(warmed, rel=1e-3)
    assert rows["warmed up, tq2_0"]["nbytes"] < rows["original"]["nbytes"] / 3
    assert report["text"].strip()
    if has_llama_cpp():
        assert rows["warmed up, tq2_0"]["llama_cpp_ppl"] == pytest.approx(warmed, rel=0.01)
        assert "llama.cpp" in report["spoken_by"]
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"stories", "ternary", "control", "rounded", "packed", "SHA256SUMS"}


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(tmp_path: Path) -> None:
    report = demo(tmp_path / "out")
    ratio = {row["name"]: row["ppl"] / report["rows"][0]["ppl"] for row in report["rows"]}
    assert ratio["warmed up, tq2_0"] <= 1.10
    assert ratio["rounded only"] >= 1.4
