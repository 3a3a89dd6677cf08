"""One training set out of many domains' data, for category and universal models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..errors import MeetaraError
from .dedup import NearDuplicates, words_of


@dataclass(frozen=True)
class Mixture:
    """Samples of several domains, shuffled, each naming its domain in the system prompt.

    Attributes:
        samples: As in the domains' files.
        report: For every domain: `available` samples, its `share`, how many were `taken`, and `near_duplicates`: the
            samples left out because they nearly repeat another domain's, by that domain.
    """

    samples: list[dict[str, Any]]
    report: dict[str, dict[str, Any]]


def shares(counts: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Share of each domain: its count to the power of 1 / temperature, over the sum of those.

    A temperature of 1 keeps the proportions, a high one evens them out (Devlin 2019, multilingual BERT's sampling).
    """
    powers = {name: count ** (1 / temperature) for name, count in counts.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def mix(files: Mapping[str, Path], samples: int, temperature: float, seed: int, near_duplicate: float) -> Mixture:
    """At most `samples` samples of the domains' data files, by `shares`.

    Each domain gives the beginning of its file, which covers it evenly. A domain that has less than its share gives all
    it has; the others do not make up for it, since that would undo the balance.

    Args:
        files: Domain -> its training-data file.
        samples: In all.
        temperature: 1 keeps the proportions of the files, more evens them out; over 0.
        seed: Of the order.
        near_duplicate: Jaccard similarity from which answers of two domains count as one.

    Raises:
        MeetaraError: A file is missing, or no training data.
    """
    data = {name: read_data(path) for name, path in sorted(files.items())}
    counts = {name: len(content["samples"]) for name, content in data.items()}
    by_share = shares(counts, temperature)
    across = AcrossDomains(near_duplicate)
    mixed: list[dict[str, Any]] = []
    report: dict[str, dict[str, Any]] = {}
    for name, content in data.items():
        wanted = round(samples * by_share[name])
        repeats: Counter[str] = Counter()
        taken = 0
        for sample in content["samples"]:
            if taken == wanted:
                break
            if other := across.repeats(name, sample):
                repeats[other] += 1
                continue
            taken += 1
            mixed.append(_named(sample, content["title"]))
        report[name] = {
            "available": counts[name],
            "share": round(by_share[name], 4),
            "taken": taken,
            "near_duplicates": dict(repeats),
        }
    Random(seed).shuffle(mixed)
    return Mixture(mixed, report)


class AcrossDomains:
    """Finds answers that nearly repeat an answer of another domain; a domain's own were compared when it was made."""

    def __init__(self, near_duplicate: float) -> None:
        self._seen = NearDuplicates(near_duplicate)
        self._owners: list[str] = []

    def repeats(self, domain: str, sample: Mapping[str, Any]) -> str:
        """The other domain whose answer the sample nearly repeats; empty where there is none, and it is taken in."""
        other = self._seen.add(words_of(answer_of(sample)))
        if other is None:
            self._owners.append(domain)
            return ""
        return self._owners[other] if self._owners[other] != domain else ""


def answer_of(sample: Mapping[str, Any]) -> str:
    """All that the assistant says in a sample."""
    return "\n".join(message["content"] for message in sample["messages"] if message["role"] == "assistant")


def read_data(path: Path) -> dict[str, Any]:
    """A training-data file: its head, and `samples`.

    Raises:
        MeetaraError: It is missing, or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["samples"] and content["title"]:
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise MeetaraError("no training data", where=path, remedy="run 01_generate_data for this domain")


def _named(sample: dict[str, Any], title: str) -> dict[str, Any]:
    """The sample with its domain named in the system prompt."""
    system, *rest = sample["messages"]
    return {**sample, "messages": [{**system, "content": f"{system['content']} Domain: {title}."}, *rest]}
