"""Near-duplicates within a data set, and overlap with the held-out checks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rensa import RMinHash, RMinHashLSH

_WORD = re.compile(r"[a-z0-9]+")
SHINGLE = 5
PERMUTATIONS, BANDS = 128, 32


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(words: list[str], n: int) -> set[str]:
    """Runs of `n` words; the whole text where it is shorter."""
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class NearDuplicates:
    """Finds texts whose word 5-grams have a Jaccard similarity of `threshold` or more with an earlier one.

    MinHash with banding proposes candidates (128 permutations in 32 bands: a pair at 0.8 is missed less than once in
    10 million: (1 - 0.8^4)^32); the exact similarity decides.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._shingles: list[frozenset[int]] = []

    def add(self, text: str) -> bool:
        """Takes `text` in and returns True, or returns False where it is a near-duplicate."""
        grams = ngrams(words_of(text), SHINGLE)
        minhash = RMinHash(num_perm=PERMUTATIONS, seed=1)
        minhash.update(sorted(grams))
        # Python's own hash of text differs between processes, but equality within one is all that is needed.
        shingles = frozenset(map(hash, grams))
        for index in self._lsh.query(minhash):
            other = self._shingles[index]
            if len(shingles & other) >= self.threshold * len(shingles | other):
                return False
        self._lsh.insert(len(self._shingles), minhash)
        self._shingles.append(shingles)
        return True


class Contamination:
    """Runs of `n` words that stand in the held-out texts."""

    def __init__(self, held_out: Iterable[str], n: int) -> None:
        self.n = n
        self._runs: set[str] = set()
        for text in held_out:
            words = words_of(text)
            if len(words) >= n:
                self._runs |= ngrams(words, n)

    def found_in(self, text: str) -> bool:
        words = words_of(text)
        return len(words) >= self.n and not self._runs.isdisjoint(ngrams(words, self.n))
