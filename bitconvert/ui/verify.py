"""What became of an output."""

from __future__ import annotations

from bitconvert.report.verification import VerifyReport
from bitconvert.ui.console import in_bytes, in_seconds, new_table, show_text, stdout


def show_verify(report: VerifyReport) -> None:
    """Every file with which something is wrong, then how many are as they were."""
    if report.problems:
        table = new_table("file", "is", left=2)
        for what, names in report.problems.items():
            for name in names:
                table.add_row(name, what)
        stdout.print(table)
    show_text(
        f"{report.intact} files are as they were written ({in_bytes(report.nbytes)} in {in_seconds(report.seconds)})"
    )
