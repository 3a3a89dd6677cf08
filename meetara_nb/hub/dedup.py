"""Near-duplicates within a data set, and overlap with the held-out checks."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

from rensa import RMinHash, RMinHashLSH

_WORD = re.compile(r"[a-z0-9]+")
SHINGLE = 5
PERMUTATIONS, BANDS = 128, 32


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], n: int) -> set[str]:
    """Runs of `n` words; the whole text where it is shorter."""
    if len(words) <= n:
        return {" ".join(words)}
    return set(map(" ".join, zip(*(words[i:] for i in range(n)), strict=False)))


class NearDuplicates:
    """Finds texts whose word 5-grams have a Jaccard similarity of `threshold` or more with an earlier one.

    MinHash with banding proposes candidates (128 permutations in 32 bands: a pair at 0.8 is missed less than once in
    10 million: (1 - 0.8^4)^32); the exact similarity decides.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._shingles: list[array[int]] = []

    def add(self, words: Sequence[str]) -> int | None:
        """The number of an earlier text that this one nearly repeats; or None, and the text is taken in."""
        grams = list(ngrams(words, SHINGLE))
        minhash = RMinHash(num_perm=PERMUTATIONS, seed=1)
        minhash.update(grams)
        # Python's own hash of text differs between processes, but equality within one is all that is needed.
        shingles = set(map(hash, grams))
        for index in sorted(self._lsh.query(minhash)):
            other = self._shingles[index]
            shared = sum(shingle in shingles for shingle in other)
            if shared >= self.threshold * (len(shingles) + len(other) - shared):
                return int(index)
        self._lsh.insert(len(self._shingles), minhash)
        self._shingles.append(array("q", shingles))
        return None


class Contamination:
    """Runs of `n` words that stand in the held-out texts."""

    def __init__(self, held_out: Iterable[str], n: int) -> None:
        self.n = n
        self._runs = {run for text in held_out for run in self._runs_of(words_of(text))}

    def _runs_of(self, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return zip(*(words[i:] for i in range(self.n)), strict=False)

    def found_in(self, words: Sequence[str]) -> bool:
        return not self._runs.isdisjoint(self._runs_of(words))
