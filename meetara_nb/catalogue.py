"""What the lab knows: domains, their topics and statements, and the held-out checks.

A domain is one file, `params/domains/{category}/{domain}.yaml`. Which domains there are is read from the file names;
a file is parsed only when its domain is asked for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from .errors import Fault, MeetaraError, nearest
from .layout import NAME, PARAMS
from .store import digest_of
from .yamlfile import Key, Strict, load_yaml, parse_model

Category = Literal["healthcare", "daily_life", "business", "education", "creative", "technology", "specialized"]
CATEGORIES: tuple[str, ...] = get_args(Category)

Text = Annotated[str, Field(min_length=2, max_length=600)]
# pydantic searches for a pattern anywhere in a text unless it is anchored.
Name = Annotated[str, Field(pattern=rf"^{NAME.pattern.removesuffix(chr(92) + 'Z')}$")]


class Statement(Strict):
    """One checked fact, rule of thumb or practice, in several wordings, with the questions it answers."""

    id: Name
    say: Text
    also: Annotated[list[Text], Field(min_length=2)]
    ask: Annotated[list[Text], Field(min_length=3)]
    why: Text | None = None
    limit: Text | None = None
    steps: list[Text] = []

    @property
    def wordings(self) -> list[str]:
        return [self.say, *self.also]


class Mistake(Strict):
    """A belief people really hold, and what is true instead."""

    claim: Text
    truth: Text


class Option(Strict):
    """One side of a decision, and when it fits."""

    name: Text
    fits: Text


class Decision(Strict):
    """Two or three things that people weigh against each other or mix up, and what decides between them."""

    id: Name
    ask: Annotated[list[Text], Field(min_length=3)]
    options: Annotated[list[Option], Field(min_length=2, max_length=3)]
    verdict: Text
    also: Annotated[list[Text], Field(min_length=1)]


class Topic(Strict):
    id: Name
    name: Text
    statements: Annotated[list[Statement], Field(min_length=1)]
    mistakes: list[Mistake] = []
    decisions: list[Decision] = []


class Persona(Strict):
    """A person who asks: a noun phrase, a first-person clause without a full stop, and an adjective."""

    who: Text
    tells: Text
    feeling: Text


class RedFlag(Strict):
    """A situation that must be escalated: how people bring it up, and what to do first."""

    id: Name
    says: Annotated[list[Text], Field(min_length=5)]
    action: Text
    also: Annotated[list[Text], Field(min_length=1)]
    then: Annotated[list[Text], Field(min_length=1)]
    why: Text


class Neighbour(Strict):
    """Another domain, and the questions that are handed over to it."""

    domain: Name
    hands_over: Text
    asks: Annotated[list[Text], Field(min_length=1)]
    reply: Annotated[list[Text], Field(min_length=1)]


class Beyond(Strict):
    """Questions for a verdict on the person's own case, which general advice must not give, and replies that say so."""

    asks: Annotated[list[Text], Field(min_length=6)]
    replies: Annotated[list[Text], Field(min_length=3)]


class Check(Strict):
    """A held-out question: a good answer, and three that differ from it in one fact. Never used to compose."""

    id: Name
    topic: Name
    question: Text
    good: Text
    wrong: Annotated[list[Text], Field(min_length=3, max_length=3)]


class Domain(Strict):
    """A domain spec, as its file holds it."""

    domain: Name
    category: Category
    title: Text
    covers: Text
    role: Text
    safety: Literal["general", "medical", "legal", "financial"]
    limits: Text
    personas: Annotated[list[Persona], Field(min_length=4)]
    question_forms: Annotated[list[Text], Field(min_length=4)]
    topic_forms: Annotated[list[Text], Field(min_length=2)]
    red_flags: list[RedFlag] = []
    neighbours: list[Neighbour] = []
    beyond: Beyond | None = None
    outside: Annotated[list[Text], Field(min_length=1)]
    outside_reply: Annotated[list[Text], Field(min_length=1)]
    topics: Annotated[list[Topic], Field(min_length=2)]
    checks: Annotated[list[Check], Field(min_length=30)]

    @property
    def system_prompt(self) -> str:
        return f"You are MeeTARA, {self.role}."

    @property
    def statements(self) -> Iterator[tuple[Topic, Statement]]:
        return ((topic, statement) for topic in self.topics for statement in topic.statements)

    def digest(self) -> str:
        """sha256 of the content: a comment or another line break in the file does not change it."""
        return digest_of(self.model_dump(mode="json"))


PLACEHOLDERS = {"question_forms": {"question", "tells", "feeling", "topic"}, "topic_forms": {"topic"}}


def load_domain(path: Path) -> Domain:
    """The domain in one YAML file.

    Raises:
        MeetaraError: Every fault of the file at once: its form, and then its content.
    """
    data, lines = load_yaml(path)
    domain = parse_model(data, Domain, str(path), lines)
    faults = [Fault(what, f"{path}:{lines.get(key, 1)}", remedy) for key, what, remedy in _content_faults(domain, path)]
    if faults:
        raise MeetaraError.of(faults)
    return domain


def _content_faults(domain: Domain, path: Path) -> Iterator[tuple[Key, str, str]]:
    """What a schema cannot say: names that agree, nothing twice, forms that can be filled, checks that are held out."""
    if domain.domain != path.stem:
        yield ("domain",), f"domain {domain.domain!r} in a file named {path.name}", "give both the same name"
    if domain.category != path.parent.name:
        yield ("category",), f"category {domain.category!r} in the folder {path.parent.name}", "move the file"
    for part, allowed in PLACEHOLDERS.items():
        needed = "question" if part == "question_forms" else "topic"
        for index, form in enumerate(getattr(domain, part)):
            names = _placeholders(form)
            if names is None or not set(names) <= allowed or names.count(needed) != 1:
                remedy = f"use {{{needed}}} once, and of others only {sorted(allowed - {needed})}"
                yield (part, index), f"the form {form!r} cannot be filled", remedy
    yield from _repeats(domain)
    topics = {topic.id for topic in domain.topics}
    content = domain.model_dump(include={"topics", "red_flags", "neighbours", "beyond", "outside", "outside_reply"})
    texts = "\n".join(f" {_plain(text)} " for text in texts_of(content))
    for index, check in enumerate(domain.checks):
        if check.topic not in topics:
            yield ("checks", index, "topic"), f"{check.topic!r} is no topic", nearest(check.topic, topics)
        for part in ("question", "good"):
            if f" {_plain(getattr(check, part))} " in texts:
                yield ("checks", index, part), "a held-out check stands in the statements", "word it differently"
        if len({_plain(text) for text in (check.good, *check.wrong)}) < 4:
            yield ("checks", index, "wrong"), "two answers of a check are the same", "change one fact in each"


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a nest of lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part)


def _repeats(domain: Domain) -> Iterator[tuple[Key, str, str]]:
    """Ids and texts that stand twice."""
    seen: Counter[str] = Counter()
    for t, topic in enumerate(domain.topics):
        keyed: list[tuple[Key, str]] = [(("topics", t, "id"), topic.id)]
        for s, statement in enumerate(topic.statements):
            place: Key = ("topics", t, "statements", s)
            keyed.append(((*place, "id"), statement.id))
            keyed += [((*place, "also", n), text) for n, text in enumerate(statement.also)]
            keyed += [((*place, "ask", n), text) for n, text in enumerate(statement.ask)]
            keyed.append(((*place, "say"), statement.say))
        for d, decision in enumerate(topic.decisions):
            place = ("topics", t, "decisions", d)
            keyed.append(((*place, "id"), decision.id))
            keyed += [((*place, "ask", n), text) for n, text in enumerate(decision.ask)]
        for key, text in keyed:
            seen[_plain(text)] += 1
            if seen[_plain(text)] == 2:
                yield key, f"{text!r:.70} stands in the file twice", "word one differently, or remove it"
    for c, check in enumerate(domain.checks):
        seen[check.id] += 1
        if seen[check.id] == 2:
            yield ("checks", c, "id"), f"{check.id!r} stands in the file twice", "rename one"


def _placeholders(form: str) -> list[str] | None:
    from string import Formatter

    try:
        return [name for _, name, spec, conversion in Formatter().parse(form) if name is not None]
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@dataclass(frozen=True)
class Catalogue:
    """The domains under a folder, by name.

    Attributes:
        folder: `{category}/{domain}.yaml` files; `$MEETARA_DOMAINS`, or the project's `params/domains`.
    """

    folder: Path = field(default_factory=lambda: Path(os.environ.get("MEETARA_DOMAINS") or PARAMS / "domains"))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Domain name -> its file.

        Raises:
            MeetaraError: A name that stands in two categories, or a folder that is no category.
        """
        found: dict[str, Path] = {}
        faults = []
        for path in sorted(self.folder.glob("*/*.yaml")):
            if path.parent.name not in CATEGORIES:
                remedy = nearest(path.parent.name, CATEGORIES, most=7)
                faults.append(Fault(f"{path.parent.name!r} is no category", str(path), remedy))
            elif path.stem in found:
                faults.append(Fault(f"the domain {path.stem!r} stands in two categories", str(path), "keep one"))
            found[path.stem] = path
        if faults:
            raise MeetaraError.of(faults)
        return found

    def category(self, name: str) -> str:
        return self._file(name).parent.name

    def load(self, name: str) -> Domain:
        return load_domain(self._file(name))

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise MeetaraError(f"{name!r} is no domain", where="domains", remedy=nearest(name, self.files))
        return self.files[name]

    def select(self, names: Sequence[str]) -> list[Domain]:
        """The domains of these names, each once, in the order given.

        Raises:
            MeetaraError: Every unknown name and every fault of every file at once.
        """
        if not names:
            raise MeetaraError("no domain is given", where="domains", remedy=nearest("", self.files))
        domains: list[Domain] = []
        faults: list[Fault] = []
        for name in dict.fromkeys(names):
            try:
                domains.append(self.load(name))
            except MeetaraError as error:
                faults += error.faults
        if faults:
            raise MeetaraError.of(faults)
        return domains
