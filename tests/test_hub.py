"""The Intelligence Hub: the count, the funnel, the same bytes again, and nothing that is not in the spec."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, get_args

import datasets
import pytest
from pydantic import ValidationError

from meetara_nb.catalogue import Catalogue, Domain, load_domain
from meetara_nb.errors import MeetaraError
from meetara_nb.hub import grounded
from meetara_nb.hub.dataset import compose, to_json
from meetara_nb.hub.dedup import SHINGLE, Contamination, NearDuplicates, ngrams, words_of
from meetara_nb.hub.grounded import KINDS, MAIN, Composer
from meetara_nb.hub.wording import misspelt, surface_forms
from meetara_nb.params import DataParams, Kind

PARAMS = DataParams(samples=300)


def test_samples_and_funnel(domain: Domain) -> None:
    data = compose(domain, PARAMS)
    funnel = data.funnel.as_dict()
    assert len(data.drafts) == funnel["kept"] == 300
    lost = funnel["near_duplicates"] + funnel["contaminated"] + sum(funnel["dropped"].values())
    assert funnel["generated"] == funnel["kept"] + lost
    for kind, counts in funnel["by_kind"].items():
        assert counts["generated"] == sum(counts.values()) - counts["generated"], kind
        assert counts["kept"] == sum(draft.kind == kind for draft in data.drafts)
    assert sum(counts["generated"] for counts in funnel["by_kind"].values()) == funnel["generated"]
    assert set(funnel["by_kind"]) == set(KINDS) - {"beyond", "decision"}, "which the small spec does not have"
    assert funnel["statements_used"] == funnel["statements"] == 64
    uses = Counter(id_ for draft in data.drafts for id_ in draft.statements)
    assert funnel["uses_of_a_statement"]["max"] == max(uses.values())


def test_kinds_have_their_shares_while_the_spec_lasts() -> None:
    domain, weights = Catalogue().load("general_health"), DataParams().kinds
    drafts = compose(domain, DataParams(samples=600)).drafts
    kinds = Counter(draft.kind for draft in drafts)
    for kind in KINDS:
        share = weights[kind] / sum(weights.values())
        assert 0.5 * share <= kinds[kind] / 600 <= 1.6 * share, kind
    only = DataParams(samples=60, kinds={"answer": 1.0, "mistake": 1.0, "outside": 0.0})
    assert {draft.kind for draft in compose(domain, only).drafts} == {"answer", "mistake"}


def test_every_kind_has_a_maker_and_a_share() -> None:
    assert set(get_args(Kind)) == set(KINDS) == set(DataParams().kinds)
    with pytest.raises(ValidationError, match="every kind of sample has the weight 0"):
        DataParams(kinds={"answer": 0.0})
    with pytest.raises(ValidationError):
        DataParams.model_validate({"kinds": {"answers": 1.0}})


def test_no_two_drafts_say_the_same_texts(domain: Domain) -> None:
    drafts = list(islice(Composer(domain, 1, PARAMS.kinds).drafts(), 2_000))
    assert len({frozenset(draft.sources) for draft in drafts}) == len(drafts)


def test_the_stream_ends_when_all_is_said(domain: Domain) -> None:
    drafts = list(Composer(domain, 1, {"answer": 1.0, "red_flag": 1.0}).drafts())
    assert 64 * 6 < len(drafts) <= 64 * 12 + 100


def test_surface_forms_are_two_sentences_where_something_joins_them() -> None:
    assert surface_forms("Rest, because it heals.") == ("Rest, because it heals.", "Rest. It heals.")
    assert surface_forms("It is cold; wear a coat.")[1] == "It is cold. Wear a coat."
    assert surface_forms("It rains, so take a coat.")[1] == "It rains. So take a coat."
    for single in ("Stay, because of the rain.", "Speak up, so that all can hear.", "Rest a while."):
        assert surface_forms(single) == (single,)


def test_misspelt_questions_can_still_be_read() -> None:
    question = "How long does a common cold usually last in adults over 65?"
    for seed in range(200):
        typed = misspelt(question, Random(seed))
        assert typed != question and "65" in typed
        for before, after in zip(question.lower().split(), typed.lower().split(), strict=True):
            assert before[0] == after[0] and abs(len(before.rstrip("?")) - len(after.rstrip("?"))) <= 1


def test_a_share_of_the_questions_is_misspelt(domain: Domain) -> None:
    plain, typed = (
        list(islice(Composer(domain, 1, {"outside": 0.0, "answer": 1.0}, share).drafts(), 200)) for share in (0.0, 1.0)
    )
    known = {ask for _, statement in domain.statements for ask in statement.ask}
    assert sum(any(ask in draft.question for ask in known) for draft in plain) == 200
    assert sum(any(ask in draft.question for ask in known) for draft in typed) < 20


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


def test_answers_hold_nothing_but_what_the_spec_says(domain: Domain) -> None:
    """Taking out the sources in their surface forms and the composer's own few phrases leaves nothing."""
    phrases = [part for form in (*grounded.CORRECTIONS, *grounded.MORE) for part in re.split(r"\{\w+\}", form)]
    phrases += grounded.ADDED
    understood = [form.format(feeling=p.feeling) for form in grounded.UNDERSTOOD for p in domain.personas]
    names = [topic.name for topic in domain.topics]
    for draft in compose(domain, PARAMS).drafts:
        known = [form for source in draft.sources for form in surface_forms(source)] + phrases + understood + names
        rest = draft.answer
        for text in sorted(filter(None, map(str.strip, known)), key=len, reverse=True):
            rest = rest.replace(text, " ")
        assert not [word for word in rest.split() if not word.rstrip(".").isdigit()], rest


def test_checks_are_never_used_to_compose(domain: Domain, tmp_path: Path, spec: dict[str, Any]) -> None:
    from conftest import write_spec

    for check in spec["checks"]:
        check["question"] = "Something else entirely, " + check["question"]
    other = load_domain(write_spec(tmp_path / "other", spec))
    first, second = Composer(domain, 1, PARAMS.kinds).drafts(), Composer(other, 1, PARAMS.kinds).drafts()
    assert [next(first) for _ in range(500)] == [next(second) for _ in range(500)]


def test_overlap_with_checks_is_dropped(spec: dict[str, Any], tmp_path: Path) -> None:
    from conftest import write_spec

    say = spec["topics"][0]["statements"][0]["say"]
    spec["checks"][0]["good"] = "As people say, " + say[0].lower() + say[1:]
    domain = load_domain(write_spec(tmp_path, spec))
    data = compose(domain, PARAMS)
    assert data.funnel.as_dict()["contaminated"] > 0
    assert not any(say in draft.answer for draft in data.drafts)


def test_no_two_answers_are_near_duplicates(domain: Domain) -> None:
    grams = [ngrams(words_of(draft.answer), SHINGLE) for draft in compose(domain, PARAMS).drafts]
    for i, a in enumerate(grams):
        for b in grams[:i]:
            assert len(a & b) < 0.8 * len(a | b)


def test_no_draft_is_asked_for_once_there_are_enough(domain: Domain) -> None:
    taken = 0

    def counted() -> Any:
        nonlocal taken
        for draft in Composer(domain, 1, PARAMS.kinds).drafts():
            taken += 1
            yield draft

    assert compose(domain, PARAMS, counted()).funnel.as_dict()["generated"] == taken


def test_a_thin_spec_says_how_much_is_missing(spec: dict[str, Any], tmp_path: Path) -> None:
    from conftest import write_spec

    spec["topics"] = spec["topics"][:2]
    for check in spec["checks"]:
        check["topic"] = "cats"
    with pytest.raises(MeetaraError, match=r"only [\d,]+ different samples of 5,000 .* 16 statements -> add about \d+"):
        compose(load_domain(write_spec(tmp_path, spec)), DataParams(samples=5_000, kinds={"answer": 1.0}))


def test_near_duplicates_by_exact_similarity() -> None:
    words = [f"w{n}" for n in range(60)]
    seen = NearDuplicates(0.8)
    assert seen.add(words) is None
    assert seen.add([*words[:30], *words[:30]]) is None, "another text"
    assert seen.add(words) == 0, "the same again"
    assert seen.add([*words, "x", "y"]) == 0, "two words more"
    assert seen.add([*words[:20], "x", *words[20:40], "y", *words[40:]]) is None, "cut in three"


def test_contamination_needs_the_whole_run() -> None:
    held_out = Contamination(["one two three four five six"], 5)
    assert held_out.found_in(words_of("zero ONE, two three: four five"))
    assert not held_out.found_in(words_of("one two three four 5 six"))
    assert not held_out.found_in(["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["general_health", "entrepreneurship"])
@pytest.mark.parametrize("samples", [5_000, 15_000])
def test_the_shipped_specs_carry_the_tiers(name: str, samples: int) -> None:
    domain, params = Catalogue().load(name), DataParams(samples=samples)
    data = compose(domain, params)
    assert to_json(domain, params, data) == to_json(domain, params, compose(domain, params))
    funnel = data.funnel.as_dict()
    assert funnel["kept"] == samples and funnel["statements_used"] == funnel["statements"]
    assert funnel["generated"] < 1.1 * samples, "time would not grow in line with the count"
    assert not funnel["dropped"], "the spec's own texts fail no filter"
    answers = [draft.answer for draft in data.drafts]
    assert len(set(answers)) == samples
    grams = [ngrams(words_of(text), SHINGLE) for text in Random(0).sample(answers, 500)]
    for i, a in enumerate(grams):
        assert not [b for b in grams[:i] if len(a & b) >= 0.8 * len(a | b)]
    for text in {text for _, statement in domain.statements for text in statement.wordings}:
        assert sum(text in answer for answer in answers) <= 0.03 * samples, text
