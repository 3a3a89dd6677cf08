"""Other forms of a text: answers by rules that keep meaning and grammar, questions as people type them."""

from __future__ import annotations

import re
from functools import cache
from random import Random

_BECAUSE = re.compile(r", because (?!of\b)")
_SO = re.compile(r", so (?!that\b|as\b|much\b|many\b|far\b|long\b|on\b|forth\b)")


@cache
def surface_forms(text: str) -> tuple[str, ...]:
    """A sentence, and the same as two sentences where a semicolon, a reason or a consequence joins its halves."""
    forms = [text]
    if text.count("; ") == 1:
        forms.append(_two_sentences(*text.split("; ")))
    if len(_BECAUSE.findall(text)) == 1:
        forms.append(_two_sentences(*_BECAUSE.split(text)))
    if len(_SO.findall(text)) == 1:
        first, second = _SO.split(text)
        forms.append(f"{first}. So {second}")
    return tuple(forms)


def _two_sentences(first: str, second: str) -> str:
    return f"{first}. {second[0].upper()}{second[1:]}"


def misspelt(question: str, random: Random) -> str:
    """The question as typed in a hurry: one slip in about eight words, often without capitals or the last stop.

    Slips fall inside words of four letters and more, never on the first letter and never on numbers, so that a reader
    still sees what was meant.
    """
    words = question.split(" ")
    places = [i for i, word in enumerate(words) if sum(c.isalpha() for c in word) >= 4 and word.isascii()]
    for i in random.sample(places, min(len(places), 1 + len(words) // 8)):
        words[i] = _slip(words[i], random)
    typed = " ".join(words)
    if random.random() < 0.6:
        typed = typed.lower()
    if random.random() < 0.5:
        typed = typed.rstrip("?.").replace("'", "")
    return typed


def _slip(word: str, random: Random) -> str:
    """One letter left out, doubled, or changed over with the next."""
    places = [i for i in range(1, len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha()]
    if not places:
        return word
    i = random.choice(places)
    kind = random.choice(("out", "double", "over"))
    if kind == "out":
        return word[:i] + word[i + 1 :]
    if kind == "double":
        return word[: i + 1] + word[i:]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
