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


def test_the_time_of_a_run_is_shared_by_what_is_left_of_it(
    layout: Layout, catalogue: Catalogue, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meetara_nb.device.CPU_MINUTES", 7.0)
    for name in ("a_habits", "b_habits", "c_habits"):
        write_spec(catalogue.folder, spec, name)
    roots = {"data_root": str(layout.data_root), "models_root": str(layout.models_root)}

    def lab_of(**overrides: Any) -> Lab:
        changed = {f"train.{key}": value for key, value in overrides.items()}
        return Lab.open(
            ["a_habits", "b_habits", "c_habits"], "fast", overrides=changed, catalogue=Catalogue(catalogue.folder),
            run_id="shared", **roots,
        )  # fmt: skip

    assert lab_of(max_steps=5).minutes_for(lab_of().domains[0]) is None
    assert lab_of().minutes_for(lab_of().domains[0]) == 7.0
    assert lab_of(max_minutes=3.0).minutes_for(lab_of().domains[0]) == 3.0
    lab = lab_of(run_minutes=30.0)
    assert lab.minutes_for(lab.domains[0]) == 10.0
    lab.log.stage = "train"
    lab.log.event("done", domain="a_habits", seconds=840.0)  # 14 minutes instead of 10
    assert lab.minutes_for(lab.domains[1]) == 8.0
    lab.log.event("failed", domain="b_habits", seconds=0.0)
    assert lab.minutes_for(lab.domains[2]) == 16.0
    assert lab_of(run_minutes=30.0, max_minutes=5.0).minutes_for(lab.domains[2]) == 5.0


def test_the_curve_is_drawn_as_it_trains(layout: Layout, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    from meetara_nb import plots

    shown: list[str] = []

    class Handle:
        def update(self, _: Any) -> None:
            shown.append("update")

    def display(*_: Any, display_id: bool) -> Handle:
        shown.append("new")
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    lab = opened(layout, catalogue, monkeypatch)
    lab.run("data")
    with plots.LiveCurve(lab, every_s=0.0):
        lab.log.event("held out", domain="animal_habits", step=0, loss=3.0)
        for step in (1, 2, 3):
            lab.log.event(
                "step", domain="animal_habits", step=step, steps=3, loss=2.0, learning_rate=0.1, tokens_per_s=100,
                left_s=5, memory_bytes=10**9,
            )  # fmt: skip
    assert shown == ["new", "update", "update"] and not lab.log.listeners
    assert lab.log.folder is not None and (lab.log.folder / "loss_animal_habits.png").stat().st_size > 5_000
