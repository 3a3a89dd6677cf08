"""How varied a set of answers is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from ..runlog import table
from .dedup import ngrams, words_of
from .mixture import AcrossDomains, answer_of, read_data

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


def report(files: Mapping[str, Path], *, across: bool = False) -> str:
    """The measures of domains' training data as a table, a column a domain.

    Args:
        files: Domain -> its training-data file.
        across: Also count the answers that nearly repeat another domain's.
    """
    columns, spans = [], []
    contents = {name: read_data(path) for name, path in files.items()}
    for name, content in contents.items():
        measures = measure([answer_of(sample) for sample in content["samples"]])
        columns.append(_shown(content["funnel"], measures))
        span = str(measures["longest_shared_span"])
        spans.append(f"  {name}: {len(span.split())} words in {measures['answers_with_it']:,} answers: {span}")
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    text = (
        table(rows, ["", *contents]) + "\n\nThe longest run of words that 1% of the answers share\n" + "\n".join(spans)
    )
    if across:
        pairs = repeated_across(contents)
        shown = [[f"{a} and {b}", count] for (a, b), count in pairs.most_common(20)]
        found = table(shown, ["domains", "answers"]) if shown else "none"
        text += f"\n\nAnswers that nearly repeat another domain's\n{found}"
    return text


def _shown(funnel: Mapping[str, Any], measures: Mapping[str, Any]) -> dict[str, str]:
    lost = funnel["near_duplicates"], funnel["contaminated"], sum(funnel["dropped"].values())
    uses = funnel["uses_of_a_statement"]
    return {
        "kept of generated": f"{funnel['kept']:,} of {funnel['generated']:,}",
        "near-duplicates, overlap, filtered": ", ".join(f"{count:,}" for count in lost),
        "statements used": f"{funnel['statements_used']} of {funnel['statements']}",
        "uses of a statement, median and most": f"{uses['median']:g}, {uses['max']}",
        "median words of an answer": f"{measures['median_words']}",
        "distinct-2, distinct-3": f"{measures['distinct_2']:.3f}, {measures['distinct_3']:.3f}",
        "mean similarity of word pairs": f"{measures['mean_similarity']:.4f}",
        "vocabulary": f"{measures['vocabulary']:,}",
    }


def repeated_across(contents: Mapping[str, dict[str, Any]], near_duplicate: float = 0.8) -> Counter[tuple[str, str]]:
    """How many answers nearly repeat an answer of another domain, by pair of domains."""
    finder = AcrossDomains(near_duplicate)
    pairs: Counter[tuple[str, str]] = Counter()
    for name, content in contents.items():
        for sample in content["samples"]:
            if other := finder.repeats(name, sample):
                pairs[other, name] += 1
    return pairs
