"""The output types in Markdown, from the table of formats."""

from __future__ import annotations

from bitconvert.packing.formats import FORMATS, Format, GgufFormat
from bitconvert.recipe import Scaling
from bitconvert.ternary.quantize import GRANULARITIES
from docs.generator.markdown import page, table


def formats_page() -> str:
    """What ``--format`` accepts, what each can hold, and what runs it."""
    return page(
        "Formats",
        "What `bitconvert pack --format NAME` writes; `all` stands for every one that can hold the model. Bits per "
        "weight are those of a ternary matrix with its scales. A matrix whose rows are no multiple goes to a larger "
        "type that keeps every code, and is named, or is refused where the runtimes read no other type. *Scales* are "
        "the granularities (`scaling.granularity`) that it can hold, of those named here.",
        table(
            ("`--format`", "kind", "bits per weight", "rows are a multiple of", "scales", "runs in"),
            (_row(name, row) for name, row in FORMATS.items()),
        ),
        "\n".join(
            f"- `{row.name}`: {row.note}." for row in FORMATS.values() if isinstance(row, GgufFormat) and row.note
        ),
        "Which families were loaded in which runtimes, and how near their numbers are: "
        "[compatibility](../compatibility.md).",
    )


def _row(name: str, row: Format) -> tuple[str, ...]:
    held = (each for each in GRANULARITIES if row.refusal(Scaling(granularity=each)) is None)
    return f"`{name}`", row.container, f"{row.bits_per_weight:g}", str(row.row_multiple), ", ".join(held), row.runs_in
