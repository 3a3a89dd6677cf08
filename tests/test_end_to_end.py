"""The main job as a user runs it, on the real base with a small domain and a few steps of training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_spec, write_spec

from meetara_nb.layout import PROJECT, Layout
from meetara_nb.params import Base
from meetara_nb.store import sha256_of
from meetara_nb.training.checkpoint import load_trained_model

pytestmark = pytest.mark.slow

NAME, CATEGORY, BASE = "animal_habits", "education", "smollm2-135m-q4_1"


@dataclass
class Root:
    """A pair of roots, and the command line on them."""

    folder: Path
    specs: Path
    work: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "data", self.folder / "models", self.work)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "MEETARA_DOMAINS": str(self.specs),
            "MEETARA_DATA_ROOT": str(self.layout.data_root),
            "MEETARA_MODELS_ROOT": str(self.layout.models_root),
            "MEETARA_WORK_ROOT": str(self.work),
        }
        command = [sys.executable, "-m", "meetara_nb", *arguments]
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *names: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        process = self.start("run", "--tier", "smoke", "--domains", ",".join(names or (NAME,)), *options)
        text, _ = process.communicate(timeout=900)
        return process.returncode, text

    @property
    def gguf(self) -> Path:
        return Path(self.layout.domain_gguf(CATEGORY, NAME, "Q4_K_M"))

    @property
    def trained(self) -> Path:
        return Path(self.layout.trained_model(CATEGORY, NAME))

    def events(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(Path(self.layout.runs).glob("*/events.jsonl")):
            found += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return found

    def tree(self) -> dict[str, tuple[int, int]]:
        files = [p for root in (self.layout.data_root, self.layout.models_root) for p in Path(root).rglob("*")]
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specs")
    write_spec(folder, small_spec())
    thin = small_spec()
    thin["topics"] = [{**topic, "statements": topic["statements"][:1]} for topic in thin["topics"][:2]]
    for check in thin["checks"]:
        check["topic"] = "cats"
    write_spec(folder, thin, "thin_habits")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, specs: Path, prepared: Path, base: Base) -> Callable[[str], Root]:
    """Makes roots that share nothing but the unpacked base."""

    def make(name: str) -> Root:
        folder = tmp_path_factory.mktemp(name)
        made = Root(folder, specs, folder / "work")
        place = Path(made.layout.base_work(BASE)) / "transformers" / prepared.name
        place.parent.mkdir(parents=True)
        place.symlink_to(prepared)
        return made

    return make


@pytest.fixture(scope="module")
def first(root: Callable[[str], Root]) -> tuple[Root, int, str]:
    """A run over two domains, of which one has too little to say."""
    made = root("first")
    return made, *made.run(NAME, "thin_habits")


def with_base(made: Root, other: Root) -> Root:
    """Gives `made` the base's GGUF files that `other` has."""
    shutil.copytree(Path(other.layout.base(BASE, "F16")).parent, Path(made.layout.base(BASE, "F16")).parent)
    manifest = Path(made.layout.manifest("base", "base", BASE))
    manifest.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(other.layout.manifest("base", "base", BASE)), manifest)
    return made


def test_one_domain_fails_and_the_other_is_finished(first: tuple[Root, int, str]) -> None:
    made, status, text = first
    assert status == 1, text
    assert "1 of 2 domains failed: thin_habits" in text
    assert "different samples of 200 can be made from 2 statements -> add about" in text
    assert made.gguf.is_file() and "0:0" in text
    assert not Path(made.layout.trained_model(CATEGORY, "thin_habits")).exists()


def test_every_file_is_where_the_contract_says(first: tuple[Root, int, str]) -> None:
    made, layout = first[0], first[0].layout
    data = json.loads(Path(layout.training_data(CATEGORY, NAME)).read_text())
    assert len(data["samples"]) == data["funnel"]["kept"] == 200
    assert 80e6 <= made.trained.stat().st_size <= 100e6
    assert made.gguf.stat().st_size <= 8_300_000
    assert Path(layout.base(BASE, "F16")).is_file() and Path(layout.base(BASE, "Q4_K_M")).is_file()
    (run,) = Path(layout.runs).iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"00_setup.ipynb", "01_generate_data.ipynb", "05_metadata.ipynb", "events.jsonl", "losses.png"} <= names
    assert not [path for path in made.tree() if path.endswith(".partial")]


def test_the_trained_model_is_what_its_docstring_says(first: tuple[Root, int, str]) -> None:
    content = load_trained_model(first[0].trained)
    assert content["lora"]["rank"] == 32 and len(content["losses"]) == content["plan"]["steps"] == 6
    trunk = content["trunk"]
    values = sum(weight.numel() for weight in content["adapter"].values())
    assert trunk["step"] == 4 and trunk["weights"].numel() == values == 9_768_960
    assert trunk["weights"].norm() != sum(weight.norm() ** 2 for weight in content["adapter"].values()) ** 0.5
    assert content["data_sha256"] == sha256_of(Path(first[0].layout.training_data(CATEGORY, NAME)))


def test_the_metadata_is_measured_and_small(first: tuple[Root, int, str]) -> None:
    made = first[0]
    path = Path(made.layout.domain_metadata(CATEGORY, NAME))
    assert 500 < path.stat().st_size <= 2048
    metadata = json.loads(path.read_text())
    (file,) = metadata["files"]
    assert file["bytes"] == made.gguf.stat().st_size and file["sha256"] == sha256_of(made.gguf)
    assert metadata["training"]["sha256"] == sha256_of(made.trained)
    figures = Path(made.layout.figures(CATEGORY, NAME))
    assert metadata["figures_sha256"] == sha256_of(figures)
    measured = json.loads(figures.read_text())["files"]["adapter Q4_K_M"]
    assert file["scores"]["bits_per_byte"] == [measured[w]["bits_per_byte"] for w in ("base", "tuned")]
    assert len(measured["tuned"]["checks"]) == 30 and 0 <= measured["kl_f16"] < 0.05


def test_the_header_names_the_base_by_its_weights(first: tuple[Root, int, str]) -> None:
    from meetara_nb.gguf_factory.gguf_io import open_gguf

    made = first[0]
    reader = open_gguf(made.gguf)
    base = json.loads(Path(made.layout.manifest("base", "base", BASE)).read_text())
    weights = reader.get_field("meetara.base.weights_sha256").contents()
    assert weights == base["facts"]["weights_sha256"]
    assert reader.get_field("general.type").contents() == "adapter"
    assert {t.tensor_type.name for t in reader.tensors} == {"Q5_0", "Q8_0"}


def test_again_there_is_nothing_to_do(first: tuple[Root, int, str]) -> None:
    made = first[0]
    before = made.tree()
    status, text = made.run()
    assert status == 0 and "nothing to do" in text
    assert made.tree() == before


@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_a_damaged_base_is_one_clear_line_and_nothing_changes(first: tuple[Root, int, str], quant: str) -> None:
    made = first[0]
    base = Path(made.layout.base(BASE, quant))
    stat, content = base.stat(), base.read_bytes()
    try:
        base.write_bytes(content[:-1000] + bytes(1000))
        before = made.tree()
        status, text = made.run()
        assert (status, len(text.splitlines())) == (2, 1), text
        assert text.startswith(f"error: {base}: the base file is damaged") and "remove it and run again" in text
        assert made.tree() == before
    finally:
        base.write_bytes(content)
        os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_killed_runs_go_on_and_end_as_an_unbroken_one(
    first: tuple[Root, int, str], root: Callable[[str], Root]
) -> None:
    whole = first[0]
    made = with_base(root("killed"), whole)
    # In the middle of training, everything at once; in the GGUF stage, the chain alone: its kernel notices.
    moments: list[tuple[Callable[[dict[str, Any]], bool], bool]] = [
        (lambda event: event["event"] == "step" and event["step"] == 3, True),
        (lambda event: event["event"] == "step" and event["step"] == 5, True),
        (lambda event: event["event"] == "started" and event["stage"] == "gguf", False),
    ]
    for moment, group in moments:
        process = made.start("run", "--tier", "smoke", "--domains", NAME)
        deadline = time.monotonic() + 300
        while not any(moment(event) for event in made.events()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        if group:
            kill_all(process.pid)
        else:
            process.kill()
        process.communicate()
    status, text = made.run()
    assert status == 0, text
    assert sha256_of(made.trained) == sha256_of(whole.trained), "weights, optimizer, losses: bit for bit"
    assert sha256_of(made.gguf) == sha256_of(whole.gguf)
    assert any(event["event"] == "resume" for event in made.events())
    assert not [path for path in made.tree() if path.endswith(".partial")]


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all below it, at once."""
    import psutil

    below = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    for process in below:
        process.kill()


def test_two_runs_at_once_both_end_well(first: tuple[Root, int, str], root: Callable[[str], Root]) -> None:
    made = with_base(root("twice"), first[0])
    processes = [made.start("run", "--tier", "smoke", "--domains", NAME) for _ in range(2)]
    for process in processes:
        text, _ = process.communicate(timeout=900)
        assert process.returncode == 0, text
    assert sha256_of(made.gguf) == sha256_of(first[0].gguf)
    trained = [e for e in made.events() if e["event"] == "done" and e["stage"] == "train"]
    assert len(trained) == 1, "one run trained, the other took what it made"


def test_the_merged_form_is_a_model_of_its_own(first: tuple[Root, int, str]) -> None:
    from meetara_nb.gguf_factory.runtime import Runtime

    made = first[0]
    status, text = made.run(options=("--form", "merged", "--quant", "Q4_K_M,Q8_0"))
    assert status == 0, text
    sizes = {}
    for quant in ("Q4_K_M", "Q8_0"):
        path = Path(made.layout.domain_gguf(CATEGORY, NAME, quant, merged=True))
        sizes[quant] = path.stat().st_size
        runtime = Runtime(path)
        answer = runtime.answer([{"role": "user", "content": "Say hello."}], 100)
        assert answer.text and answer.stopped
        runtime.close()
        assert f"FROM ./{path.name}" in Path(made.layout.domain_modelfile(CATEGORY, NAME, quant)).read_text()
    assert 100e6 < sizes["Q4_K_M"] < 110e6 < sizes["Q8_0"]
    assert made.gguf.is_file(), "the adapter made before is still there"


def test_a_base_in_four_bits_from_training_to_merged_gguf(
    first: tuple[Root, int, str], root: Callable[[str], Root]
) -> None:
    """QLoRA as it is: the base in NF4, AdamW8bit, bitsandbytes' own code on the CPU."""
    from meetara_nb.gguf_factory.runtime import Runtime

    made = with_base(root("nf4"), first[0])
    options = ("--form", "merged", "--set", "train.base_precision=nf4", "--set", "train.optimizer=adamw8bit")
    status, text = made.run(options=options)
    assert status == 0, text
    assert "fp32, base in NF4 (no CUDA GPU is visible; base in NF4: asked for" in text
    content = load_trained_model(made.trained)
    assert content["plan"]["device"] == "cpu fp32 nf4" and len(content["losses"]) == 6
    state = content["trunk"]["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    runtime = Runtime(Path(made.layout.domain_gguf(CATEGORY, NAME, "Q4_K_M", merged=True)))
    assert runtime.answer([{"role": "user", "content": "Say hello."}], 100).text
    runtime.close()


def test_a_model_folder_of_the_users_own_is_trained(
    root: Callable[[str], Root], tiny_base: Path, tmp_path: Path
) -> None:
    """A base outside the registry: GGUF files are not made of it yet, which is said before anything begins."""
    folder = tmp_path / "my model"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    made = root("own")
    status, text = made.run(options=("--base", str(folder)))
    assert status == 2 and "comes as safetensors, from which this version makes no GGUF files yet" in text
    status, text = made.run(options=("--base", str(folder), "--until", "train"))
    assert status == 0, text
    content = load_trained_model(made.trained)
    assert content["base"] == "my-model" and len(content["losses"]) == 6
