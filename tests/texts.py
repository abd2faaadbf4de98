"""A text long enough to train a step on: the demo's own stories."""

from __future__ import annotations

from bitconvert.demo.stories import text

STORY = text(99, 20_000)
