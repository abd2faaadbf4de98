"""``bitconvert doctor``: look at this machine."""

from __future__ import annotations

from bitconvert.cli.arguments import Json, print_json


def doctor(as_json: Json = False) -> None:
    """Show what is found here, and how to get what is not.

    Exits with 1 if something that is needed is broken.
    """
    from bitconvert.diagnosis import doctor as run
    from bitconvert.diagnosis import require_healthy
    from bitconvert.ui.doctor import show_doctor
    from bitconvert.ui.progress import progress

    with progress() as reporter:
        report = run(reporter)
    print_json(report) if as_json else show_doctor(report)
    require_healthy(report)
