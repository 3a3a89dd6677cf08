"""Stages and resume by content, on the one stage that needs no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_spec

from meetara_nb import plan
from meetara_nb.catalogue import Catalogue
from meetara_nb.errors import MeetaraError
from meetara_nb.lab import Lab
from meetara_nb.layout import Layout
from meetara_nb.stages import STAGES


def opened(layout: Layout, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> Lab:
    monkeypatch.setenv("MEETARA_WORK_ROOT", str(layout.work_root))
    roots = {"data_root": str(layout.data_root), "models_root": str(layout.models_root)}
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return Lab.open(["animal_habits"], "smoke", overrides=changed, catalogue=catalogue, **roots)


def test_done_is_skipped_until_what_it_depends_on_changes(
    layout: Layout, catalogue: Catalogue, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = opened(layout, catalogue, monkeypatch)
    assert [outcome.state for outcome in lab.run("data")] == ["done"]
    again = opened(layout, catalogue, monkeypatch, train__learning_rate=0.1)
    assert [outcome.state for outcome in again.run("data")] == ["skipped"], "training is no concern of the data"
    assert opened(layout, catalogue, monkeypatch, data__samples=150).pending(STAGES["data"])
    path = write_spec(catalogue.folder, spec)
    path.write_text("# a comment\n" + path.read_text())
    assert not opened(layout, catalogue, monkeypatch).pending(STAGES["data"]), "a comment changes nothing"
    spec["topics"][0]["statements"][0]["why"] = "Because the evening air is still and carries every sound."
    write_spec(catalogue.folder, spec)
    assert opened(layout, catalogue, monkeypatch).pending(STAGES["data"])


def test_a_changed_output_is_made_again_and_set_aside(
    layout: Layout, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = opened(layout, catalogue, monkeypatch)
    lab.run("data")
    path = Path(layout.training_data("education", "animal_habits"))
    content = path.read_text()
    path.write_text("edited by hand")
    assert [outcome.state for outcome in lab.run("data")] == ["done"]
    assert path.read_text() == content
    assert Path(layout.legacy(path.name)).read_text() == "edited by hand"


def test_a_stage_without_its_input_says_what_to_run(
    layout: Layout, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    (outcome,) = opened(layout, catalogue, monkeypatch).run("train")
    assert outcome.state == "failed" and "run 01_generate_data first" in outcome.error


def test_what_is_unexpected_is_one_line_and_a_traceback_in_the_log(
    layout: Layout, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meetara_nb.hub import dataset

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("in the hub")

    monkeypatch.setattr(dataset, "compose", broken)
    lab = opened(layout, catalogue, monkeypatch)
    (outcome,) = lab.run("data")
    assert outcome.state == "failed" and "unexpected ZeroDivisionError: in the hub" in outcome.error
    events = [json.loads(line) for line in (Path(layout.run(lab.log.run_id)) / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "traceback", "failed"]
    assert "ZeroDivisionError" in events[1]["traceback"]
    assert all(event["run_id"] == lab.log.run_id and event["domain"] == "animal_habits" for event in events)


def test_status_judges_each_stage_by_its_own_parameters(
    layout: Layout, catalogue: Catalogue, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing yet" in plan.status(catalogue, layout)
    opened(layout, catalogue, monkeypatch, data__samples=150).run("data")
    assert "begun from train" in plan.status(catalogue, layout)
    spec["title"] = "Habits of animals"
    write_spec(catalogue.folder, spec)
    assert "stale from data" in plan.status(catalogue, layout)


def test_every_fault_of_a_run_at_once(catalogue: Catalogue) -> None:
    with pytest.raises(MeetaraError) as error:
        Lab.open(["animal_habit"], "smok", overrides={"train.lr": 1}, catalogue=catalogue)
    assert len(error.value.faults) == 3
    assert error.value._render_traceback_() == [f"error: {fault}" for fault in error.value.faults]
