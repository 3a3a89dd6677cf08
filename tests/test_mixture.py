"""The mixture of domains, and the measures of variety."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from meetara_nb.errors import MeetaraError
from meetara_nb.hub import measures
from meetara_nb.hub.mixture import mix, shares


def write(path: Path, name: str, count: int, subject: str) -> Path:
    def sample(n: int) -> dict[str, object]:
        said = f"The {subject} number {n} lives in the {n}th house of a long street and likes to sing there."
        roles = {"system": f"You are a guide to {name}.", "user": f"Who is {n}?", "assistant": said}
        messages = [{"role": role, "content": content} for role, content in roles.items()]
        return {"id": f"{name}-{n}", "kind": "answer", "topic": "t", "statements": [], "messages": messages}

    funnel = {
        "generated": count, "kept": count, "near_duplicates": 0, "contaminated": 0, "dropped": {}, "statements": 1,
        "statements_used": 1, "uses_of_a_statement": {"median": 1, "max": 1},
    }  # fmt: skip
    content = {"title": name.title(), "funnel": funnel, "samples": [sample(n) for n in range(count)]}
    path.write_text(json.dumps(content))
    return path


def test_shares_even_out_with_the_temperature() -> None:
    counts = {"a": 900, "b": 100}
    assert shares(counts, 1.0) == {"a": 0.9, "b": 0.1}
    assert shares(counts, 2.0) == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares(counts, 1e9)["b"] == pytest.approx(0.5)


def test_a_mixture_is_balanced_shuffled_and_names_the_domain(tmp_path: Path) -> None:
    files = {"birds": write(tmp_path / "b", "birds", 400, "bird"), "cats": write(tmp_path / "c", "cats", 100, "cat")}
    made = mix(files, 150, 2.0, 7, 0.8)
    assert {name: entry["taken"] for name, entry in made.report.items()} == {"birds": 100, "cats": 50}
    assert made.report["cats"] == {"available": 100, "share": 0.3333, "taken": 50, "near_duplicates": {}}
    domains = [sample["id"].split("-")[0] for sample in made.samples]
    assert Counter(domains) == {"birds": 100, "cats": 50} and len(set(domains[:20])) == 2
    systems = {sample["messages"][0]["content"] for sample in made.samples}
    assert systems == {"You are a guide to birds. Domain: Birds.", "You are a guide to cats. Domain: Cats."}
    assert mix(files, 150, 2.0, 7, 0.8) == made
    assert mix(files, 150, 2.0, 8, 0.8).samples != made.samples


def test_a_small_domain_gives_all_it_has(tmp_path: Path) -> None:
    files = {"birds": write(tmp_path / "b", "birds", 400, "bird"), "cats": write(tmp_path / "c", "cats", 10, "cat")}
    assert {k: v["taken"] for k, v in mix(files, 300, 1e9, 7, 0.8).report.items()} == {"birds": 150, "cats": 10}


def test_answers_that_repeat_another_domains_are_left_out_and_counted(tmp_path: Path) -> None:
    files = {"birds": write(tmp_path / "b", "birds", 50, "bird"), "rooks": write(tmp_path / "c", "rooks", 80, "bird")}
    made = mix(files, 100, 1e9, 7, 0.8)
    assert made.report["rooks"]["near_duplicates"] == {"birds": 50} and made.report["rooks"]["taken"] == 30
    pairs = measures.repeated_across({name: json.loads(path.read_text()) for name, path in files.items()})
    assert pairs == {("birds", "rooks"): 50}
    assert "birds and rooks  50" in measures.report(files, across=True)


def test_what_is_no_training_data(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}")
    for name in ("x", "none"):
        with pytest.raises(MeetaraError, match="no training data -> run 01_generate_data"):
            mix({"a": tmp_path / name}, 10, 1.0, 1, 0.8)


def test_measures_of_variety() -> None:
    same = ["one two three four five six"] * 4
    other = [f"w{n} x{n} y{n} z{n}" for n in range(4)]
    assert measures.measure(same)["distinct_2"] == 5 / 20 and measures.measure(other)["distinct_2"] == 1.0
    assert measures.measure(same)["mean_similarity"] == 1.0 and measures.measure(other)["mean_similarity"] == 0.0
    assert measures.measure(same)["vocabulary"] == 6
    answers = ["a b c d e", "x b c d y", "p q r"]
    assert measures.longest_shared([text.split() for text in answers], share=0.5) == ("b c d", 2)
    assert measures.longest_shared([["a"], ["b"]]) == ("", 0)
