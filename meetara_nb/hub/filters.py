"""Filters: one function each, taking a draft and returning None to keep it or the reason to drop it."""

from __future__ import annotations

import re
from collections.abc import Callable

from .grounded import Draft

Filter = Callable[[Draft], str | None]

FEWEST_WORDS, MOST_WORDS = 5, 220


def structure(draft: Draft) -> str | None:
    """User and assistant in turn, the assistant last, nothing empty."""
    if len(draft.turns) < 2 or len(draft.turns) % 2:
        return "structure: no answer to the last question"
    if not all(turn.strip() for turn in draft.turns):
        return "structure: an empty turn"
    return None


def length(draft: Draft) -> str | None:
    """Answers of 5 to 220 words in all."""
    words = len(draft.answer.split())
    if words < FEWEST_WORDS:
        return f"length: fewer than {FEWEST_WORDS} words"
    return f"length: more than {MOST_WORDS} words" if words > MOST_WORDS else None


def repetition(draft: Draft) -> str | None:
    """No sentence of the answer stands in it twice."""
    sentences = [s.strip().lower() for s in re.split(r"(?<=[.!?])\s+|\n", draft.answer) if len(s.split()) > 3]
    return "repetition: a sentence stands twice" if len(set(sentences)) < len(sentences) else None


_LEAK = re.compile(r"<\|[a-z_]+\|>|\{[a-z_]*\}|\[/?INST\]|```|</?[a-z]+>")


def template_leak(draft: Draft) -> str | None:
    """No chat markup and no placeholder that was not filled."""
    return "template leak: markup or a placeholder" if any(_LEAK.search(turn) for turn in draft.turns) else None


FILTERS: tuple[Filter, ...] = (structure, length, repetition, template_leak)
