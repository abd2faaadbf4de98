"""report.html: what it tells, that it is HTML, that nobody's text becomes markup, and that it asks no network."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from bitconvert.models.lineage import Lineage
from bitconvert.recipe import Recipe, Scaling
from bitconvert.report.training import WarmupReport
from bitconvert.training.page.charts import Column, Numbers
from bitconvert.training.page.render import Run, render_page
from bitconvert.training.snapshot import Snapshot, Text

HOSTILE = (
    """</p></td><script>alert(1)</script><img src="https://evil.example/x" onerror='a()'>" onload="a()" {{ 7 * 7 }}"""
)

VOID = {"meta", "line", "path", "circle"}  # those of the page; in an SVG they close themselves


class Page(HTMLParser):
    """A page taken apart; nesting that does not close as it opened is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def lines(steps: int) -> list[dict[str, Any]]:
    measured = [
        {"step": 0, "tokens": 0, "original_ppl": 10.0, "held_out_ppl": 40.0},
        {"step": 0, "tokens": 0, "held_out_ppl": 30.0, "init_tokens": 512},
    ]
    return measured + [
        {
            "step": step,
            "tokens": 64 * step,
            "loss": 3 / step,
            "kl": 2 / step,
            "ce": 4.0,
            "lam": min(1.0, step / steps * 2),
            "lr": 1e-3,
            "grad_norm": 1.0,
            "flips": 0.01 / step,
            "sign_flips": 0.0,
            "sparsity": 0.4,
            "tokens_per_second": 32.0,
        }
        for step in range(1, steps + 1)
    ]


def run(text: str = "plain", *, control: bool = False, steps: int = 4) -> Run:
    recipe = Recipe(description=text, control=control).settled(1, is_ternary=False)
    report = WarmupReport(
        output="out",
        steps=steps,
        tokens=64 * steps,
        init_tokens=512,
        scaling="mse per tensor",
        kept=[] if control else [text],
        control=control,
        original_ppl=10.0,
        rounded_ppl=40.0,
        held_out_ppl=12.0,
        seconds=3.0,
    )
    lineage = Lineage(source=text, lam=1.0, scaling=Scaling(), tokens_seen=64 * steps, license=text)
    name = "model.layers.1.mlp.up_proj"
    before, after = (torch.tensor([row], dtype=torch.int8) for row in ([0, 0, 1, -1], [0, 1, 0, 0]))
    texts = (Text(prompt=text, text=f"{text} before"),), (Text(prompt=text, text=f"{text} after"),)
    snapshots = [
        Snapshot(written, {} if control else {name: codes})
        for written, codes in zip(texts, (before, after), strict=True)
    ]
    return Run(text, text, report, recipe, None if control else lineage, lines(steps), *snapshots)


def test_it_tells_what_came_out() -> None:
    page = Page(render_page(run()))
    rows = {cells[0]: cells[1:] for cells in page.cells}
    assert rows["original"] == ["10", "1.000", "", ""]
    assert rows["rounded only"] == ["40", "4.000", "", ""]
    assert rows["fitted (none)"] == ["30", "3.000", "512", ""]
    assert rows["warmed up"] == ["12", "1.200", "256", "0:00:08"]  # 256 tokens at 32 a second
    assert ["1", "50.0% → 75.0%"] in page.cells
    assert ["1", "75.0%"] in page.cells
    assert {"plain before", "plain after"} <= set(page.texts["p"])
    told = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(told) == 8
    assert any("KL to the original: first 2, last 0.5, lowest 0.5, highest 2." in text for text in told if text)


def test_a_control_run_has_nothing_ternary_to_tell_of() -> None:
    html = render_page(run(control=True))
    page = Page(html)
    assert ["control, in full precision", "12", "1.200", "256", "0:00:08"] in page.cells
    assert "Matrices" not in page.texts["h2"]
    assert "ternary" not in page.texts["h3"]


def test_nobodys_text_becomes_markup() -> None:
    plain, hostile = Page(render_page(run())), Page(render_page(run(HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [set(attributes) for _, attributes in hostile.tags] == [set(attributes) for _, attributes in plain.tags]
    assert hostile.texts["script"] == plain.texts["script"]
    for where, text in (("title", f"Warmup of {HOSTILE}"), ("p", f"{HOSTILE} after"), ("dd", HOSTILE)):
        assert text in hostile.texts[where]


def test_it_asks_no_network_for_anything() -> None:
    html = render_page(run())
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "a", "image", "use"), tag
        assert not {name for name in attributes if name in ("src", "href", "xlink:href", "srcset", "style")}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    (style,), (script,) = page.texts["style"], page.texts["script"]
    assert not re.search(r"url\(|@import|image-set|https?:", style)
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|sendBeacon|EventSource|import|https?:|src\b", script)


def test_a_browser_runs_its_own_script_and_style_alone() -> None:
    page = Page(render_page(run()))
    (policy,) = (each["content"] for _, each in page.tags if each.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))
    assert rules["default-src"] == "'none'"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind][0].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_a_long_run_makes_no_large_page() -> None:
    html = render_page(run(steps=10_000))
    assert "mean of 34 lines" in html
    assert len(html) < 150_000


def test_many_lines_become_means_of_equal_parts() -> None:
    numbers = Numbers.of([{"step": step, "loss": step % 2} for step in range(600)], [Column("step", ""), LOSS])
    assert numbers.lines_a_row == 2
    assert list(numbers.rows[:2]) == [[1, 0.5], [3, 0.5]]
    assert numbers.rows[-1][0] == 599


LOSS = Column("loss", "loss")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_curve_goes_where_its_numbers_are(logarithmic: bool) -> None:
    values = [8.0, 2.0, math.nan, 4.0]
    numbers = Numbers.of([{"step": s, "loss": v} for s, v in enumerate(values)], [Column("step", "step"), LOSS])
    chart = numbers.chart("loss", "loss", logarithmic=logarithmic, reference=("level", 4.0))
    assert chart is not None
    assert len(chart.y_ticks) >= 3
    (series,) = chart.series
    x, y = zip(*series.points, strict=True)
    assert (x[0], x[-1]) == (52, 408)
    assert x[1] - x[0] == pytest.approx((x[-1] - x[0]) / 3, abs=0.1)
    assert y[0] < y[2] < y[1], "larger is higher, and a NaN nowhere"
    assert chart.reference is not None
    assert chart.reference.place == y[2]
    share = (y[1] - y[2]) / (y[1] - y[0])
    assert share == pytest.approx(1 / 2 if logarithmic else 1 / 3, abs=0.01)
    scale = math.log if logarithmic else float
    for tick in chart.y_ticks:
        share = (scale(float(tick.label)) - scale(2)) / (scale(8) - scale(2))
        assert tick.place == pytest.approx(y[1] + share * (y[0] - y[1]), abs=0.2)


def test_what_no_line_holds_has_no_chart() -> None:
    numbers = Numbers.of([{"step": 1, "loss": 1.0}], [Column("step", "step"), LOSS, Column("flips", "flips")])
    assert [column.key for column in numbers.columns] == ["step", "loss"]
    assert numbers.chart("flips", "flips") is None
