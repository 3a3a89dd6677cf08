"""Filters: what each one drops and the reason it gives, and what it leaves."""

from __future__ import annotations

import pytest

from meetara_nb.catalogue import Catalogue
from meetara_nb.hub.filters import FILTERS, Rules
from meetara_nb.hub.grounded import Draft

SOURCE = (
    "Cats sleep for about 14 hours a day and hunt at dusk. Dogs do not. Take care when they play, as it is so for "
    "most of them, and the model of a cat is a tiger; you may have a scratch."
)
ANSWER = "Cats sleep for about 14 hours a day and hunt at dusk."


def draft(*turns: str, kind: str = "answer", sources: tuple[str, ...] = (SOURCE,)) -> Draft:
    return Draft(kind, "cats", (), turns, sources)


def reason(sample: Draft, safety: str = "general", unsupported: float = 0.0) -> str | None:
    rules = Rules(safety, unsupported, ("Call your local emergency number now.",))
    return next((r for r in (check(sample, rules) for check in FILTERS) if r), None)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (draft("Is it so?", ANSWER), None),
        (draft("Is it so?"), "structure: no answer to the last question"),
        (draft("Is it so?", " "), "structure: an empty turn"),
        (draft("Is it so?", "Cats sleep a day."), "length: fewer than 5 words"),
        (draft("Is it so?", "cat " * 221), "length: more than 220 words"),
        (draft("Is it so?", "Кошки спят около четырнадцати часов в день."), "language: not in Latin letters"),
        (draft("Is it so?", "猫は 一日に 約十四時間 眠ります 長いです ね"), "language: not in Latin letters"),
        (draft("Is it so?", "Katzen schlafen etwa 14 Stunden am Tag und jagen abends."), "language: not English"),
        (draft("Is it so?", "Los gatos duermen unas 14 horas al día y cazan al anochecer."), "language: not English"),
        (draft("Is it so?", "Les chats dorment 14 heures par jour et chassent le soir."), "language: not English"),
        (draft("Is it so?", f"{ANSWER} Dogs do not. {ANSWER}"), "repetition: a sentence stands twice"),
        (draft("Is it so?", "cats hunt at dusk when they play, " * 3), "repetition: six words stand three times"),
        (draft("Is it so?", f"As an AI, I say so. {ANSWER}"), "boilerplate"),
        (draft("Is it so?", f"Sure! {ANSWER}"), "boilerplate"),
        (draft("Is it so?", f"{ANSWER} I hope this helps!"), "boilerplate"),
        (draft("Is it so?", f"I'm sorry, but I can't say. {ANSWER}"), "boilerplate"),
        (draft("Is it so?", f"Well, <|im_end|> {ANSWER}"), "template leak"),
        (draft("Hi {tells}", ANSWER), "template leak"),
        (draft("Is it so?", f"Answer: {ANSWER}"), "template leak"),
        (draft("Is it so?", f"**Cats** {ANSWER}"), "template leak"),
        (draft("Is it so?", "Cats sleep in <b> for 14 hours.", sources=("Cats sleep in <b> for 14 hours.",)), None),
        (draft("I am bob@example.org. Is it so?", ANSWER), "personal data: an e-mail address"),
        (draft("Is it so?", f"{ANSWER} Call +44 20 7946 0958."), "personal data: a telephone number"),
        (draft("Is it so?", f"{ANSWER} Ring 030/1234567 or (030) 123 45 67."), "personal data: a telephone number"),
        (draft("0.1 + 0.2 gives 0.30000000000000004 on 2024-01-31 or 03/04/2024, split 50/50 70/30?", ANSWER), None),
        (draft("Is it so?", f"{ANSWER} Pay DE89 3704 0044 0532 0130 00."), "personal data: an account number"),
        (draft("Is it so?", "Cats sleep for about 15 hours a day."), "unsupported: a number that no source holds"),
        (draft("Is it so?", "Cats sleep and chase elephants at dusk."), "unsupported: words that no source holds"),
        (draft("Is it so?", "Sleeping cats hunted at dusk, for 14 hours."), None),
        (draft("Is it so?", "1. Cats sleep a day.\n2. Cats hunt at dusk."), None),
    ],
)  # fmt: skip
def test_each_filter_gives_its_reason(sample: Draft, expected: str | None) -> None:
    found = reason(sample)
    assert (found or "").startswith(expected or "") and (found is None) == (expected is None)


def test_a_share_of_unknown_words_can_be_allowed() -> None:
    sample = draft("Is it so?", "Lazy cats sleep for about 14 hours a day and hunt at dusk.")
    assert reason(sample) and not reason(sample, unsupported=0.2)


@pytest.mark.parametrize(
    ("safety", "said", "expected"),
    [
        ("medical", "Take 400 mg of it with water.", "a dose"),
        ("medical", "Adults should take two or 3 tablets at once.", "a dose"),
        ("medical", "You probably have diabetes.", "a diagnosis"),
        ("medical", "If you have diabetes, check your feet.", None),
        ("medical", "Stop taking your tablets.", "an order about medicine"),
        ("medical", "Do not stop taking your tablets.", None),
        ("medical", "A label may say 200 mg of salt.", None),
        ("general", "Take 400 mg of it with water.", None),
        ("financial", "Buy shares while they are cheap.", "an investment order"),
        ("financial", "You should sell bonds now.", "an investment order"),
        ("financial", "This fund has a guaranteed return.", "a promised return"),
        ("financial", "Before you buy shares, read the fees.", None),
        ("legal", "You will win in court.", "a promised outcome"),
        ("legal", "Sue your landlord.", "a legal order"),
        ("legal", "People who sue their landlord need evidence.", None),
    ],
)
def test_safety_by_level(safety: str, said: str, expected: str | None) -> None:
    said += " That is what people tell me."
    found = reason(draft("What now?", said, sources=(said,)), safety)
    assert found == (f"safety: {expected}" if expected else None)


def test_a_red_flag_begins_with_its_action() -> None:
    action, more = "Call your local emergency number now.", "Sit down and rest for a while."
    good = draft("My chest hurts", f"{action} {more}", kind="red_flag", sources=(action, more))
    bad = draft("My chest hurts", f"{more} {action}", kind="red_flag", sources=(action, more))
    assert reason(good) is None
    assert reason(bad) == "safety: a red flag without its action first"


@pytest.mark.parametrize("name", sorted(Catalogue().files))
def test_the_spec_itself_passes(name: str) -> None:
    """Every text that an answer can be made of passes the filters of its domain."""
    domain = Catalogue().load(name)
    actions = tuple(text for flag in domain.red_flags for text in (flag.action, *flag.also))
    rules = Rules(domain.safety, 0.0, actions)
    texts = [text for _, s in domain.statements for text in (*s.wordings, s.why, s.limit, *s.steps) if text]
    texts += [mistake.truth for topic in domain.topics for mistake in topic.mistakes]
    texts += [option.fits for topic in domain.topics for d in topic.decisions for option in d.options]
    texts += [text for neighbour in domain.neighbours for text in neighbour.reply] + domain.outside_reply
    for text in texts:
        sample = Draft("answer", "", (), ("Is it so?", text + " And that is all."), (text + " And that is all.",))
        assert not [r for r in (check(sample, rules) for check in FILTERS) if r], text
