"""A run: its parameters, folders and domains; what of it is done, and how a stage is done for a domain."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import layout as names
from . import params as parameters
from .catalogue import Catalogue, Domain
from .errors import Fault, MeetaraError, nearest
from .layout import Layout
from .params import Base, RunParams
from .runlog import CollectedLog, RunLog, duration, new_run_id, size, table
from .stages import RUN_BASE, STAGES, Stage
from .store import Manifests, check_space, check_writable, digest_of, locked, read_json, write_json

if TYPE_CHECKING:
    from .training.adapted import WarmBase

BASE_VERSION = 1
# For the base's stop test.
BASE_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Outcome:
    """How a stage ended for a domain: `done`, `skipped` (was done and unchanged) or `failed`."""

    domain: str
    state: str
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Asked:
    """Tier, base and overrides as the user gave them; what they come to depends on the domain."""

    tier: str = ""
    base: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lab:
    """A run's domains, their parameters, its folders, and what can be done with them. Notebooks and the chain use it.

    Make one with `Lab.open`.
    """

    layout: Layout
    asked: Asked
    params: dict[str, RunParams]
    domains: list[Domain]
    log: RunLog
    manifests: Manifests
    _warm: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        domains: Sequence[str] = ("general_health",),
        tier: str = "",
        base: str = "",
        overrides: dict[str, Any] | None = None,
        data_root: str = "",
        models_root: str = "",
        run_id: str = "",
        *,
        catalogue: Catalogue | None = None,
    ) -> Lab:
        """Resolves and checks everything that a run is told; touches no file.

        Args:
            domains: Names of domains.
            tier: A name from `params/tiers.yaml`; empty for its default.
            base: A name from `params/bases.yaml`; empty for the scope's.
            overrides: `section.name` -> value, over the tier's.
            data_root, models_root: Folders; empty for `$MEETARA_DATA_ROOT` and `$MEETARA_MODELS_ROOT`, or `data` and
                `models` in the project.
            run_id: The run's folder under `data/logs/runs`; empty for a new one.
            catalogue: Where the specs are; the project's when None.

        Raises:
            MeetaraError: Every fault of the parameters and of the domains' specs at once.
        """
        catalogue = catalogue or Catalogue()
        asked = Asked(tier, base, dict(overrides or {}))
        faults: list[Fault] = []
        selected: list[Domain] = []
        try:
            selected = catalogue.select(domains)
        except MeetaraError as error:
            faults += error.faults
        resolved = {}
        # Wrong parameters are reported even where no domain could be read.
        wanted: list[tuple[str, str]] = [(domain.domain, domain.category) for domain in selected]
        for name, category in wanted or [("", "")]:
            try:
                resolved[name] = parameters.resolve(tier, base, overrides, domain=name, category=category)
            except MeetaraError as error:
                faults += error.faults
        for key in asked.overrides:
            whose = key.split(".")[0]
            if key.count(".") == 2 and whose not in catalogue.files:
                faults.append(Fault(f"{whose!r} is no domain", key, nearest(whose, catalogue.files)))
        if faults:
            raise MeetaraError.of(dict.fromkeys(faults))
        roots = layout_of(data_root, models_root)
        run_id = run_id or new_run_id()
        return cls(roots, asked, resolved, selected, RunLog(Path(roots.run(run_id)), run_id), Manifests(roots))

    def params_of(self, domain: Domain) -> RunParams:
        return self.params[domain.domain]

    @property
    def base_name(self) -> str:
        """The base's name in the registry, or the folder's or file's name as a file name can hold it."""
        given = next(iter(self.params.values())).base
        return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(given).stem) if parameters.is_path(given) else given

    @cached_property
    def base(self) -> Base:
        given = next(iter(self.params.values())).base
        if not parameters.is_path(given):
            return parameters.bases()[given]
        from .training.local import local

        return local(Path(given).expanduser())

    @property
    def prepared_base(self) -> Path:
        """The base as a transformers folder; made where it is missing."""
        from .training.bases import prepare

        work = Path(self.layout.base_work(self.base_name))
        with locked(Path(self.layout.lock("base", "prepare")), self.log.run_id, self.log.say):
            return prepare(self.base, work / "transformers", self.log.say)

    def warm_base(self, domain: Domain) -> WarmBase:
        """The base in memory, as this domain's training wants it; loaded once for all that want it alike."""
        from . import device
        from .training.adapted import WarmBase

        train = self.params_of(domain).train
        if self._warm and self._warm[0] == (train.precision, train.base_precision):
            return self._warm[1]
        self._warm = None  # two do not fit
        where = device.for_base(device.detect(train.precision), self.base.parameters, train.base_precision)
        base = WarmBase(self.prepared_base, where)
        self._warm = (train.precision, train.base_precision), base
        return base

    def minutes_for(self, domain: Domain) -> float | None:
        """Wall clock for a domain's training, from its own budget and what is left of the run's; None for no limit."""
        from . import device

        train = self.params_of(domain).train
        if train.max_steps:
            return None
        budgets = [train.max_minutes] if train.max_minutes else []
        if train.run_minutes:
            ended = [e for e in self.log.events() if e["stage"] == "train" and e["event"] in ("done", "failed")]
            spent = sum(event.get("seconds", 0.0) for event in ended)
            told = read_json(Path(self.layout.run(self.log.run_id)) / "params.json") or {}
            everyone = told.get("domains", [d.domain for d in self.domains])
            left = max(1, len(set(everyone) - {event["domain"] for event in ended}))
            budgets.append(max(0.1, (train.run_minutes * 60 - spent) / left / 60))
        if not budgets and device.detect(train.precision).kind == "cpu":
            budgets.append(device.CPU_MINUTES)
        return min(budgets, default=None)

    # What is done

    def key(self, stage: Stage, domain: Domain) -> str | None:
        """Hash of all that decides the stage's output; None where a stage before it is not done."""
        inputs: dict[str, Any] = {"spec": domain.digest(), "base": [self.base_name, self.base.identity]}
        for name in stage.after:
            before = self.manifest(STAGES[name], domain)
            if before is None:
                return None
            inputs[name] = {ref: entry["sha256"] for ref, entry in before["outputs"].items()}
        return digest_of([stage.name, stage.version, self.params_of(domain).digest(*stage.sections), inputs])

    def manifest(self, stage: Stage, domain: Domain) -> dict[str, Any] | None:
        """The stage's manifest if it is done for these parameters and its files are untouched."""
        key = self.key(stage, domain)
        return self.manifests.current(stage.name, domain.category, domain.domain, key) if key else None

    def pending(self, stage: Stage) -> list[Domain]:
        return [domain for domain in self.domains if self.manifest(stage, domain) is None]

    # Before a run

    def check(self) -> None:
        """Raises MeetaraError where the run cannot work: roots, disk, or a damaged base. Changes no file."""
        from .training import bases

        faults: list[Fault] = []
        data, models = Path(self.layout.data_root), Path(self.layout.models_root)
        damaged = self.manifests.damaged("base", "base", self.base_name)
        steps: list[Callable[[], Any]] = [
            lambda: check_writable(data, "data"),
            lambda: check_writable(models, "models"),
            lambda: check_writable(Path(self.layout.work_root), "work"),
            lambda: bases.check(self.base),
            lambda: check_space(zip(("data", "models"), (data, models), self.needed_bytes(), strict=True)),
        ]
        for step in steps:
            try:
                step()
            except MeetaraError as error:
                faults += error.faults
        for path in damaged:
            remedy = "remove it and run again: it is made anew from the base's source"
            faults.append(Fault("the base file is damaged: its content is not what was published", str(path), remedy))
        if faults:
            raise MeetaraError.of(faults)

    def needed_bytes(self) -> tuple[int, int]:
        """Disk that the run may take at most for what is not there yet: under the data root, under the models root."""
        weights = self.base.parameters
        data = models = largest = 0
        if not Path(self.layout.base_work(self.base_name)).exists():
            data += 4 * weights
        if self.manifests.read("base", "base", self.base_name) is None:
            data += 3 * weights  # made in the work folder, then moved
            models += 3 * weights
        todo = {d.domain: self.params_of(d).gguf for stage in STAGES.values() for d in self.pending(stage)}
        for gguf in todo.values():
            merged = "merged" in gguf.forms
            # Checkpoints and partial files of the one being worked on.
            largest = max(largest, 300_000_000 + (4 * weights if merged else 0))
            models += (20_000_000 + (weights if merged else 0)) * len(gguf.quants)
        data += 110_000_000 * len(todo) + largest
        return data, models

    # Doing it

    def run(self, name: str) -> list[Outcome]:
        """Runs a stage for every domain; one that fails is recorded and does not stop the others."""
        stage = STAGES[name]
        self.log.stage = name
        workers = min(os.cpu_count() or 1, len(self.pending(stage))) if stage.light(self) else 1
        if workers > 1:
            return self._run_together(stage, workers)
        return [self._run_one(stage, domain) for domain in self.domains]

    def _run_together(self, stage: Stage, workers: int) -> list[Outcome]:
        """Runs a stage that needs no model in several processes, a domain each."""
        started, outcomes = time.monotonic(), dict[str, Outcome]()
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = []
            for domain in self.domains:
                log = CollectedLog(self.log.folder, self.log.run_id, stage=stage.name)
                # A process gets the one spec that it needs.
                part = replace(self, domains=[domain], params={domain.domain: self.params_of(domain)}, log=log)
                futures.append(pool.submit(_run_apart, part, stage.name))
            for done, future in enumerate(as_completed(futures), 1):
                outcome, lines = future.result()
                outcomes[outcome.domain] = outcome
                left = (time.monotonic() - started) / done * (len(futures) - done)
                self.log.say("\n".join(lines))
                if done < len(futures):
                    self.log.say(f"  {done} of {len(futures)} domains, {duration(left)} left")
        return [outcomes[domain.domain] for domain in self.domains]

    def _run_one(self, stage: Stage, domain: Domain) -> Outcome:
        started = time.monotonic()
        try:
            lock = Path(self.layout.lock(domain.category, domain.domain))
            with locked(lock, f"run {self.log.run_id}", self.log.say):
                key = self.key(stage, domain)
                if key is None:
                    missing = next(n for n in stage.after if self.manifest(STAGES[n], domain) is None)
                    raise MeetaraError(
                        f"what the stage {missing!r} makes is missing or stale",
                        remedy=f"run {STAGES[missing].notebook} first, with the same parameters",
                    )
                if done := self.manifest(stage, domain):
                    self.log.event("skipped", domain=domain.domain)
                    self.log.say(f"{domain.domain}: {stage.makes} is done and unchanged")
                    return Outcome(domain.domain, "skipped", done["facts"])
                self.log.event("started", domain=domain.domain)
                self.log.say(f"{domain.domain}: {stage.makes}")
                work = self._work(stage, domain, key)
                product = stage.make(self, domain, work)
                seconds = round(time.monotonic() - started, 1)
                facts = {**product.facts, "seconds": seconds, "params": self.params_of(domain).model_dump(mode="json")}
                manifest = self.manifests.publish(
                    stage.name, domain.category, domain.domain, key=key, files=product.files, facts=facts,
                    say=self.log.say,
                )  # fmt: skip
                shutil.rmtree(work)
        except MeetaraError as error:
            return self._failed(domain, str(error), started)
        except Exception as error:
            self.log.event("traceback", domain=domain.domain, traceback=traceback.format_exc())
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            told = f"unexpected {reason} -> the traceback is in {self.log.folder}/events.jsonl"
            return self._failed(domain, told, started)
        sizes = {ref.rpartition("/")[2]: entry["bytes"] for ref, entry in manifest["outputs"].items()}
        self.log.event("done", domain=domain.domain, seconds=facts["seconds"], outputs_bytes=sizes)
        made = ", ".join(f"{name} ({size(count)})" for name, count in sizes.items())
        self.log.say(f"{domain.domain}: {made} in {duration(facts['seconds'])}")
        return Outcome(domain.domain, "done", facts)

    def _failed(self, domain: Domain, error: str, started: float) -> Outcome:
        self.log.event("failed", domain=domain.domain, error=error, seconds=round(time.monotonic() - started, 1))
        self.log.say(f"{domain.domain}: FAILED: {error}")
        return Outcome(domain.domain, "failed", error=error)

    def _work(self, stage: Stage, domain: Domain, key: str) -> Path:
        """The folder for unfinished work; emptied when what is to be made has changed."""
        work = Path(self.layout.domain_work(domain.category, domain.domain)) / stage.name
        if read_json(work / "key.json") != key:
            shutil.rmtree(work, ignore_errors=True)
            write_json(work / "key.json", key)
        return work

    def gguf_base(self) -> dict[str, Any]:
        """The manifest of the base's GGUF files; makes them where they are missing."""
        from .gguf_factory.factory import Gate, make_base
        from .training.bases import checked_source

        name = self.base_name
        with locked(Path(self.layout.lock("base", "gguf")), f"run {self.log.run_id}", self.log.say):
            wanted = ["F16", RUN_BASE]
            key = digest_of(["base", BASE_VERSION, self.base.identity, wanted])
            if done := self.manifests.current("base", "base", name, key):
                return done
            self.log.say(f"{name}: base as GGUF ({', '.join(wanted)}): about half a minute, once")
            gate = Gate(self.prepared_base, BASE_PROMPT, lambda file: Path(self.layout.rejected(file)))
            work = Path(self.layout.base_work(name)) / "gguf"
            made = make_base(self.base, checked_source(self.base), work, wanted, gate, name)
            manifest = self.manifests.publish(
                "base", "base", name, key=key, say=self.log.say,
                files={m.path: Path(self.layout.base(name, quant)) for quant, m in made.items()},
                facts={
                    "quants": wanted,
                    "weights_sha256": made["F16"].facts["weights_sha256"],
                    "files": [m.facts for m in made.values()],
                },
            )  # fmt: skip
            self.log.event("base", base=name, quants=wanted)
            return manifest

    def manifests_of(self, domain: Domain, *stages: str) -> dict[str, dict[str, Any]]:
        """The manifests of finished stages, by name.

        Raises:
            MeetaraError: One of them is not done.
        """
        found = {}
        for name in stages:
            manifest = self.manifest(STAGES[name], domain)
            if manifest is None:
                raise MeetaraError(f"the stage {name!r} is not done", remedy=f"run {STAGES[name].notebook} first")
            found[name] = manifest
        return found

    def outcomes(self, outcomes: Sequence[Outcome]) -> str:
        """A stage's outcomes as a table."""
        rows = [
            [o.domain, o.state, duration(o.facts["seconds"]) if "seconds" in o.facts else "", o.error] for o in outcomes
        ]
        return table(rows, ["domain", "state", "time", "error"])


def _run_apart(lab: Lab, stage: str) -> tuple[Outcome, list[str]]:
    """A stage for the one domain of `lab`, and what was said; in a process of its own."""
    (domain,) = lab.domains
    outcome = lab._run_one(STAGES[stage], domain)
    assert isinstance(lab.log, CollectedLog)
    return outcome, lab.log.lines


def layout_of(data_root: str = "", models_root: str = "") -> Layout:
    """The layout for these roots, or for those of the environment, or for the project's own folders."""
    data = Path(data_root or os.environ.get("MEETARA_DATA_ROOT") or names.PROJECT / "data").expanduser().absolute()
    models = models_root or os.environ.get("MEETARA_MODELS_ROOT") or names.PROJECT / "models"
    work = os.environ.get("MEETARA_WORK_ROOT") or data / ".work"
    return Layout(data, Path(models).expanduser().absolute(), Path(work).expanduser().absolute())
