"""Composes chat samples from a domain's checked statements: offline, the same bytes for the same seed.

Nothing is said that does not stand in the spec, but for a few phrases that hold no facts. The stream goes in rounds: a
round uses every statement once as the main one, in random order, and sprinkles the other kinds in by their share. So
any beginning of the stream, which is what a short training run sees, covers the whole domain evenly.

No two drafts of a stream say the same set of the spec's texts: what has been said is not proposed again, so that long
data sets cost no more for each sample than short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from ..catalogue import Domain, Statement, Topic
from ..params import Kind
from .wording import misspelt, surface_forms

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """A sample before it is filtered.

    Attributes:
        kind: One of `KINDS`.
        topic: Topic id; empty where the question is about none.
        statements: Ids of the statements used.
        turns: User and assistant texts in turn, beginning with the user's.
        sources: The texts of the spec that the assistant's words are made of.
        context: Other texts of the spec that the question brings in.
    """

    kind: str
    topic: str
    statements: tuple[str, ...]
    turns: tuple[str, ...]
    sources: tuple[str, ...]
    context: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """All that the assistant says."""
        return "\n".join(self.turns[1::2])

    @property
    def question(self) -> str:
        """All that the user says."""
        return "\n".join(self.turns[0::2])


# Kinds whose main statement is set by the round.
MAIN = ("answer", "steps", "scenario", "follow_up", "conversation", "pair", "overview")
# Kinds that are sprinkled in.
EXTRA = ("mistake", "decision", "red_flag", "handover", "beyond", "outside")
KINDS = (*MAIN, *EXTRA)

# How often what has been said already may be proposed in a row before a kind counts as used up.
TRIES = 40

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
SITUATIONS = [
    "{tells}, and I feel {feeling}. {question}",
    "{tells}. To be honest, I feel {feeling} about it. {question}",
    "I feel {feeling} and do not know whom to ask. {tells}. {question}",
    "{question} I ask because I feel {feeling} about it: {tells_lower}.",
]
UNDERSTOOD = [
    "It is understandable to feel {feeling}.",
    "You say that you feel {feeling}; let me try to help.",
    "Many people in your place feel {feeling} about it.",
    "Thank you for telling me how you feel.",
    "I can see why you ask.",
]
ALSO_ASKED = ["And also: {question}", "One more thing: {question}", "{question}"]
ADDED = ["Also worth knowing:", "On the same subject:", "Another point:"]
MORE = [
    "You can ask me about {a} or {b}, for example.",
    "Questions about {a} or {b} are more my field.",
    "What I can help with is {a} or {b}, among other things.",
    "If you have a question about {a} or {b}, I am glad to help.",
]


class Composer:
    """The stream of drafts of one domain.

    Args:
        domain: The spec; its checks are not looked at.
        seed: The same seed gives the same stream.
        kinds: Kind -> weight. The weights are shares for as long as the spec has something new to say in that kind.
        misspelt: Share of drafts whose questions are typed in a hurry.
    """

    def __init__(self, domain: Domain, seed: int, kinds: Mapping[Kind, float], misspelt: float = 0.0) -> None:
        self.domain = domain
        self.kinds: dict[str, float] = {kind: weight for kind, weight in kinds.items() if weight > 0}
        self.misspelt = misspelt
        self._random = Random(f"{seed}:{domain.domain}")
        self._total = sum(self.kinds.values())
        # A random beginning, or the first samples would all be of one kind.
        self._owed = {kind: self._random.random() for kind in self.kinds}
        self._said: set[frozenset[str]] = set()
        self._makers: dict[str, Callable[..., Draft | None]] = {kind: getattr(self, f"_{kind}") for kind in KINDS}

    def drafts(self) -> Iterator[Draft]:
        """Drafts until the spec has nothing new to say."""
        left = {id(s): [kind for kind in MAIN if kind in self.kinds] for _, s in self.domain.statements}
        extras = [kind for kind in EXTRA if kind in self.kinds]
        while extras or any(left.values()):
            pairs = list(self.domain.statements)
            self._random.shuffle(pairs)
            for topic, statement in pairs:
                draft = self._main(topic, statement, left[id(statement)])
                if draft:
                    yield self._counted(draft)
                for kind in list(extras):
                    # Where no main kind is left, the others are all there is.
                    if self._owed[kind] < 1 and (draft or any(left.values())):
                        continue
                    if extra := self._new(kind):
                        yield self._counted(extra)
                    else:
                        extras.remove(kind)

    def _main(self, topic: Topic, statement: Statement, left: list[str]) -> Draft | None:
        """A new draft on the statement, in the kind that is most behind its share; used-up kinds are struck off."""
        while left:
            kind = max(left, key=lambda kind: (self._owed[kind], self._random.random()))
            if draft := self._new(kind, topic, statement):
                return draft
            left.remove(kind)
        return None

    def _counted(self, draft: Draft) -> Draft:
        """Every kind is owed its share of this draft, and the draft's own has had one."""
        for kind, weight in self.kinds.items():
            self._owed[kind] += weight / self._total
        self._owed[draft.kind] -= 1
        return self._typed(draft)

    def _new(self, kind: str, *about: Topic | Statement) -> Draft | None:
        """A draft that says a new set of texts, or None where the kind does not fit or is used up."""
        for _ in range(TRIES):
            draft = self._makers[kind](*about)
            if draft is None:
                return None
            said = frozenset(draft.sources)
            if said not in self._said:
                self._said.add(said)
                return draft
        return None

    def _typed(self, draft: Draft) -> Draft:
        if not self.misspelt or self._random.random() >= self.misspelt:
            return draft
        turns = [misspelt(turn, self._random) if n % 2 == 0 else turn for n, turn in enumerate(draft.turns)]
        return replace(draft, turns=tuple(turns))

    # Kinds built on a main statement: (topic, statement) -> Draft, or None where the statement does not have it.

    def _answer(self, topic: Topic, statement: Statement) -> Draft:
        text, sources = self._said_of(statement)
        return Draft("answer", topic.id, (statement.id,), (self._ask(topic, statement), text), sources)

    def _scenario(self, topic: Topic, statement: Statement) -> Draft:
        """A person with a feeling asks; the answer takes notice of it."""
        persona = self._pick(self.domain.personas)
        question = self._pick(SITUATIONS).format(
            tells=persona.tells,
            tells_lower=_lower_first(persona.tells),
            feeling=persona.feeling,
            question=_closed(self._pick(statement.ask)),
        )
        text, sources = self._said_of(statement)
        answer = f"{self._pick(UNDERSTOOD).format(feeling=persona.feeling)} {text}"
        context = (persona.tells, persona.feeling)
        return Draft("scenario", topic.id, (statement.id,), (question, answer), sources, context)

    def _steps(self, topic: Topic, statement: Statement) -> Draft | None:
        if not statement.steps:
            return None
        question = f"{_closed(self._pick(statement.ask))} {self._pick(STEP_BY_STEP)}"
        text, sources = self._worded(statement)
        turns = (self._framed(question, topic), f"{text}\n{_numbered(statement.steps)}")
        return Draft("steps", topic.id, (statement.id,), turns, (*sources, *statement.steps))

    def _follow_up(self, topic: Topic, statement: Statement) -> Draft | None:
        """An answer, then one or two questions that depend on it."""
        follow_ups = self._follow_ups(statement)
        if not follow_ups:
            return None
        self._random.shuffle(follow_ups)
        chosen = follow_ups[: self._random.choice((1, 1, 2))]
        text, sources = self._worded(statement)
        turns = [self._ask(topic, statement), text]
        for question, reply, more in chosen:
            turns += [question, reply]
            sources += more
        return Draft("follow_up", topic.id, (statement.id,), tuple(turns), sources)

    def _follow_ups(self, statement: Statement) -> list[tuple[str, str, tuple[str, ...]]]:
        """Question, reply and its sources, for what belongs to the statement."""
        found: list[tuple[str, str, tuple[str, ...]]] = []
        if statement.why:
            found.append((self._pick(WHY), statement.why, (statement.why,)))
        if statement.limit:
            found.append((self._pick(LIMIT), statement.limit, (statement.limit,)))
        if statement.steps:
            found.append((self._pick(HOW), _numbered(statement.steps), tuple(statement.steps)))
        return found

    def _conversation(self, topic: Topic, statement: Statement) -> Draft | None:
        """A conversation that goes on to another statement of the topic, often after a question on the first."""
        if len(topic.statements) < 2:
            return None
        other = self._other(topic, statement)
        text, sources = self._said_of(statement)
        turns = [self._ask(topic, statement), text]
        follow_ups = [f for f in self._follow_ups(statement) if f[2][0] not in sources]
        if follow_ups and self._random.random() < 0.4:
            question, reply, more = self._pick(follow_ups)
            turns += [question, reply]
            sources += more
        text, more = self._said_of(other)
        turns += [self._pick(other.ask), text]
        return Draft("conversation", topic.id, (statement.id, other.id), tuple(turns), sources + more)

    def _pair(self, topic: Topic, statement: Statement) -> Draft | None:
        """Two questions on one topic, answered together."""
        if len(topic.statements) < 2:
            return None
        other = self._other(topic, statement)
        second = self._pick(ALSO_ASKED).format(question=self._pick(other.ask))
        question = f"{_closed(self._pick(statement.ask))} {second}"
        (first, sources), (then, more) = self._said_of(statement), self._worded(other)
        turns = (self._framed(question, topic), f"{first} {then}")
        return Draft("pair", topic.id, (statement.id, other.id), turns, sources + more)

    def _overview(self, topic: Topic, statement: Statement) -> Draft:
        """The topic as a whole, in three of its statements."""
        others = [other for other in topic.statements if other.id != statement.id]
        chosen = [statement, *self._random.sample(others, min(2, len(others)))]
        question = self._pick(self.domain.topic_forms).format(topic=topic.name)
        texts, sources = zip(*(self._worded(one) for one in chosen), strict=True)
        turns = (question, " ".join(texts))
        return Draft("overview", topic.id, tuple(one.id for one in chosen), turns, sum(sources, ()))

    # The other kinds; None where the spec does not have them.

    def _mistake(self) -> Draft | None:
        topics = [topic for topic in self.domain.topics if topic.mistakes]
        if not topics:
            return None
        topic = self._pick(topics)
        mistake = self._pick(topic.mistakes)
        form = self._random.choices([form for form, _ in BELIEFS], [weight for _, weight in BELIEFS])[0]
        question = form.format(claim=mistake.claim, tells=self._pick(self.domain.personas).tells)
        answer = self._pick(CORRECTIONS).format(truth=mistake.truth)
        more, statements, sources = self._more_of(topic)
        turns = (question, f"{answer}{more}")
        return Draft("mistake", topic.id, statements, turns, (mistake.claim, mistake.truth, *sources))

    def _decision(self) -> Draft | None:
        topics = [topic for topic in self.domain.topics if topic.decisions]
        if not topics:
            return None
        topic = self._pick(topics)
        decision = self._pick(topic.decisions)
        fits = [option.fits for option in decision.options]
        self._random.shuffle(fits)
        verdict = self._pick([decision.verdict, *decision.also])
        said = [*fits, verdict]
        if len(fits) == 2 and self._random.random() < 0.3:
            said = [verdict, *fits]
        more, statements, sources = self._more_of(topic)
        turns = (self._framed(self._pick(decision.ask), topic), " ".join(said) + more)
        return Draft("decision", topic.id, statements, turns, (*said, *sources))

    def _more_of(self, topic: Topic) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Half of the time a statement of the topic, to follow on: its text, its id, its sources."""
        if self._random.random() < 0.5:
            return "", (), ()
        statement = self._pick(topic.statements)
        text, sources = self._worded(statement)
        return f" {self._pick(ADDED)} {text}", (statement.id,), sources

    def _red_flag(self) -> Draft | None:
        if not self.domain.red_flags:
            return None
        flag = self._pick(self.domain.red_flags)
        then = self._random.sample(flag.then, self._random.randint(1, min(2, len(flag.then))))
        reason = [flag.why] if self._random.random() < 0.5 else []
        said = [self._pick([flag.action, *flag.also]), *reason, *then]
        return Draft("red_flag", "", (), (self._pick(flag.says), " ".join(said)), tuple(said))

    def _handover(self) -> Draft | None:
        if not self.domain.neighbours:
            return None
        neighbour = self._pick(self.domain.neighbours)
        return self._declined("handover", self._pick(neighbour.asks), self._pick(neighbour.reply))

    def _beyond(self) -> Draft | None:
        if self.domain.beyond is None:
            return None
        beyond = self.domain.beyond
        return self._declined("beyond", self._pick(beyond.asks), self._pick(beyond.replies))

    def _outside(self) -> Draft:
        return self._declined("outside", self._pick(self.domain.outside), self._pick(self.domain.outside_reply))

    def _declined(self, kind: str, question: str, reply: str) -> Draft:
        """A question that is not answered, and what can be asked instead."""
        names = self._random.sample([topic.name for topic in self.domain.topics], 2)
        answer = f"{reply} {self._pick(MORE).format(a=names[0], b=names[1])}"
        return Draft(kind, "", (), (question, answer), (reply, *names))

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

    def _worded(self, statement: Statement) -> tuple[str, tuple[str, ...]]:
        """The statement in one of its surface forms, and the wording it is a form of."""
        wording = self._pick(statement.wordings)
        return self._pick(surface_forms(wording)), (wording,)

    def _said_of(self, statement: Statement) -> tuple[str, tuple[str, ...]]:
        """The statement in one of its surface forms, often with its reason or its limit, and the sources of it all."""
        text, sources = self._worded(statement)
        parts = [text]
        if statement.why and self._random.random() < 0.5:
            parts.append(statement.why)
            sources += (statement.why,)
        if statement.limit and self._random.random() < 0.4:
            parts.append(statement.limit)
            sources += (statement.limit,)
        return " ".join(parts), sources

    def _other(self, topic: Topic, statement: Statement) -> Statement:
        return self._pick([other for other in topic.statements if other.id != statement.id])

    def _pick(self, items: Sequence[T]) -> T:
        return self._random.choice(items)


def _numbered(steps: list[str]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _closed(question: str) -> str:
    """A terse question with a question mark, so that a sentence can follow it."""
    return question if question[-1] in ".?!" else question + "?"


def _lower_first(text: str) -> str:
    """`text` to stand within a sentence; "I" stays as it is."""
    return text if text.startswith(("I ", "I'")) else text[0].lower() + text[1:]
