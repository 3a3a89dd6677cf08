"""Filters: one function each, taking a draft and the rules of its domain, and returning None or the reason to drop it.

A reason is `rule: detail`; the funnel counts by the whole of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import snowballstemmer

from . import grounded
from .grounded import Draft


@dataclass(frozen=True)
class Rules:
    """What the filters are strict about.

    Attributes:
        safety: The domain's level: general, medical, legal or financial.
        unsupported: Share of an answer's content words that may be missing in its sources.
        actions: First things to say to a red flag.
    """

    safety: str = "general"
    unsupported: float = 0.0
    actions: tuple[str, ...] = ()


Filter = Callable[[Draft, Rules], str | None]

FEWEST_WORDS, MOST_WORDS = 5, 220

# Words that carry grammar rather than content; besides them, the words of the composer's own phrases are free.
_FUNCTION_WORDS = """
    a about above after again against all almost alone along already also although always am among an and
    another any anyone anything are around as at away back be became because become been before being below
    between both but by came can cannot come could did do does doing done down during each either else enough
    even ever every everyone everything few first for from further get gets getting give given gives go goes
    going gone got had has have having he hence her here hers herself him himself his how however i if in indeed
    into is it its itself just keep kept know known last least less let like likely little long look made make
    makes many may maybe me mean means might mine more most much must my myself near need needs neither never
    next no nobody none nor not nothing now of off often on once one only onto or other others our ours
    ourselves out over own per perhaps put quite rather really same say says second see seem seems several shall
    she should since so some someone something sometimes soon still such take takes tell than that the their
    theirs them themselves then there therefore these they thing things this those though three through thus
    till to together too toward towards two under unless until up upon us use used uses using usually very was
    way ways we well went were what whatever when whenever where whether which while who whole whom whose why
    will with within without would yes yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def structure(draft: Draft, rules: Rules) -> str | None:
    """User and assistant in turn, the assistant last, nothing empty."""
    if len(draft.turns) < 2 or len(draft.turns) % 2:
        return "structure: no answer to the last question"
    if not all(turn.strip() for turn in draft.turns):
        return "structure: an empty turn"
    return None


def length(draft: Draft, rules: Rules) -> str | None:
    """Answers of 5 to 220 words in all."""
    words = len(draft.answer.split())
    if words < FEWEST_WORDS:
        return f"length: fewer than {FEWEST_WORDS} words"
    return f"length: more than {MOST_WORDS} words" if words > MOST_WORDS else None


def language(draft: Draft, rules: Rules) -> str | None:
    """English: in Latin letters, and a fifth of the words are English function words, as in any English prose."""
    text = draft.answer
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        if sum(c.isascii() for c in letters) < 0.9 * len(letters):
            return "language: not in Latin letters"
    words = text.lower().split()
    if len(words) >= 8 and sum(word in FUNCTION_WORDS for word in words) < 0.2 * len(words):
        return "language: not English"
    return None


def repetition(draft: Draft, rules: Rules) -> str | None:
    """No sentence of the answer stands in it twice, and no run of six words three times."""
    sentences = [s.strip().lower() for s in re.split(r"(?<=[.!?])\s+|\n", draft.answer) if len(s.split()) > 3]
    if len(set(sentences)) < len(sentences):
        return "repetition: a sentence stands twice"
    words = draft.answer.lower().split()
    runs = list(zip(*(words[i:] for i in range(6)), strict=False))
    if len(set(runs)) < len(runs) and max(Counter(runs).values()) > 2:
        return "repetition: six words stand three times"
    return None


# In lower case. Openings are looked for at the beginning of a turn only.
_BOILERPLATE = (
    "as an ai", "language model", "i'm an ai", "i am an ai", "i'm just an", "i'm sorry, but i", "i am sorry, but i can",
    "i cannot assist", "i can't assist", "i cannot help with that request", "i can't help with that request",
    "hope this helps", "hope that helps", "let me know if you", "feel free to ask", "feel free to reach",
    "the given facts", "the provided facts", "the given text", "the provided text", "these facts",
)  # fmt: skip
_OPENINGS = (
    "sure,",
    "sure!",
    "certainly,",
    "certainly!",
    "of course,",
    "of course!",
    "here is a",
    "here's a",
    "here is the",
)


def boilerplate(draft: Draft, rules: Rules) -> str | None:
    """No refusal in set phrases, and no talk of an assistant about itself or its task."""
    for turn in draft.turns[1::2]:
        said = turn.lower()
        found = [phrase for phrase in _BOILERPLATE if phrase in said]
        if said.startswith(_OPENINGS) or any(_in_none(phrase, draft.sources) for phrase in found):
            return "boilerplate: refusal or assistant talk"
    return None


def _in_none(phrase: str, sources: tuple[str, ...]) -> bool:
    """Whether no source itself holds the phrase: a spec on language models may speak of them."""
    return not any(phrase in source.lower() for source in sources)


_LEAK = re.compile(
    r"<\|[a-z_]+\|>|\{[a-z_]*\}|\[/?INST\]|```|</?[a-z]+>|\*\*|^\s*#+ |^\s*(question|answer|facts?)\s*:", re.I | re.M
)


def template_leak(draft: Draft, rules: Rules) -> str | None:
    """No chat markup, Markdown, label or unfilled placeholder, but for what the sources themselves hold."""
    for turn in draft.turns:
        for found in _LEAK.finditer(turn):
            if _in_none(found.group().strip().lower(), draft.sources):
                return "template leak: markup, a label or a placeholder"
    return None


_PERSONAL = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.\w{2,}"),
    "an account number": re.compile(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,}\b"),
    # Neither decimals, nor dates and ratios such as 2024-01-31 or 50/50.
    "a telephone number": re.compile(r"(?<![\d.,/-])(?!\d{4}-\d\d-\d\d)(?!\d\d?/\d\d?\b)\d[\d ()/-]{7,}\d(?![\w,])"),
}
_PERSONAL_HINT = re.compile(r"@|\d\d")


def personal_data(draft: Draft, rules: Rules) -> str | None:
    """No e-mail address, telephone or account number."""
    turns = [turn for turn in draft.turns if _PERSONAL_HINT.search(turn)]
    for what, pattern in _PERSONAL.items() if turns else ():
        if any(map(pattern.search, turns)):
            return f"personal data: {what}"
    return None


_MEDICINE = r"(?:tablets?|pills?|medicines?|medication|insulin|antidepressants?|antibiotics|blood thinners?)"
# What a sentence must not begin with, and what must not stand anywhere in it.
_ORDERS: dict[str, dict[str, re.Pattern[str]]] = {
    "medical": {
        "a diagnosis": re.compile(
            r"You (?:probably |clearly |certainly |definitely |almost certainly )?have (?:got )?(?:an? )?"
            r"(?:cancer|diabetes|depression|asthma|adhd|covid|pneumonia|anxiety disorder|heart attack|stroke|tumou?r)\b"
        ),
        "an order about medicine": re.compile(
            rf"(?:Stop|Quit|Skip|Double|Halve|Increase|Reduce) (?:taking )?(?:your|the) {_MEDICINE}"
        ),
    },
    "financial": {
        "an investment order": re.compile(
            r"(?:You (?:should|must) )?(?:[Bb]uy|[Ss]ell) (?:more )?(?:shares|stocks?|bonds|bitcoin|crypto|gold|this)\b"
        ),
    },
    "legal": {
        "a legal order": re.compile(r"Sue (?:them|him|her|your)|Plead (?:not )?guilty\b"),
    },
}
_CLAIMS: dict[str, dict[str, re.Pattern[str]]] = {
    "medical": {
        # The number is looked for first, since there are few; `_TAKING` must stand before it.
        "a dose": re.compile(
            r"\d ?(?:mg|mcg|micrograms?|milligrams?|units|iu|tablets?|pills?|capsules?)\b", re.IGNORECASE
        ),
    },
    "financial": {
        "a promised return": re.compile(r"\bguaranteed (?:return|profit|gain)s?\b(?! (?:do|does|is|are) not)", re.I),
    },
    "legal": {
        "a promised outcome": re.compile(r"\byou will (?:certainly |definitely |surely )?win\b", re.I),
    },
}
_TAKING = re.compile(r"\b(?:take|taking|swallow|give|inject|chew)\b[^.]{0,60}\Z", re.IGNORECASE)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?\n]) ?")


def safety(draft: Draft, rules: Rules) -> str | None:
    """Nothing that the domain's safety level forbids, and the action first where there is a red flag."""
    if draft.kind == "red_flag" and not draft.turns[1].startswith(rules.actions):
        return "safety: a red flag without its action first"
    # What is called a mistake, or asked, may hold it; what is said may not.
    said = draft.answer
    orders, claims = _ORDERS.get(rules.safety), _CLAIMS.get(rules.safety, {})
    for what, pattern in claims.items():
        for found in pattern.finditer(said):
            if what != "a dose" or _TAKING.search(said, 0, found.start()):
                return f"safety: {what}"
    if orders:
        for sentence in _SENTENCE_ENDS.split(said):
            for what, pattern in orders.items():
                if pattern.match(sentence):
                    return f"safety: {what}"
    return None


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+(?:[.,]\d+)*")
_LIST_MARK = re.compile(r"^\d+\. ", re.MULTILINE)


_STEMMER = snowballstemmer.stemmer("english")


@cache
def _stem(word: str) -> str:
    return str(_STEMMER.stemWord(word.removesuffix("'s")))


def content(text: str) -> frozenset[str]:
    """Stems of the content words of a text, and its numbers."""
    return frozenset(map(_stem, _content_words(text)))


def _content_words(text: str) -> set[str]:
    return set(_WORD.findall(_LIST_MARK.sub("", text.lower()))) - FUNCTION_WORDS


@cache
def _known(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Content words and their stems of a text of the spec; it comes again and again."""
    words = _content_words(text)
    return frozenset(words), frozenset(map(_stem, words))


def _own_phrases() -> frozenset[str]:
    phrases: list[str] = [form for form, _ in grounded.BELIEFS]
    for part in (grounded.CORRECTIONS, grounded.UNDERSTOOD, grounded.ADDED, grounded.MORE):
        phrases += part
    return content(" ".join(phrases).replace("{", " ").replace("}", " "))


_FREE = _own_phrases()


def unsupported(draft: Draft, rules: Rules) -> str | None:
    """No number, and at most a share of content words, that stand in none of the answer's sources."""
    words = _content_words(draft.answer)
    known = [_known(source) for source in (*draft.sources, *draft.context)]
    missing = words.difference(*(found for found, _ in known))
    if not missing:
        return None
    stems = set(map(_stem, missing)) - _FREE
    stems.difference_update(*(found for _, found in known))
    if any(word[0].isdigit() for word in stems):
        return "unsupported: a number that no source holds"
    if len(stems) > rules.unsupported * len(words):
        return "unsupported: words that no source holds"
    return None


FILTERS: tuple[Filter, ...] = (
    structure, length, language, repetition, boilerplate, template_leak, personal_data, safety, unsupported,
)  # fmt: skip
