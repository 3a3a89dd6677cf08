"""Questions and answers worded by a model, from the statements that a composed draft is made of.

The model supplies wording, never facts: what it says is filtered against those statements. Kinds that must be said just
so (what to do first in danger, what is handed over, steps, conversations that refer back) stay as they are composed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ..catalogue import Domain
from ..params import DataParams, TeacherParams
from .backends import Backend, Message, Reply
from .dataset import Dropped, Judge
from .filters import content
from .grounded import Composer, Draft

REWORDED = ("answer", "scenario", "pair", "overview", "mistake", "decision")
PILOT = 8
"""Requests of the forecast; their replies are used like all others."""

# What is asked of the model: an example of the task on a subject of no domain, then the notes.
TASK = (
    "Write a question that a person could ask, and the answer to it. The answer says what the notes say, in other "
    "words and in full sentences, and nothing else."
)
EXAMPLE: list[Message] = [
    {
        "role": "user",
        "content": "Notes:\n- Green tea turns bitter in boiling water, so water of about 80 degrees suits it better.\n"
        "- Heat draws bitter substances out of the leaves.\n"
        f"The person asks something like: green tea bitter why\n{TASK}",
    },
    {
        "role": "assistant",
        "content": "Question: My green tea always tastes bitter. What am I doing wrong?\n"
        "Answer: Your water is probably too hot. Boiling water makes green tea bitter, because the heat draws bitter "
        "substances out of the leaves. Water of about 80 degrees suits green tea better.",
    },
]


REWRITE = (
    "You are an assistant for rewriting texts. Rewrite the input text to make it more concise, in other words, while "
    "keeping its meaning."
)


def request(domain: Domain, draft: Draft, words: str) -> list[Message]:
    """What the model is asked: a question and an answer from the notes (both), or the answer in other words."""
    if words == "answers":
        return [{"role": "system", "content": REWRITE}, {"role": "user", "content": draft.turns[1]}]
    notes = "\n".join(f"- {source}" for source in draft.sources)
    content = f"Notes:\n{notes}\nThe person asks something like: {draft.turns[0]}\n{TASK}"
    return [{"role": "system", "content": domain.system_prompt}, *EXAMPLE, {"role": "user", "content": content}]


_PARTS = re.compile(r"\s*(?:Question:\s*)(.+?)\s*\n+\s*Answer:\s*(.+?)\s*(?=\n\s*(?:Question|Notes|Note):|\Z)", re.S)
# An answer that holds less than this share of its sources' content words does not answer from them.
LEAST_COVERED = 0.4


def parsed(draft: Draft, reply: Reply, words: str) -> Draft | Dropped:
    """The draft in the model's words, or why there is none in its reply."""
    question, answer = draft.turns[0], reply.text.strip()
    if words == "both":
        if not (found := _PARTS.match(reply.text)):
            return Dropped(draft, "parse: no question and answer")
        question, answer = found.groups()
    reworded = replace(draft, turns=(question, answer), context=(*draft.context, draft.turns[0]))
    sources = frozenset[str]().union(*map(content, draft.sources))
    if not (sources | content(draft.turns[0])) & content(question):
        return Dropped(reworded, "off the subject: a question that no source touches")
    if len(sources & content(answer)) < LEAST_COVERED * len(sources):
        return Dropped(reworded, "off the subject: an answer that says little of its sources")
    return reworded


@dataclass
class Usage:
    """Requests made in this session and before it, and what they took."""

    requests: int = 0
    resumed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def price(self, params: TeacherParams) -> float:
        return (self.tokens_in * params.price_in + self.tokens_out * params.price_out) / 1e6


class Teacher:
    """Words drafts anew, and keeps every reply in a file, so that a broken run goes on where it was.

    Args:
        domain, data, params: What is worded, and how.
        model: The way to the model.
        replies: The file of replies; made where it is missing.
        say: Takes lines for the reader.
    """

    def __init__(
        self, domain: Domain, data: DataParams, params: TeacherParams, model: Backend, replies: Path,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.domain, self.data, self.params, self.model, self.say = domain, data, params, model, say
        self.usage = Usage()
        self._path = replies
        self._known = dict(_stored(replies))

    def drafts(self) -> Iterator[Draft | Dropped]:
        """The composer's stream, reworded; first a pilot and the forecast that follows from it."""
        stream = Composer(self.domain, self.data.seed, self.data.kinds, self.data.misspelt).drafts()
        pilot = list(islice(stream, 2 * PILOT))
        reworded = list(self._reworded(pilot))
        self.say(self.forecast(pilot, reworded))
        yield from reworded
        while batch := list(islice(stream, max(16, 2 * self.model.together))):
            yield from self._reworded(batch)

    def forecast(self, pilot: Sequence[Draft], reworded: Sequence[Draft | Dropped]) -> str:
        """What the whole will take, from what the pilot took."""
        judge = Judge(self.domain, self.data)
        kept = sum(not isinstance(draft, Dropped) and judge.fault(draft) is None for draft in reworded)
        # One more kept than seen, so that a pilot without luck still gives a figure.
        drafts = self.data.samples * (len(pilot) + 1) / (kept + 1)
        asked = sum(draft.kind in REWORDED for draft in pilot)
        requests = drafts * asked / len(pilot)
        done = self.usage.requests + self.usage.resumed
        if not done:
            return "  no kind of sample asked for is worded by the teacher"
        usage, share = self.usage, requests / done
        text = (
            f"  teacher {self.model.name}: {kept} of the first {len(pilot)} drafts kept; "
            f"about {requests:,.0f} requests, {usage.tokens_in * share:,.0f} tokens read, "
            f"{usage.tokens_out * share:,.0f} written"
        )
        if usage.requests:
            minutes = usage.seconds / usage.requests * max(0, requests - usage.resumed) / 60
            text += f", {minutes:,.0f} minutes"
        if self.params.price_in or self.params.price_out:
            text += f", price about {usage.price(self.params) * share:,.2f}"
        return text

    def _reworded(self, drafts: Sequence[Draft]) -> Iterator[Draft | Dropped]:
        asked = [draft for draft in drafts if draft.kind in REWORDED]
        replies = iter(self._replies(asked))
        for draft in drafts:
            yield parsed(draft, next(replies), self.params.words) if draft.kind in REWORDED else draft

    def _replies(self, drafts: Sequence[Draft]) -> list[Reply]:
        requests = [request(self.domain, draft, self.params.words) for draft in drafts]
        keys = [self._key(messages) for messages in requests]
        todo = [n for n, key in enumerate(keys) if key not in self._known]
        self.usage.resumed += len(drafts) - len(todo)
        for start in range(0, len(todo), self.model.together):
            batch = todo[start : start + self.model.together]
            started = time.monotonic()
            replies = self.model.complete([requests[n] for n in batch], [int(keys[n][:7], 16) for n in batch])
            self.usage.seconds += time.monotonic() - started
            self.usage.requests += len(batch)
            self._store({keys[n]: reply for n, reply in zip(batch, replies, strict=True)})
        found = [self._known[key] for key in keys]
        self.usage.tokens_in += sum(reply.tokens_in for reply in found)
        self.usage.tokens_out += sum(reply.tokens_out for reply in found)
        return found

    def _key(self, messages: list[Message]) -> str:
        sampling = [self.params.temperature, self.params.max_tokens, self.data.seed]
        return hashlib.sha256(json.dumps([self.model.name, sampling, messages]).encode()).hexdigest()

    def _store(self, replies: dict[str, Reply]) -> None:
        self._known |= replies
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for key, reply in replies.items():
                file.write(json.dumps([key, reply.text, reply.tokens_in, reply.tokens_out]) + "\n")


def _stored(path: Path) -> Iterator[tuple[str, Reply]]:
    """The replies of earlier sessions; a half-written last line is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            key, text, tokens_in, tokens_out = json.loads(line)
        except ValueError:
            continue
        yield key, Reply(text, tokens_in, tokens_out)
