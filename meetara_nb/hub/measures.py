"""How varied a set of answers is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from random import Random

from .dedup import ngrams, words_of

Words = Sequence[str]


def distinct(answers: Sequence[Words], n: int) -> float:
    """Different runs of `n` words over all of them (distinct-n, Li et al. 2016)."""
    runs = Counter(run for words in answers for run in zip(*(words[i:] for i in range(n)), strict=False))
    return len(runs) / max(1, runs.total())


def mean_similarity(answers: Sequence[Words], sample: int = 500, seed: int = 0) -> float:
    """Mean Jaccard similarity of word pairs between the answers of a random sample."""
    chosen = Random(seed).sample(list(answers), min(sample, len(answers)))
    grams = [ngrams(words, 2) for words in chosen]
    values = [len(a & b) / len(a | b) for a, b in combinations(grams, 2)]
    return sum(values) / max(1, len(values))


def longest_shared(answers: Sequence[Words], share: float = 0.01) -> tuple[str, int]:
    """The longest run of words that stands in at least `share` of the answers, and in how many it stands."""
    needed = max(2, share * len(answers))
    found, count = "", 0
    low, high = 1, 64
    while low <= high:
        n = (low + high) // 2
        runs = Counter(run for words in answers if len(words) >= n for run in ngrams(words, n))
        best = max(runs, key=lambda run: runs[run], default="")
        if best and runs[best] >= needed:
            found, count, low = best, runs[best], n + 1
        else:
            high = n - 1
    return found, count


def measure(texts: Sequence[str]) -> dict[str, float | int | str]:
    """All of the above for the answers `texts`; lengths are in words."""
    answers = [words_of(text) for text in texts]
    lengths = sorted(map(len, answers))
    span, times = longest_shared(answers)
    return {
        "answers": len(answers),
        "median_words": lengths[len(lengths) // 2] if lengths else 0,
        "distinct_2": round(distinct(answers, 2), 4),
        "distinct_3": round(distinct(answers, 3), 4),
        "mean_similarity": round(mean_similarity(answers), 4),
        "vocabulary": len({word for words in answers for word in words}),
        "longest_shared_span": span,
        "answers_with_it": times,
    }
