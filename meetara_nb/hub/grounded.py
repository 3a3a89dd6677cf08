"""Composes chat samples from a domain's checked statements: offline, the same bytes for the same seed.

Nothing is said that does not stand in the spec. The stream goes in rounds: a round uses every statement once as the
main one, in random order, and sprinkles the other kinds in by their share. So any beginning of the stream, which is
what a short training run sees, covers the whole domain evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import TypeVar

from ..catalogue import Domain, Statement, Topic

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """A sample before it is filtered.

    Attributes:
        kind: One of the kinds below.
        topic: Topic id; empty where the question is about none.
        statements: Ids of the statements used.
        turns: User and assistant texts in turn, beginning with the user's.
    """

    kind: str
    topic: str
    statements: tuple[str, ...]
    turns: tuple[str, ...]

    @property
    def answer(self) -> str:
        """All that the assistant says."""
        return "\n".join(self.turns[1::2])

    @property
    def question(self) -> str:
        """All that the user says."""
        return "\n".join(self.turns[0::2])


# Kinds whose main statement is set by the round, with their weight; one that does not fit is replaced by `answer`.
MAIN = {"answer": 46, "steps": 10, "follow_up": 20, "pair": 12, "next_question": 12}
# How many samples of the other kinds come with 100 of those.
EXTRA = {"mistake": 7, "overview": 4, "red_flag": 5, "handover": 3, "outside": 3}

WHY = ["Why is that?", "What is the reason?", "how come?", "Can you explain why?", "And why?"]
LIMIT = ["Is that always so?", "Are there exceptions?", "any caveats?", "Does that hold for everyone?"]
HOW = ["How do I do that?", "What are the steps?", "ok, and how exactly?", "Can you give me that step by step?"]
STEP_BY_STEP = ["Please give me the steps.", "What do I do, step by step?", "A short list of steps would help."]
BELIEFS = [
    ("{claim} Is that right?", 3),
    ('People keep telling me this: "{claim}" Is it true?', 2),
    ("true or false: {claim}", 2),
    ("I have always believed this. {claim} Am I wrong?", 2),
    ("{tells}. A friend says: {claim} What do you think?", 2),
]
CORRECTIONS = ["{truth}", "Not quite. {truth}", "Many people believe that, but it is not so. {truth}"]
MORE = ["You can ask me about {a} or {b}, for example.", "Questions about {a} or {b} are more my field."]


@dataclass
class Composer:
    """The stream of drafts of one domain.

    Args:
        domain: The spec; its checks are not looked at.
        seed: The same seed gives the same stream.
    """

    domain: Domain
    seed: int
    _random: Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = Random(f"{self.seed}:{self.domain.domain}")

    def drafts(self) -> Iterator[Draft]:
        """Drafts without end; later ones repeat earlier ones more and more."""
        extras = [kind for kind in EXTRA if self._has(kind)]
        owed = dict.fromkeys(extras, 0.0)
        for _ in count():
            pairs = list(self.domain.statements)
            self._random.shuffle(pairs)
            for topic, statement in pairs:
                yield self._main(topic, statement)
                for kind in extras:
                    owed[kind] += EXTRA[kind] / 100
                    if owed[kind] >= 1:
                        owed[kind] -= 1
                        yield getattr(self, f"_{kind}")()

    def _has(self, kind: str) -> bool:
        needs = {
            "mistake": any(topic.mistakes for topic in self.domain.topics),
            "red_flag": bool(self.domain.red_flags),
            "handover": bool(self.domain.neighbours),
        }
        return needs.get(kind, True)

    def _main(self, topic: Topic, statement: Statement) -> Draft:
        kind = self._random.choices(list(MAIN), list(MAIN.values()))[0]
        draft = getattr(self, f"_{kind}")(topic, statement)
        return draft or self._answer(topic, statement)

    # Kinds built on a main statement: (topic, statement) -> Draft, or None where the statement does not have it.

    def _answer(self, topic: Topic, statement: Statement) -> Draft:
        turns = (self._ask(topic, statement), self._said(statement))
        return Draft("answer", topic.id, (statement.id,), turns)

    def _steps(self, topic: Topic, statement: Statement) -> Draft | None:
        if not statement.steps:
            return None
        question = f"{_closed(self._pick(statement.ask))} {self._pick(STEP_BY_STEP)}"
        answer = f"{self._pick(statement.wordings)}\n{_numbered(statement.steps)}"
        return Draft("steps", topic.id, (statement.id,), (self._framed(question, topic), answer))

    def _follow_up(self, topic: Topic, statement: Statement) -> Draft | None:
        """An answer, then one or two questions that depend on it."""
        follow_ups = []
        if statement.why:
            follow_ups.append((self._pick(WHY), statement.why))
        if statement.limit:
            follow_ups.append((self._pick(LIMIT), statement.limit))
        if statement.steps:
            follow_ups.append((self._pick(HOW), _numbered(statement.steps)))
        if not follow_ups:
            return None
        self._random.shuffle(follow_ups)
        chosen = follow_ups[: self._random.choice((1, 1, 2))]
        turns = [self._ask(topic, statement), self._pick(statement.wordings), *(t for turn in chosen for t in turn)]
        return Draft("follow_up", topic.id, (statement.id,), tuple(turns))

    def _pair(self, topic: Topic, statement: Statement) -> Draft | None:
        """Two questions on one topic, answered together."""
        if len(topic.statements) < 2:
            return None
        other = self._other(topic, statement)
        question = f"{_closed(self._pick(statement.ask))} And also: {self._pick(other.ask)}"
        answer = f"{self._pick(statement.wordings)} {self._pick(other.wordings)}"
        turns = (self._framed(question, topic), answer)
        return Draft("pair", topic.id, (statement.id, other.id), turns)

    def _next_question(self, topic: Topic, statement: Statement) -> Draft | None:
        """A conversation that goes on to another statement of the topic."""
        if len(topic.statements) < 2:
            return None
        other = self._other(topic, statement)
        turns = (self._ask(topic, statement), self._said(statement), self._pick(other.ask), self._said(other))
        return Draft("next_question", topic.id, (statement.id, other.id), turns)

    # The other kinds.

    def _mistake(self) -> Draft:
        topic = self._pick([topic for topic in self.domain.topics if topic.mistakes])
        mistake = self._pick(topic.mistakes)
        form = self._random.choices([form for form, _ in BELIEFS], [weight for _, weight in BELIEFS])[0]
        question = form.format(claim=mistake.claim, tells=self._pick(self.domain.personas).tells)
        answer = self._pick(CORRECTIONS).format(truth=mistake.truth)
        if self._random.random() < 0.5:  # a truth alone is soon used up; what belongs to it follows
            answer += " " + self._pick(self._pick(topic.statements).wordings)
        return Draft("mistake", topic.id, (), (question, answer))

    def _overview(self) -> Draft:
        topic = self._pick(self.domain.topics)
        chosen = self._random.sample(topic.statements, min(3, len(topic.statements)))
        question = self._pick(self.domain.topic_forms).format(topic=topic.name)
        answer = " ".join(self._pick(statement.wordings) for statement in chosen)
        return Draft("overview", topic.id, tuple(s.id for s in chosen), (question, answer))

    def _red_flag(self) -> Draft:
        flag = self._pick(self.domain.red_flags)
        then = self._random.sample(flag.then, self._random.randint(1, min(2, len(flag.then))))
        reason = [flag.why] if self._random.random() < 0.5 else []
        answer = " ".join([self._pick([flag.action, *flag.also]), *reason, *then])
        return Draft("red_flag", "", (), (self._pick(flag.says), answer))

    def _handover(self) -> Draft:
        neighbour = self._pick(self.domain.neighbours)
        answer = f"{self._pick(neighbour.reply)} {self._offer()}"
        return Draft("handover", "", (), (self._pick(neighbour.asks), answer))

    def _outside(self) -> Draft:
        answer = f"{self._pick(self.domain.outside_reply)} {self._offer()}"
        return Draft("outside", "", (), (self._pick(self.domain.outside), answer))

    # Pieces.

    def _ask(self, topic: Topic, statement: Statement) -> str:
        return self._framed(self._pick(statement.ask), topic)

    def _framed(self, question: str, topic: Topic) -> str:
        """The question bare, half of the time, or in one of the domain's forms."""
        if self._random.random() < 0.5:
            return question
        persona = self._pick(self.domain.personas)
        form = self._pick(self.domain.question_forms)
        return form.format(question=question, tells=persona.tells, feeling=persona.feeling, topic=topic.name)

    def _said(self, statement: Statement) -> str:
        """The statement in one of its wordings, often with its reason or its limit."""
        parts = [self._pick(statement.wordings)]
        if statement.why and self._random.random() < 0.5:
            parts.append(statement.why)
        if statement.limit and self._random.random() < 0.4:
            parts.append(statement.limit)
        return " ".join(parts)

    def _other(self, topic: Topic, statement: Statement) -> Statement:
        return self._pick([other for other in topic.statements if other.id != statement.id])

    def _offer(self) -> str:
        a, b = self._random.sample([topic.name for topic in self.domain.topics], 2)
        return self._pick(MORE).format(a=a, b=b)

    def _pick(self, items: Sequence[T]) -> T:
        return self._random.choice(items)


def _numbered(steps: list[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _closed(question: str) -> str:
    """A terse question with a question mark, so that a sentence can follow it."""
    return question if question[-1] in ".?!" else question + "?"
