"""The Intelligence Hub: the count, the funnel, the same bytes again, and nothing that is not in the spec."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from meetara_nb.catalogue import Catalogue, Domain, load_domain
from meetara_nb.errors import MeetaraError
from meetara_nb.hub import filters
from meetara_nb.hub.dataset import compose, to_json
from meetara_nb.hub.dedup import SHINGLE, Contamination, NearDuplicates, ngrams, words_of
from meetara_nb.hub.grounded import EXTRA, MAIN, Composer, Draft
from meetara_nb.params import DataParams

PARAMS = DataParams(samples=300)


def draft(*turns: str) -> Draft:
    return Draft("answer", "cats", (), turns)


def test_samples_and_funnel(domain: Domain) -> None:
    data = compose(domain, PARAMS)
    funnel = data.funnel
    assert len(data.drafts) == funnel.kept == 300
    assert funnel.generated == funnel.kept + funnel.near_duplicates + funnel.contaminated + sum(funnel.dropped.values())
    assert sum(funnel.kept_by_kind.values()) == 300
    assert set(funnel.kept_by_kind) == set(MAIN) | set(EXTRA)
    assert funnel.statements_used == funnel.statements == 64


def test_the_same_bytes_again_and_others_for_another_seed(domain: Domain) -> None:
    texts = [to_json(domain, PARAMS, compose(domain, PARAMS)) for _ in range(2)]
    assert texts[0] == texts[1]
    other = DataParams(samples=300, seed=18)
    assert to_json(domain, other, compose(domain, other)) != texts[0]


def test_any_beginning_covers_the_domain_evenly(domain: Domain) -> None:
    used = Counter(draft.statements[0] for draft in compose(domain, PARAMS).drafts[:90] if draft.kind in MAIN)
    assert len(used) >= 55 and max(used.values()) <= 3


def test_it_loads_with_datasets(domain: Domain, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(to_json(domain, PARAMS, compose(domain, PARAMS)), encoding="utf-8")
    loaded = datasets.load_dataset(
        "json", data_files=str(path), field="samples", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == 300
    roles = [message["role"] for message in loaded[0]["messages"]]
    assert roles[:3] == ["system", "user", "assistant"] and roles[-1] == "assistant"
    assert json.loads(path.read_text())["funnel"]["kept"] == 300


def test_answers_hold_nothing_but_what_the_spec_says(domain: Domain, spec: dict[str, Any]) -> None:
    """Taking out every text of the spec and the composer's own few phrases leaves nothing."""
    from meetara_nb.hub import grounded

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            value = list(value.values())
        return [text for item in value for text in texts(item)] if isinstance(value, list) else [str(value)]

    spec.pop("checks")
    known = texts(spec) + [part for form in grounded.CORRECTIONS for part in form.split("{truth}")]
    for form in grounded.MORE:
        known += form.replace("{a}", "|").replace("{b}", "|").split("|")
    known = sorted((text for text in known if text.strip()), key=len, reverse=True)
    for draft in compose(domain, PARAMS).drafts:
        rest = draft.answer
        for text in known:
            rest = rest.replace(text, " ")
        assert not [word for word in rest.split() if not word.rstrip(".").isdigit()], rest


def test_checks_are_never_used_to_compose(domain: Domain, tmp_path: Path, spec: dict[str, Any]) -> None:
    from conftest import write_spec

    for check in spec["checks"]:
        check["question"] = "Something else entirely, " + check["question"]
    other = load_domain(write_spec(tmp_path / "other", spec))
    first, second = Composer(domain, 1).drafts(), Composer(other, 1).drafts()
    assert [next(first) for _ in range(500)] == [next(second) for _ in range(500)]


def test_overlap_with_checks_is_dropped(spec: dict[str, Any], tmp_path: Path) -> None:
    from conftest import write_spec

    say = spec["topics"][0]["statements"][0]["say"]
    spec["checks"][0]["good"] = "As people say, " + say[0].lower() + say[1:]
    domain = load_domain(write_spec(tmp_path, spec))
    data = compose(domain, PARAMS)
    assert data.funnel.contaminated > 0
    assert not any(say in draft.answer for draft in data.drafts)


def test_no_two_answers_are_near_duplicates(domain: Domain) -> None:
    grams = [ngrams(words_of(draft.answer), SHINGLE) for draft in compose(domain, PARAMS).drafts]
    for i, a in enumerate(grams):
        for b in grams[:i]:
            assert len(a & b) < 0.8 * len(a | b)


def test_a_thin_spec_says_how_much_is_missing(spec: dict[str, Any], tmp_path: Path) -> None:
    from conftest import write_spec

    spec["topics"] = spec["topics"][:2]
    for check in spec["checks"]:
        check["topic"] = "cats"
    with pytest.raises(MeetaraError, match=r"only [\d,]+ different samples of 5,000 .* 16 statements -> add about \d+"):
        compose(load_domain(write_spec(tmp_path, spec)), DataParams(samples=5_000))


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (draft("Is it so?", "Yes, it is so for most of them."), None),
        (draft("Is it so?"), "structure"),
        (draft("Is it so?", " "), "structure"),
        (draft("Is it so?", "Yes, it is."), "length: fewer"),
        (draft("Is it so?", "word " * 221), "length: more"),
        (draft("Is it so?", "Cats sleep a lot. Dogs do not. Cats sleep a lot."), "repetition"),
        (draft("Is it so?", "Well, <|im_end|> that is how it is."), "template leak"),
        (draft("Hi {tells}", "Well, that is how it is."), "template leak"),
    ],
)
def test_filters(sample: Draft, reason: str | None) -> None:
    found = next((r for r in (check(sample) for check in filters.FILTERS) if r), None)
    assert (found or "").startswith(reason or "") and (found is None) == (reason is None)


def test_near_duplicates_by_exact_similarity() -> None:
    words = [f"w{n}" for n in range(60)]
    seen = NearDuplicates(0.8)
    assert seen.add(" ".join(words))
    assert not seen.add(" ".join(words)), "the same again"
    assert not seen.add(" ".join([*words, "x", "y"])), "two words more"
    assert seen.add(" ".join([*words[:30], "x", *words[30:]])[:200]), "half of it"


def test_contamination_needs_the_whole_run() -> None:
    held_out = Contamination(["one two three four five six"], 5)
    assert held_out.found_in("zero ONE, two three: four five")
    assert not held_out.found_in("one two three four 5 six")
    assert not held_out.found_in("one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["general_health", "entrepreneurship"])
def test_5000_samples_of_the_shipped_specs(name: str) -> None:
    domain, params = Catalogue().load(name), DataParams(samples=5_000)
    first, second = (to_json(domain, params, compose(domain, params)) for _ in range(2))
    assert first == second
    funnel = json.loads(first)["funnel"]
    assert funnel["kept"] == 5_000 and funnel["statements_used"] == funnel["statements"]
