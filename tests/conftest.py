"""Fixtures: a small made-up domain, folders of its own, and (for slow tests) the real base, prepared once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from meetara_nb.catalogue import Catalogue, Domain, load_domain
from meetara_nb.layout import Layout
from meetara_nb.params import Base, bases

ANIMALS = ("cats", "dogs", "owls", "frogs", "bees", "bats", "newts", "hares")
HABITS = ("sleep", "hunt", "drink", "hide", "travel", "play", "learn", "rest")


def small_spec() -> dict[str, Any]:
    """A valid spec about the habits of animals, as YAML data; enough for some hundred samples."""

    def statement(animal: str, habit: str) -> dict[str, Any]:
        return {
            "id": f"{animal}_{habit}",
            "say": f"Most {animal} {habit} in the early evening, when the meadow around the old mill grows quiet.",
            "also": [
                f"In a calm meadow it is usually early evening before {animal} begin to {habit} near the mill.",
                f"Look for {animal} at dusk if you would like to watch how they {habit} by the old mill.",
            ],
            "ask": [
                f"When do {animal} usually {habit}?",
                f"{animal} {habit} time of day",
                f"I would love to see {animal} {habit}. When should I go to the meadow?",
            ],
            "why": f"The cooler air of the evening makes it easier for {animal} to {habit} without any hurry.",
            "limit": f"On rainy days {animal} may {habit} at noon as well.",
            "steps": ["Go to the mill at dusk.", f"Wait until the {animal} come out.", "Keep still and watch."],
        }

    return {
        "domain": "animal_habits",
        "category": "education",
        "title": "Animal habits",
        "covers": "When animals of the meadow do what they do.",
        "role": "a patient guide to animals",
        "safety": "general",
        "limits": "I know only one meadow.",
        "personas": [
            {"who": f"a {who}", "tells": f"I am a {who}", "feeling": feeling}
            for who, feeling in (("baker", "tired"), ("nurse", "curious"), ("pilot", "happy"), ("cook", "unsure"))
        ],
        "question_forms": ["{question}", "Hello! {question}", "{tells}. {question}", "About {topic}: {question}"],
        "topic_forms": ["What should I know about {topic}?", "Tell me about {topic}."],
        "red_flags": [
            {
                "id": "bite",
                "says": [f"{who} was bitten by a bat" for who in ("I", "my son", "she", "a friend", "he")],
                "action": "Go to a doctor today, even if the bite is small.",
                "also": ["A bat bite needs a doctor on the same day."],
                "then": ["Wash the wound with soap for a quarter of an hour.", "Do not try to catch the bat."],
                "why": "Bats can carry rabies, which must be treated before it breaks out.",
            }
        ],
        "neighbours": [
            {
                "domain": "photography",
                "hands_over": "taking pictures",
                "asks": ["Which lens for birds?", "how to photograph owls at night"],
                "reply": ["Cameras are a matter for the photography guide, who knows lenses well."],
            }
        ],
        "outside": ["How do I cook rice?", "tax return deadline"],
        "outside_reply": ["I am a guide to the animals of the meadow and cannot help with that."],
        "topics": [
            {
                "id": animal,
                "name": f"the habits of {animal}",
                "statements": [statement(animal, habit) for habit in HABITS],
                "mistakes": [
                    {
                        "claim": f"All {animal} are awake at noon.",
                        "truth": f"At noon most {animal} stay in the shade, and few of them move at all.",
                    }
                ],
            }
            for animal in ANIMALS
        ],
        "checks": [
            {
                "id": f"check_{n}",
                "topic": ANIMALS[n % len(ANIMALS)],
                "question": f"Which hour suits a visitor who wants to observe {ANIMALS[n % 8]} (number {n})?",
                "good": f"Evening number {n} is the best choice.",
                "wrong": [f"Morning number {n} is the best choice.", f"Noon number {n} is.", f"Night number {n} is."],
            }
            for n in range(30)
        ],
    }


def write_spec(folder: Path, spec: dict[str, Any], name: str = "") -> Path:
    """Writes a spec where its names say, under `folder`."""
    name = name or spec["domain"]
    path = folder / spec["category"] / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**spec, "domain": name}, sort_keys=False, width=200), encoding="utf-8")
    return path


@pytest.fixture
def spec() -> dict[str, Any]:
    return small_spec()


@pytest.fixture
def domain(tmp_path: Path, spec: dict[str, Any]) -> Domain:
    return load_domain(write_spec(tmp_path / "specs", spec))


@pytest.fixture
def catalogue(tmp_path: Path, domain: Domain) -> Catalogue:
    return Catalogue(tmp_path / "specs")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "data", tmp_path / "models", tmp_path / "work")


@pytest.fixture(scope="session")
def base() -> Base:
    """The registry's entry of the embedded base."""
    return bases()["smollm2-135m-q4_1"]


@pytest.fixture(scope="session")
def prepared(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base as a transformers folder; half a minute, once a session."""
    from meetara_nb.training.bases import prepare

    return prepare(base, tmp_path_factory.mktemp("base"))


def byte_tokenizer() -> Any:
    """A tokenizer of single bytes with ChatML's marks, as transformers has it."""
    import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tiny.TOKENS)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(tiny.TOKENS[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = tiny.TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer, as a model folder of the user's own."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    byte_tokenizer().save_pretrained(folder)
    tiny.model().save_pretrained(folder)
    return folder


@pytest.fixture
def free_space(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the disk says is free."""

    def set_free(count: int) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=count))

    return set_free
