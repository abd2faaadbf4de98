"""``python -m docs.generator reference|pictures``: write docs/reference, or draw docs/pictures."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.generator.reference import reference

DOCS = Path(__file__).parent.parent


def write_reference(directory: Path = DOCS / "reference") -> None:
    """Write every page, and remove those of what is no more."""
    pages = {directory / name: text for name, text in reference().items()}
    for stale in {path for path in directory.rglob("*") if path.is_file()} - pages.keys():
        stale.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def draw_pictures(directory: Path = DOCS / "pictures") -> None:
    """Draw every picture of the explanation."""
    from docs.generator.pictures import PICTURES

    directory.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(directory / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    {"reference": write_reference, "pictures": draw_pictures}[sys.argv[1]]()
