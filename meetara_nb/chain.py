"""Runs the stage notebooks one after another with papermill, once each for all domains of a batch."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import environment
from .errors import MeetaraError, nearest
from .lab import Lab
from .layout import NOTEBOOKS
from .runlog import duration, size, table
from .stages import STAGES, Stage
from .store import write_json

SETUP = "00_setup"


def run(lab: Lab, *, batch_size: int = 0, until: str = "") -> dict[str, str]:
    """Brings every domain through every stage, doing only what is missing.

    Args:
        lab: What to do. Its roots, disk and base are checked first.
        batch_size: Domains that go through all stages before the next ones begin; 0 for all at once.
        until: The last stage to do; empty for all.

    Returns:
        Domain -> why it failed. Empty when all is done.

    Raises:
        MeetaraError: Nothing was begun, and why.
    """
    stages = list(STAGES.values())
    if until:
        if until not in STAGES:
            raise MeetaraError(f"{until!r} is no stage", where="until", remedy=nearest(until, STAGES))
        stages = stages[: list(STAGES).index(until) + 1]
    lab.check()
    if any(stage.name == "gguf" for stage in stages):  # known before hours of training, not after
        from .training.bases import gguf_file

        gguf_file(lab.base)
    names = [domain.domain for domain in lab.domains]
    if not any(lab.pending(stage) for stage in stages):
        lab.log.say("Everything is done and unchanged: nothing to do.")
        return {}
    started = time.monotonic()
    folder = Path(lab.layout.runs) / lab.log.run_id
    resolved = {name: params.model_dump(mode="json") for name, params in lab.params.items()}
    write_json(folder / "params.json", {"domains": names, **vars(lab.asked), "resolved": resolved})
    lab.log.event("run started", domains=names, **vars(lab.asked))
    lab.log.say(f"run {lab.log.run_id}: {', '.join(names)}; notebooks and events in {folder}")
    failed: dict[str, str] = {}
    with environment.kernel_environment():
        for batch in _batches(names, batch_size):
            if until != "data":  # composing needs no base
                _execute(lab, SETUP, batch, folder)
            for stage in stages:
                left = [name for name in batch if name not in failed]
                todo = [d.domain for d in lab.pending(stage) if d.domain in left]
                if not todo:
                    continue
                failed |= _stage(lab, stage, todo, folder)
    seconds = time.monotonic() - started
    lab.log.stage = ""
    lab.log.event("run ended", seconds=round(seconds, 1), failed=failed)
    lab.log.say(f"run {lab.log.run_id} took {duration(seconds)}")
    return failed


def _batches(names: list[str], count: int) -> Iterator[list[str]]:
    count = count or len(names)
    return (names[i : i + count] for i in range(0, len(names), count))


def _stage(lab: Lab, stage: Stage, domains: list[str], folder: Path) -> dict[str, str]:
    """Executes a stage's notebook; returns the domains that failed, and why."""
    broken = ""
    try:
        _execute(lab, stage.notebook, domains, folder)
    except MeetaraError as error:
        broken = str(error)
    failed = {
        event["domain"]: event["error"]
        for event in lab.log.events()
        if event["event"] == "failed" and event["stage"] == stage.name and event["domain"] in domains
    }
    # What the notebook says of itself is not trusted: a domain is done when its manifest says so.
    for domain in lab.pending(stage):
        if domain.domain in domains and domain.domain not in failed:
            failed[domain.domain] = broken or f"{stage.notebook} ended without doing it"
            lab.log.event("failed", domain=domain.domain, error=failed[domain.domain])
    return failed


def _execute(lab: Lab, notebook: str, domains: list[str], folder: Path) -> None:
    """Runs one notebook in a kernel of its own; its output goes to the console as it comes.

    Raises:
        MeetaraError: A cell failed, the kernel died, or a cell took too long.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    source = NOTEBOOKS / f"{notebook}.ipynb"
    wanted = parameters_of(lab, domains)
    known = papermill.inspect_notebook(str(source))
    if unknown := wanted.keys() - known.keys():
        raise MeetaraError(f"the notebook takes no parameter {sorted(unknown)[0]!r}", where=source)
    lab.log.say(f"--- {notebook}")
    started = time.monotonic()
    target = folder / f"{notebook}.ipynb"
    number = 2
    while target.exists():  # an earlier batch's
        target = folder / f"{notebook}_{number}.ipynb"
        number += 1
    sockets = tempfile.TemporaryDirectory(prefix="meetara-")
    config = Config()
    if os.name != "nt":
        # Sockets of our own instead of open TCP ports: other users of the machine cannot listen in. Their default names
        # are the same for every kernel of a folder, so that two runs would hear each other.
        config = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets.name) / "kernel")}})
    try:
        papermill.execute_notebook(
            _escaped(source), _escaped(target), parameters=wanted, cwd=str(NOTEBOOKS), kernel_name="python3",
            progress_bar=False, log_output=False, stdout_file=_Console(sys.stdout), stderr_file=_Console(None),
            autosave_cell_every=0, config=config,
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise MeetaraError(f"{error.ename}: {error.evalue}".splitlines()[0], where=target) from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise MeetaraError(
            f"the kernel died or hung ({type(error).__name__})",
            where=target,
            remedy="run again: what is done stays done, training goes on from its last checkpoint",
        ) from None
    finally:
        sockets.cleanup()
        lab.log.event("notebook", notebook=notebook, seconds=round(time.monotonic() - started, 1))


def parameters_of(lab: Lab, domains: list[str]) -> dict[str, Any]:
    """What every stage notebook is given."""
    return {
        "domains": domains,
        **vars(lab.asked),
        "data_root": str(lab.layout.data_root),
        "models_root": str(lab.layout.models_root),
        "run_id": lab.log.run_id,
    }


def _escaped(path: Path) -> str:
    """papermill passes paths through `str.format`."""
    return str(path).replace("{", "{{").replace("}", "}}")


class _Console:
    """A stream for papermill; None swallows what is written (it stays in the executed notebook)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(BrokenPipeError):
                self._stream.write(text)
                self._stream.flush()

    def flush(self) -> None:
        pass


def summary(lab: Lab, failed: dict[str, str]) -> str:
    """What every domain got, as tables, with the answers to held-out questions."""
    rows, times, answers = [], [], []
    for domain in lab.domains:
        manifests = {name: lab.manifest(stage, domain) for name, stage in STAGES.items()}
        facts = {name: manifest["facts"] for name, manifest in manifests.items() if manifest}
        times.append([domain.domain, *(duration(facts[n]["seconds"]) if n in facts else "-" for n in STAGES)])
        if domain.domain in failed or "evaluate" not in facts:
            rows.append([domain.domain, "FAILED" if domain.domain in failed else "not done", *[""] * 8])
            continue
        trained = manifests["train"]
        assert trained is not None
        (trained_file,) = trained["outputs"].values()
        for entry in facts["gguf"]["files"]:
            name = f"{entry['form']} {entry['quant']}"
            scores = facts["evaluate"]["headline"][name]
            before, after = scores["bits_per_byte"]
            rows.append(
                [
                    domain.domain,
                    name,
                    f"{facts['data']['kept']:,}",
                    facts["train"]["steps"],
                    f"{facts['train']['tokens']:,}",
                    size(trained_file["bytes"]),
                    f"{size(entry['bytes'])} ({'within' if entry['within_budget'] else 'OVER'} "
                    f"{entry['budget_bytes'] / 1e6:g} MB)",
                    f"{before:.3f} -> {after:.3f} ({after / before - 1:+.0%})",
                    f"{scores['recall'][0]:.0%} -> {scores['recall'][1]:.0%}",
                    f"{scores['tokens_per_s']}",
                ]
            )
        for answer in facts["evaluate"]["answers"]:
            answers.append(f"  Q: {answer['question']}\n  A: {answer['text']}{'' if answer['stopped'] else ' [cut]'}")
    heads = ["domain", "file", "samples", "steps", "tokens", ".pt", "GGUF (budget)", "bits per byte", "recall", "tok/s"]
    text = table(rows, heads) + "\n\nTime per stage\n" + table(times, ["domain", *STAGES])
    if answers:
        text += "\n\nHeld-out questions, answered by the shipped file\n" + "\n\n".join(answers)
    for name, error in failed.items():
        text += f"\n\n{name} failed: {error}"
    return text


def data_summary(lab: Lab) -> str:
    """What became of every domain's drafts, as a table."""
    rows = []
    for domain in lab.domains:
        manifest = lab.manifest(STAGES["data"], domain)
        if manifest is None:
            rows.append([domain.domain, "not done", *[""] * 6])
            continue
        facts = manifest["facts"]
        counts = [facts["kept"], facts["generated"], facts["near_duplicates"], facts["contaminated"]]
        counts.append(sum(facts["dropped"].values()))
        used = f"{facts['statements_used']} of {facts['statements']}"
        rows.append([domain.domain, *(f"{count:,}" for count in counts), used, duration(facts["seconds"])])
    heads = ["domain", "samples", "composed", "near-duplicates", "overlap", "filtered", "statements used", "time"]
    return table(rows, heads)


def files_of(lab: Lab) -> Iterator[Path]:
    """Where the finished models are."""
    for domain in lab.domains:
        if manifest := lab.manifest(STAGES["gguf"], domain):
            for ref in manifest["outputs"]:
                yield lab.manifests.path_of(ref)
