"""The house: modules import only modules above them, importing is light, and nothing needs POSIX at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meetara_nb

ROOT = Path(meetara_nb.__file__).parent
# From the top of the house down; a package stands for its modules, listed in their own order.
ORDER = [
    "errors", "layout", "yamlfile", "store", "runlog", "quants", "device", "params", "catalogue",
    "hub.wording", "hub.grounded", "hub.filters", "hub.dedup", "hub.dataset", "hub.backends", "hub.teacher",
    "hub.mixture", "hub.measures",
    "gguf_factory.gguf_io",
    "training.local", "training.bases", "training.adapted", "training.collate", "training.samples",
    "training.decoder", "training.checkpoint", "training.schedule", "training.progress",
    "training.stepper", "training.engine",
    "gguf_factory.child", "gguf_factory.adapter", "gguf_factory.convert", "gguf_factory.merge",
    "gguf_factory.runtime", "gguf_factory.quantize", "gguf_factory.verify", "gguf_factory.factory",
    "evaluation", "metadata", "stages", "lab", "environment", "chain", "plan", "plots", "cli", "__main__",
]  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
}


def test_every_module_has_its_place() -> None:
    assert sorted(FILES) == sorted(ORDER)


def imports_of(name: str, path: Path) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    found = set()
    package = name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):  # what only type checkers import does not count
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - (node.level - 1)]
            module = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            found |= {known for known in [module, *names] if known in FILES}
    return found


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    assert imports_of(name, FILES[name]) <= set(above)


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "llama_cpp", "pydantic", "numpy", "yaml")
    code = f"import sys, meetara_nb; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from meetara_nb import cli; cli.main(['list']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ORDER)
def test_nothing_is_posix_only_at_import(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level and node.module}
    assert not names & {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}


def test_only_the_command_line_ends_the_process() -> None:
    for name, path in FILES.items():
        if name in ("cli", "__main__"):
            continue
        text = path.read_text(encoding="utf-8")
        assert "sys.exit" not in text and "os._exit" not in text, name
