"""The stage notebooks: one parameters cell, the library's names and defaults, no outputs, thin."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import nbformat
import papermill
import pytest

from meetara_nb import chain
from meetara_nb.lab import Lab
from meetara_nb.layout import NOTEBOOKS
from meetara_nb.stages import STAGES

NAMES = [chain.SETUP, *(stage.notebook for stage in STAGES.values())]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_the_notebooks_are_the_stages() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_parameters_cell_and_no_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_librarys_with_literal_defaults_and_help(name: str) -> None:
    known = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
    signature = inspect.signature(Lab.open).parameters
    assert list(known) == [p for p in signature if p != "catalogue"]
    for parameter, described in known.items():
        default = ast.literal_eval(described["default"])
        of_library = signature[parameter].default
        assert default == (list(of_library) if isinstance(of_library, tuple) else of_library or type(default)())
        assert described["help"] and described["inferred_type_name"] == type(default).__name__


@pytest.mark.parametrize("name", NAMES)
def test_thin(name: str) -> None:
    code = [cell.source for cell in read(name).cells if cell.cell_type == "code"]
    assert len(code) <= 6 and sum(source.count("\n") + 1 for source in code) <= 30
    for source in code:
        nodes = list(ast.walk(ast.parse(source)))
        assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Try))]


@pytest.mark.parametrize("name", NAMES)
def test_prose_says_what_happens(name: str) -> None:
    first = read(name).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and len(first.source) > 200


def test_paths_with_braces_reach_papermill_unharmed() -> None:
    assert chain._escaped(Path("a{b}")).format() == "a{b}"
