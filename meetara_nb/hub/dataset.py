"""From drafts to the training-data file: filter, remove near-duplicates, decontaminate, count everything."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..catalogue import Domain
from ..errors import MeetaraError
from ..params import DataParams
from ..runlog import duration
from .dedup import Contamination, NearDuplicates, words_of
from .filters import FILTERS, Rules
from .grounded import Composer, Draft

# The hub gives up when of this many drafts in a row fewer than the share below were new.
WINDOW, LEAST_NEW = 2_000, 0.05
PROGRESS_S = 15
# Dropped drafts of each reason that are kept for reading.
SHOWN = 50

NEAR_DUPLICATE, CONTAMINATED = "near-duplicate", "overlap with a held-out check"


@dataclass(frozen=True)
class Dropped:
    """A draft that is not kept; for a near-duplicate the number of the sample that it repeats."""

    draft: Draft
    reason: str
    similar_to: int | None = None


@dataclass
class Funnel:
    """What became of every draft, by kind: generated = kept + all that was dropped, whatever the reason."""

    requested: int
    statements: int
    generated: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    uses: Counter[str] = field(default_factory=Counter)

    def drop(self, lost: Dropped) -> None:
        self.generated[lost.draft.kind] += 1
        self.dropped[lost.reason][lost.draft.kind] += 1

    def keep(self, draft: Draft) -> None:
        self.generated[draft.kind] += 1
        self.kept[draft.kind] += 1
        self.uses.update(draft.statements)

    def as_dict(self) -> dict[str, Any]:
        filtered = {r: kinds for r, kinds in sorted(self.dropped.items()) if r not in (NEAR_DUPLICATE, CONTAMINATED)}
        uses = sorted(self.uses.values()) or [0]
        return {
            "requested": self.requested,
            "generated": self.generated.total(),
            "dropped": {reason: kinds.total() for reason, kinds in filtered.items()},
            "near_duplicates": self.dropped[NEAR_DUPLICATE].total(),
            "contaminated": self.dropped[CONTAMINATED].total(),
            "kept": self.kept.total(),
            "by_kind": {
                kind: {
                    "generated": count,
                    **{reason: kinds[kind] for reason, kinds in sorted(self.dropped.items()) if kinds[kind]},
                    "kept": self.kept[kind],
                }
                for kind, count in sorted(self.generated.items(), key=lambda item: -item[1])
            },
            "statements": self.statements,
            "statements_used": len(self.uses),
            "uses_of_a_statement": {"median": median(uses), "max": uses[-1]},
        }


@dataclass(frozen=True)
class DataSet:
    drafts: list[Draft]
    funnel: Funnel
    dropped: list[Dropped]


def compose(
    domain: Domain,
    params: DataParams,
    drafts: Iterable[Draft | Dropped] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DataSet:
    """`params.samples` samples of `domain`, the same ones whenever the spec and the params are the same.

    Args:
        domain: The spec.
        params: How many, how strict.
        drafts: What to choose from; composed from the spec when None. A `Dropped` one is counted with its reason.
        say: Takes a line on the progress every 15 seconds.

    Raises:
        MeetaraError: The spec holds too little for that many different samples; says how much is missing.
    """
    if drafts is None:
        drafts = Composer(domain, params.seed, params.kinds, params.misspelt).drafts()
    funnel = Funnel(requested=params.samples, statements=sum(1 for _ in domain.statements))
    judge = Judge(domain, params)
    kept: list[Draft] = []
    dropped: list[Dropped] = []
    window_start = 0
    started = said = time.monotonic()
    for count, draft in enumerate(drafts):
        if count and count % WINDOW == 0:
            if len(kept) - window_start < LEAST_NEW * WINDOW:
                break
            window_start = len(kept)
        lost = draft if isinstance(draft, Dropped) else judge.fault(draft)
        if lost:
            funnel.drop(lost)
            if funnel.dropped[lost.reason].total() <= SHOWN:
                dropped.append(lost)
        elif isinstance(draft, Draft):
            kept.append(draft)
            funnel.keep(draft)
            if len(kept) == params.samples:  # before another draft is asked for, which may cost a teacher's requests
                break
        now = time.monotonic()
        if now - said >= PROGRESS_S and kept:
            said = now
            left = (now - started) / len(kept) * (params.samples - len(kept))
            say(f"  {len(kept):,} of {params.samples:,} samples, {count + 1:,} composed, {duration(left)} left")
    if len(kept) < params.samples:
        raise _too_little(domain, funnel)
    return DataSet(kept, funnel, dropped)


class Judge:
    """Decides draft by draft: filters first, then overlap with the checks, then what was kept before."""

    def __init__(self, domain: Domain, params: DataParams) -> None:
        actions = tuple(text for flag in domain.red_flags for text in (flag.action, *flag.also))
        self.rules = Rules(domain.safety, params.unsupported, actions)
        held_out = [text for check in domain.checks for text in (check.question, check.good, *check.wrong)]
        self._contamination = Contamination(held_out, params.decontamination_words)
        self._near_duplicates = NearDuplicates(params.near_duplicate)

    def fault(self, draft: Draft) -> Dropped | None:
        """Why the draft is not kept; or None, and it counts as kept from now on."""
        for check in FILTERS:
            if reason := check(draft, self.rules):
                return Dropped(draft, reason)
        words = words_of(draft.answer)
        if self._contamination.found_in(words) or self._contamination.found_in(words_of(draft.question)):
            return Dropped(draft, CONTAMINATED)
        similar = self._near_duplicates.add(words)
        return None if similar is None else Dropped(draft, NEAR_DUPLICATE, similar)


def _too_little(domain: Domain, funnel: Funnel) -> MeetaraError:
    kept = funnel.kept.total()
    missing = funnel.requested - kept
    per_statement = max(1.0, kept / max(1, funnel.statements))
    return MeetaraError(
        f"only {kept:,} different samples of {funnel.requested:,} can be made from {funnel.statements} statements",
        where=f"domain {domain.domain}",
        remedy=f"add about {-(-missing // int(per_statement))} statements to its spec, or ask for fewer samples",
    )


def to_json(domain: Domain, params: DataParams, data: DataSet, made_by: dict[str, Any] | None = None) -> str:
    """The training-data file: a head, and one sample a line, as chat messages.

    Args:
        made_by: What besides the spec and the params made it, such as a teacher.
    """
    head: dict[str, Any] = {
        "format": "meetara-training-data/2",
        "domain": domain.domain,
        "title": domain.title,
        "category": domain.category,
        "spec_sha256": domain.digest(),
        "params": params.model_dump(mode="json"),
        **({"teacher": made_by} if made_by else {}),
        "funnel": data.funnel.as_dict(),
    }
    lines = [
        json.dumps({"id": sample_id(domain, n), **as_sample(domain, draft)}, ensure_ascii=False)
        for n, draft in enumerate(data.drafts)
    ]
    text = json.dumps(head, indent=1, ensure_ascii=False)
    return text.removesuffix("\n}") + ',\n "samples": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def dropped_json(domain: Domain, data: DataSet) -> str:
    """Dropped drafts to read, at most 50 of each reason: one JSON object a line."""
    lines = []
    for lost in data.dropped:
        similar = {} if lost.similar_to is None else {"similar_to": sample_id(domain, lost.similar_to)}
        entry = {"reason": lost.reason, **similar, **as_sample(domain, lost.draft)}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def sample_id(domain: Domain, number: int) -> str:
    return f"{domain.domain}-{number:05}"


def as_sample(domain: Domain, draft: Draft) -> dict[str, Any]:
    messages = [{"role": "system", "content": domain.system_prompt}]
    messages += [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(draft.turns)]
    return {
        "kind": draft.kind,
        "topic": draft.topic,
        "statements": list(draft.statements),
        "messages": messages,
    }
