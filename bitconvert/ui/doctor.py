"""What this machine has."""

from __future__ import annotations

from rich.text import Text

from bitconvert.report.doctor import DoctorReport, Finding
from bitconvert.ui.console import new_table, show_text, stdout

_MARKS = {"ok": ("✓", "green"), "missing": ("–", "yellow"), "broken": ("✗", "bold red")}


def show_doctor(report: DoctorReport) -> None:
    """A table for each group; under what is not there, how to get it."""
    groups = {
        "needed": report.needed,
        "hardware": report.hardware,
        "optional": report.optional,
        "runtimes": report.runtimes,
        "disk": report.disk,
    }
    for title, findings in groups.items():
        _show_group(title, findings)
    show_text("all that is needed works" if report.healthy else "something that is needed is broken")


def _show_group(title: str, findings: tuple[Finding, ...]) -> None:
    use = ["for"] if any(finding.use for finding in findings) else []
    table = new_table("", title, "found", *use, left=4)
    for finding in findings:
        mark, style = _MARKS[finding.state]
        remedy = Text(f"\n{finding.remedy}", "cyan") if finding.remedy else Text()
        table.add_row(Text(mark, style), finding.name, Text(finding.found) + remedy, *(Text(finding.use) for _ in use))
    stdout.print(table)
    stdout.print()
