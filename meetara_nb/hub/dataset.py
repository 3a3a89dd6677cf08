"""From drafts to the training-data file: filter, remove near-duplicates, decontaminate, count everything."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..catalogue import Domain
from ..errors import MeetaraError
from ..params import DataParams
from .dedup import Contamination, NearDuplicates
from .filters import FILTERS
from .grounded import Composer, Draft

# The hub gives up when of this many drafts in a row fewer than the share below were new.
WINDOW, LEAST_NEW = 2_000, 0.05


@dataclass
class Funnel:
    """What became of every draft. `generated` = `kept` + `near_duplicates` + `contaminated` + all `dropped`."""

    requested: int
    generated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    near_duplicates: int = 0
    contaminated: int = 0
    kept: int = 0
    kept_by_kind: Counter[str] = field(default_factory=Counter)
    statements: int = 0
    statements_used: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(self).items()}


@dataclass(frozen=True)
class DataSet:
    drafts: list[Draft]
    funnel: Funnel


def compose(domain: Domain, params: DataParams) -> DataSet:
    """`params.samples` samples of `domain`, the same ones whenever the spec and the params are the same.

    Raises:
        MeetaraError: The spec holds too little for that many different samples; says how much is missing.
    """
    funnel = Funnel(requested=params.samples, statements=sum(1 for _ in domain.statements))
    near_duplicates = NearDuplicates(params.near_duplicate)
    held_out = [text for check in domain.checks for text in (check.question, check.good, *check.wrong)]
    contamination = Contamination(held_out, params.decontamination_words)
    kept: list[Draft] = []
    window_start = 0
    for draft in Composer(domain, params.seed).drafts():
        if len(kept) == params.samples:
            break
        if funnel.generated and funnel.generated % WINDOW == 0:
            if len(kept) - window_start < LEAST_NEW * WINDOW:
                raise _too_little(domain, funnel)
            window_start = len(kept)
        funnel.generated += 1
        if reason := next((r for r in (check(draft) for check in FILTERS) if r), None):
            funnel.dropped[reason] += 1
        elif contamination.found_in(draft.question) or contamination.found_in(draft.answer):
            funnel.contaminated += 1
        elif not near_duplicates.add(draft.answer):
            funnel.near_duplicates += 1
        else:
            kept.append(draft)
            funnel.kept += 1
            funnel.kept_by_kind[draft.kind] += 1
    funnel.statements_used = len({id_ for draft in kept for id_ in draft.statements})
    return DataSet(kept, funnel)


def _too_little(domain: Domain, funnel: Funnel) -> MeetaraError:
    missing = funnel.requested - funnel.kept
    per_statement = max(1.0, funnel.kept / max(1, funnel.statements))
    return MeetaraError(
        f"only {funnel.kept:,} different samples of {funnel.requested:,} can be made from "
        f"{funnel.statements} statements",
        where=f"domain {domain.domain}",
        remedy=f"add about {-(-missing // int(per_statement))} statements to its spec, or ask for fewer samples",
    )


def to_json(domain: Domain, params: DataParams, data: DataSet) -> str:
    """The training-data file: a head, and one sample a line, as chat messages."""
    head: dict[str, Any] = {
        "format": "meetara-training-data/1",
        "domain": domain.domain,
        "category": domain.category,
        "spec_sha256": domain.digest(),
        "params": params.model_dump(mode="json"),
        "funnel": data.funnel.as_dict(),
    }
    lines = [json.dumps(_sample(domain, n, draft), ensure_ascii=False) for n, draft in enumerate(data.drafts)]
    text = json.dumps(head, indent=1, ensure_ascii=False)
    return text.removesuffix("\n}") + ',\n "samples": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def _sample(domain: Domain, number: int, draft: Draft) -> dict[str, Any]:
    messages = [{"role": "system", "content": domain.system_prompt}]
    messages += [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(draft.turns)]
    return {
        "id": f"{domain.domain}-{number:05}",
        "kind": draft.kind,
        "topic": draft.topic,
        "statements": list(draft.statements),
        "messages": messages,
    }
