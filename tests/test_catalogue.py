"""Domain specs: what is valid, and what each fault says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import small_spec, write_spec

from meetara_nb.catalogue import Catalogue, Domain, load_domain, texts_of
from meetara_nb.errors import MeetaraError
from meetara_nb.hub.dedup import NearDuplicates, ngrams, words_of
from meetara_nb.hub.wording import surface_forms

SHIPPED = sorted(Catalogue().files)


# The 62 domains of the catalogue; not all have a spec yet.
_PLANNED = """
    general_health mental_health nutrition fitness sleep stress_management preventive_care chronic_conditions
    medication_management emergency_care women_health senior_health
    parenting relationships personal_assistant communication home_management shopping planning transportation
    time_management decision_making conflict_resolution work_life_balance
    entrepreneurship marketing sales customer_service project_management team_leadership financial_planning operations
    hr_management strategy consulting legal_business
    academic_tutoring skill_development career_guidance exam_preparation language_learning research_assistance
    study_techniques educational_technology
    writing storytelling content_creation social_media design_thinking photography music art_appreciation
    programming ai_ml cybersecurity data_analysis tech_support software_development
    legal financial scientific_research engineering
"""
PLANNED = _PLANNED.split()


@cache
def shipped(name: str) -> Domain:
    return Catalogue().load(name)


def faults_of(tmp_path: Path, spec: dict[str, Any], name: str = "") -> list[str]:
    path = write_spec(tmp_path, spec, name)
    with pytest.raises(MeetaraError) as error:
        load_domain(path)
    return [str(fault).removeprefix(str(path)) for fault in error.value.faults]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_meet_the_standard(name: str) -> None:
    domain = shipped(name)
    assert len(domain.topics) >= 12
    assert sum(1 for _ in domain.statements) >= 100
    assert len(domain.checks) >= 30
    assert {check.topic for check in domain.checks} == {topic.id for topic in domain.topics}
    assert len(domain.personas) >= 10 and len(domain.question_forms) >= 10
    assert len(domain.red_flags) >= 3 and len(domain.neighbours) >= 5 and domain.beyond
    for topic in domain.topics:
        assert topic.mistakes and topic.decisions
    for _, statement in domain.statements:
        assert statement.why
        assert len({form for text in statement.wordings for form in surface_forms(text)}) >= 6, statement.id
        assert all(text.isascii() for text in (*statement.wordings, *statement.ask))
    if domain.safety == "medical":
        # Danger to life leads to the emergency number; what can wait for a doctor may lead there.
        assert sum("emergency number" in f"{flag.action} {flag.also}" for flag in domain.red_flags) >= 4


def test_no_domain_says_what_another_says() -> None:
    """No statement stands in two specs, word for word or nearly so."""
    seen = NearDuplicates(0.5)
    owners: list[str] = []
    for name in SHIPPED:
        for _, statement in shipped(name).statements:
            for text in statement.wordings:
                other = seen.add(words_of(text))
                assert other is None or owners[other] == name, f"{name} and {owners[other or 0]}: {text}"
                if other is None:
                    owners.append(name)


def test_neighbours_are_domains() -> None:
    for name in SHIPPED:
        assert {neighbour.domain for neighbour in shipped(name).neighbours} <= set(PLANNED) - {name}, name


@pytest.mark.parametrize("name", SHIPPED)
def test_checks_are_not_worded_like_the_spec(name: str) -> None:
    """No run of 6 words of a check stands in anything that samples are composed from."""
    domain = shipped(name)
    content = domain.model_dump(exclude={"checks"})
    runs = {run for text in texts_of(content) if len(words_of(text)) >= 6 for run in ngrams(words_of(text), 6)}
    for check in domain.checks:
        for text in (check.question, check.good):
            if len(words_of(text)) >= 6:
                assert not runs & ngrams(words_of(text), 6), check.id


def test_the_small_spec_is_valid(domain: Domain) -> None:
    assert domain.system_prompt == "You are MeeTARA, a patient guide to animals."
    assert sum(1 for _ in domain.statements) == 64


def test_three_faults_are_all_listed(tmp_path: Path, spec: dict[str, Any]) -> None:
    spec["titel"] = "x"
    spec["topics"][0]["statements"][1]["ask"] = ["only one?"]
    del spec["topics"][2]["name"]
    faults = faults_of(tmp_path, spec)
    assert len(faults) == 3
    assert any("titel: unknown key -> did you mean title" in fault for fault in faults)
    assert any("topics[0].statements[1].ask" in fault for fault in faults)
    assert any("topics[2].name: missing" in fault for fault in faults)


def change(path: str, value: Any) -> Any:
    def apply(spec: dict[str, Any]) -> None:
        place: Any = spec
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            place = place[part]
        place[last] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change("category", "health"), "category"),
        (change("domain", "a/b"), "domain"),
        (change("topics.0.statements", []), "topics[0].statements"),
        (change("topics.0.statements.0.id", "cats_hunt"), "stands in the file twice"),
        (change("topics.0.statements.0.say", small_spec()["topics"][0]["statements"][1]["say"]), "twice"),
        (change("question_forms.1", "Hello {name}: {question}"), "cannot be filled"),
        (change("question_forms.1", "Hello"), "cannot be filled"),
        (change("topic_forms.0", "About {topic"), "cannot be filled"),
        (change("checks.0.topic", "cat"), "did you mean"),
        (change("checks.0.good", small_spec()["topics"][0]["statements"][1]["say"]), "held-out"),
        (change("checks.0.wrong", ["a b", "a b", "c d"]), "the same"),
        (change("checks.3.id", "check_2"), "twice"),
        (change("safety", "none"), "safety"),
        (change("title", 3), "text"),
    ],
)
def test_faults(tmp_path: Path, spec: dict[str, Any], apply: Any, message: str) -> None:
    path = write_spec(tmp_path, spec)
    apply(spec)
    import yaml

    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    with pytest.raises(MeetaraError) as error:
        load_domain(path)
    (fault,) = error.value.faults
    assert message in str(fault)
    assert f"{path}:" in fault.where, "names file and line"


SAY = "Most cats hunt in the early evening, when the meadow around the old mill grows quiet."


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda text: text.replace("mistakes:", "mistake:", 1), "mistake: unknown key -> did you mean mistakes"),
        (lambda text: text.replace("domain: animal_habits", "domain: a/b", 1), ":1: domain: "),
        (lambda text: text.replace("domain: animal_habits", "domain: ../../x", 1), ":1: domain: "),
        (lambda text: text.replace("category: education", "category: creative", 1), "move the file"),
        (lambda text: text.replace("id: cats_sleep", "id: cats_hunt", 1), "'cats_hunt' stands in the file twice"),
        (lambda text: text.replace("Evening number 3 is the best choice.", SAY, 1), "a held-out check stands in the"),
        (lambda text: text.replace("Evening number 3 is", "Keep still and watch. Wait, is", 1), ""),
        (lambda text: text.replace("title: Animal", "title: !!python/object/apply:os.system [x] # ", 1), "not allowed"),
        (lambda text: text.replace("title: Animal habits", "title: !!python/name:os.system", 1), "not allowed"),
        (lambda text: text.replace("title: Animal habits", "title: &a x\nrole: *a", 1), "aliases are not allowed here"),
        (lambda text: text + "more: " + "[" * 200_000, "nested more than 30 deep"),
        (lambda text: text + "#" * 40_000_000, "over the limit"),
        (lambda text: text + "\ttabs: 1", "not valid YAML"),
    ],
)  # fmt: skip
def test_planted_faults_give_one_error_with_file_and_line(
    tmp_path: Path, spec: dict[str, Any], plant: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, as a user would meet them."""
    from meetara_nb import cli

    path = write_spec(tmp_path, spec)
    path.write_text(plant(path.read_text(encoding="utf-8")), encoding="utf-8")
    code = cli.main(["validate", str(path)])
    errors = capsys.readouterr().err.splitlines()
    if not message:
        assert code == 0 and not errors
        return
    assert code == 2 and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {path}") and message in errors[0]


def test_file_name_and_folder_must_agree(tmp_path: Path, spec: dict[str, Any]) -> None:
    path = write_spec(tmp_path, spec)
    wrong = path.with_name("other.yaml")
    path.rename(wrong)
    with pytest.raises(MeetaraError, match="same name"):
        load_domain(wrong)
    (tmp_path / "nature").mkdir()
    wrong.rename(tmp_path / "nature" / "animal_habits.yaml")
    with pytest.raises(MeetaraError, match="is no category"):
        Catalogue(tmp_path).select(["animal_habits"])


def test_unknown_domains_get_the_nearest_names() -> None:
    with pytest.raises(MeetaraError) as error:
        Catalogue().select(["general_heath", "entrepreneurs"])
    first, second = (fault.remedy for fault in error.value.faults)
    assert first.startswith("did you mean general_health") and second == "did you mean entrepreneurship?"
    with pytest.raises(MeetaraError, match="no domain is given"):
        Catalogue().select([])


def test_the_digest_ignores_comments(tmp_path: Path, domain: Domain, spec: dict[str, Any]) -> None:
    path = write_spec(tmp_path / "again", spec)
    path.write_text("# a comment\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_domain(path).digest() == domain.digest()
    spec["topics"][0]["statements"][0]["why"] = "Because they like it that way, as far as anyone can tell."
    assert load_domain(write_spec(tmp_path / "changed", spec)).digest() != domain.digest()
