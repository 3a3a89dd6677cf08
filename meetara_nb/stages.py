"""The stages of a run: what each takes, makes and depends on, and when it is done."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import layout as names
from . import params as parameters
from .catalogue import Catalogue, Domain
from .errors import Fault, MeetaraError
from .layout import Layout
from .params import Base, RunParams
from .runlog import RunLog, duration, new_run_id, size, table
from .store import Manifests, check_space, check_writable, digest_of, locked, read_json, sha256_of, write_json


@dataclass(frozen=True)
class Product:
    """What a stage made for a domain: partial file -> final name, and what it measured."""

    files: dict[Path, Path]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of the data flow.

    Attributes:
        name: Also the manifest's.
        notebook: The notebook that runs it.
        version: Raised by hand when the stage's output changes, so that what older code made is made again.
        sections: The sections of the params that it depends on.
        after: The stages whose output it reads.
        makes: For people.
        make: (lab, domain, work folder) -> Product.
    """

    name: str
    notebook: str
    version: int
    sections: tuple[str, ...]
    after: tuple[str, ...]
    makes: str
    make: Callable[[Lab, Domain, Path], Product]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended for a domain: `done`, `skipped` (was done and unchanged) or `failed`."""

    domain: str
    state: str
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass
class Lab:
    """A run's parameters, folders and domains, and what can be done with them. Notebooks and the chain use it.

    Make one with `Lab.open`.
    """

    layout: Layout
    params: RunParams
    domains: list[Domain]
    log: RunLog
    manifests: Manifests

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
        faults: list[Fault] = []
        selected: list[Domain] = []
        params = None
        try:
            params = parameters.resolve(tier, base, overrides)
        except MeetaraError as error:
            faults += error.faults
        try:
            selected = (catalogue or Catalogue()).select(domains)
        except MeetaraError as error:
            faults += error.faults
        if faults or params is None:
            raise MeetaraError.of(faults)
        roots = layout_of(data_root, models_root)
        run_id = run_id or new_run_id()
        return cls(roots, params, selected, RunLog(Path(roots.run(run_id)), run_id), Manifests(roots))

    @property
    def base(self) -> Base:
        return parameters.bases()[self.params.base]

    @property
    def prepared_base(self) -> Path:
        """The base as a transformers folder; made where it is missing."""
        from .training.bases import prepare

        work = Path(self.layout.base_work(self.params.base))
        with locked(Path(self.layout.lock("base", "prepare")), self.log.run_id, self.log.say):
            return prepare(self.base, work / "transformers", self.log.say)

    # What is done

    def key(self, stage: Stage, domain: Domain) -> str | None:
        """Hash of all that decides the stage's output; None where a stage before it is not done."""
        inputs: dict[str, Any] = {"spec": domain.digest(), "base": [self.params.base, self.base.source.sha256]}
        for name in stage.after:
            before = self.manifest(STAGES[name], domain)
            if before is None:
                return None
            inputs[name] = {ref: entry["sha256"] for ref, entry in before["outputs"].items()}
        return digest_of([stage.name, stage.version, self.params.digest(*stage.sections), inputs])

    def manifest(self, stage: Stage, domain: Domain) -> dict[str, Any] | None:
        """The stage's manifest if it is done for these parameters and its files are untouched."""
        key = self.key(stage, domain)
        return self.manifests.current(stage.name, domain.category, domain.domain, key) if key else None

    def pending(self, stage: Stage) -> list[Domain]:
        return [domain for domain in self.domains if self.manifest(stage, domain) is None]

    # Before a run

    def check(self) -> None:
        """Raises MeetaraError where the run cannot work: roots, disk, or a damaged base. Changes no file."""
        from .training.bases import checked_source

        faults: list[Fault] = []
        data, models = Path(self.layout.data_root), Path(self.layout.models_root)
        damaged = self.manifests.damaged("base", "base", self.params.base)
        steps: list[Callable[[], Any]] = [
            lambda: check_writable(data, "data"),
            lambda: check_writable(models, "models"),
            lambda: check_writable(Path(self.layout.work_root), "work"),
            lambda: checked_source(self.base),
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
        weights, merged = self.base.parameters, "merged" in self.params.gguf.forms
        data = models = 0
        if not Path(self.layout.base_work(self.params.base)).exists():
            data += 4 * weights
        if self.manifests.read("base", "base", self.params.base) is None:
            data += 3 * weights  # made in the work folder, then moved
            models += 3 * weights
        todo = {d.domain for stage in STAGES.values() for d in self.pending(stage)}
        if todo:  # checkpoints and partial files of the one being worked on
            data += 300_000_000 + (4 * weights if merged else 0)
        data += 110_000_000 * len(todo)
        models += (20_000_000 + (weights if merged else 0)) * len(self.params.gguf.quants) * len(todo)
        return data, models

    # Doing it

    def run(self, name: str) -> list[Outcome]:
        """Runs a stage for every domain; one that fails is recorded and does not stop the others."""
        stage = STAGES[name]
        self.log.stage = name
        return [self._run_one(stage, domain) for domain in self.domains]

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
                facts = {**product.facts, "seconds": seconds, "params": self.params.model_dump(mode="json")}
                manifest = self.manifests.publish(
                    stage.name, domain.category, domain.domain, key=key, files=product.files, facts=facts,
                    say=self.log.say,
                )  # fmt: skip
                shutil.rmtree(work)
        except MeetaraError as error:
            return self._failed(domain, str(error))
        except Exception as error:
            self.log.event("traceback", domain=domain.domain, traceback=traceback.format_exc())
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return self._failed(domain, f"unexpected {reason} -> the traceback is in {self.log.folder}/events.jsonl")
        sizes = {ref.rpartition("/")[2]: entry["bytes"] for ref, entry in manifest["outputs"].items()}
        self.log.event("done", domain=domain.domain, seconds=facts["seconds"], outputs_bytes=sizes)
        made = ", ".join(f"{name} ({size(count)})" for name, count in sizes.items())
        self.log.say(f"{domain.domain}: {made} in {duration(facts['seconds'])}")
        return Outcome(domain.domain, "done", facts)

    def _failed(self, domain: Domain, error: str) -> Outcome:
        self.log.event("failed", domain=domain.domain, error=error)
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

        name = self.params.base
        with locked(Path(self.layout.lock("base", "gguf")), f"run {self.log.run_id}", self.log.say):
            wanted = ["F16", RUN_BASE]
            key = digest_of(["base", BASE_VERSION, self.base.source.sha256, wanted])
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


BASE_VERSION = 1
# For the base's stop test.
BASE_PROMPT = "You are a helpful assistant."
# The level of the base on which adapters are tried and evaluated, whatever their own level.
RUN_BASE = "Q4_K_M"


def layout_of(data_root: str = "", models_root: str = "") -> Layout:
    """The layout for these roots, or for those of the environment, or for the project's own folders."""
    data = Path(data_root or os.environ.get("MEETARA_DATA_ROOT") or names.PROJECT / "data").expanduser().absolute()
    models = models_root or os.environ.get("MEETARA_MODELS_ROOT") or names.PROJECT / "models"
    work = os.environ.get("MEETARA_WORK_ROOT") or data / ".work"
    return Layout(data, Path(models).expanduser().absolute(), Path(work).expanduser().absolute())


# The work of each stage


def _make_data(lab: Lab, domain: Domain, work: Path) -> Product:
    from .hub.dataset import compose, to_json

    data = compose(domain, lab.params.data)
    path = work / "training_data.json"
    path.write_text(to_json(domain, lab.params.data, data), encoding="utf-8", newline="\n")
    funnel = data.funnel
    lab.log.say(
        f"  {funnel.kept:,} of {funnel.requested:,} samples kept of {funnel.generated:,} composed; "
        f"{funnel.near_duplicates:,} near-duplicates, {funnel.contaminated:,} overlap with the checks, "
        f"{sum(funnel.dropped.values()):,} filtered out"
    )
    return Product({path: Path(lab.layout.training_data(domain.category, domain.domain))}, funnel.as_dict())


def _make_trained(lab: Lab, domain: Domain, work: Path) -> Product:
    from .training.engine import train

    data = Path(lab.layout.training_data(domain.category, domain.domain))
    trained = train(
        name=domain.domain,
        category=domain.category,
        base_name=lab.params.base,
        base=lab.base,
        prepared=lab.prepared_base,
        data=data,
        data_sha256=sha256_of(data),
        params=lab.params.train,
        work=work,
        log=lab.log,
    )
    return Product({trained.path: Path(lab.layout.trained_model(domain.category, domain.domain))}, trained.facts)


def _make_gguf(lab: Lab, domain: Domain, work: Path) -> Product:
    from importlib.metadata import version

    from .gguf_factory.factory import Gate, make_adapter, make_merged
    from .metadata import gguf_header, modelfile
    from .training.bases import load_tokenizer
    from .training.checkpoint import load_trained_model

    quants = lab.params.gguf.quants
    based = lab.gguf_base()
    base_file = Path(lab.layout.base(lab.params.base, RUN_BASE))
    trained = load_trained_model(Path(lab.layout.trained_model(domain.category, domain.domain)))
    gate = Gate(lab.prepared_base, domain.system_prompt, lambda file: Path(lab.layout.rejected(file)))
    manifests = lab.manifests_of(domain, "data", "train")

    def header(quant: str, merged: bool) -> dict[str, str | int | float]:
        weights = based["facts"]["weights_sha256"]
        return gguf_header(
            domain, lab.params.base, lab.base, base_weights=weights, manifests=manifests, quant=quant, merged=merged
        )

    files: dict[Path, Path] = {}
    facts = []
    for form in lab.params.gguf.forms:
        final = {
            quant: Path(lab.layout.domain_gguf(domain.category, domain.domain, quant, merged=form == "merged"))
            for quant in quants
        }
        if form == "adapter":
            made = {
                quant: make_adapter(
                    trained, lab.base, base_file, quant, header(quant, False), work, gate, final[quant].name
                )
                for quant in quants
            }
        else:
            base_f16 = Path(lab.layout.base(lab.params.base, "F16"))
            finals = {quant: path.name for quant, path in final.items()}
            made = make_merged(trained, lab.base, base_f16, quants, header("", True), work, gate, finals)
            template = load_tokenizer(gate.prepared).chat_template
            for quant in quants:
                recipe = work / f"{quant}.Modelfile"
                recipe.write_text(modelfile(final[quant].name, template, domain.system_prompt), encoding="utf-8")
                files[recipe] = Path(lab.layout.domain_modelfile(domain.category, domain.domain, quant))
        scope = parameters.scopes()["domain" if form == "adapter" else "domain_merged"]
        for quant in quants:
            files[made[quant].path] = final[quant]
            entry = made[quant].facts
            entry["budget_bytes"] = int(scope.gguf_mb * 1e6)
            entry["within_budget"] = scope.fits(entry["bytes"])
            facts.append(entry)
            verdict = "within" if entry["within_budget"] else "OVER"
            lab.log.say(f"  {final[quant].name}: {size(entry['bytes'])}, {verdict} the budget of {scope.gguf_mb} MB")
            for check in entry["checks"]:
                lab.log.event("check", domain=domain.domain, file=final[quant].name, **check)
    versions = {name: version(name) for name in ("llama-cpp-python", "gguf")}
    return Product(files, {"files": facts, "versions": versions | trained["versions"]})


def _make_evaluation(lab: Lab, domain: Domain, work: Path) -> Product:
    from .evaluation import evaluate
    from .gguf_factory.adapter import lora_pairs, write_adapter
    from .training.checkpoint import load_trained_model

    base_file = Path(lab.layout.base(lab.params.base, RUN_BASE))
    f16 = work / "adapter_F16.gguf"
    if "adapter" in lab.params.gguf.forms:
        trained = load_trained_model(Path(lab.layout.trained_model(domain.category, domain.domain)))
        pairs = lora_pairs(trained["adapter"], lab.base.shape)
        write_adapter(f16, lab.base.shape, pairs, level="F16", alpha=trained["lora"]["alpha"], header={})
    results: dict[str, Any] = {}
    for entry in lab.manifests_of(domain, "gguf")["gguf"]["facts"]["files"]:
        lab.log.say(f"  {len(domain.checks)} checks, base and {entry['form']} {entry['quant']}: about a minute")
        form, quant = entry["form"], entry["quant"]
        merged = form == "merged"
        file = Path(lab.layout.domain_gguf(domain.category, domain.domain, quant, merged=merged))
        result = evaluate(
            domain,
            base=base_file,
            adapter=None if merged else file,
            adapter_f16=None if merged else f16,
            merged=file if merged else None,
            answers=lab.params.evaluate.answers,
            max_answer_tokens=lab.params.evaluate.max_answer_tokens,
        )
        results[f"{form} {quant}"] = {"file": file.name, "sha256": entry["sha256"], **result}
        lab.log.say(
            f"  {form} {quant}: bits per byte {result['base']['bits_per_byte']:.3f} -> "
            f"{result['tuned']['bits_per_byte']:.3f}, recall {result['base']['recall']:.0%} -> "
            f"{result['tuned']['recall']:.0%} of {len(domain.checks)} checks, {result['tokens_per_s']} tokens/s"
        )
    f16.unlink(missing_ok=True)
    path = work / "evaluation.json"
    write_json(path, {"domain": domain.domain, "checks": len(domain.checks), "files": results})
    headline = {name: _headline(result) for name, result in results.items()}
    answers = next(iter(results.values()))["answers"]
    facts = {"headline": headline, "checks": len(domain.checks), "answers": answers}
    return Product({path: Path(lab.layout.figures(domain.category, domain.domain))}, facts)


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that metadata and the final table show; pairs are base, tuned."""
    headline = {
        "bits_per_byte": [result["base"]["bits_per_byte"], result["tuned"]["bits_per_byte"]],
        "recall": [result["base"]["recall"], result["tuned"]["recall"]],
        "tokens_per_s": result["tokens_per_s"],
        "load_s": result["load_s"] if result["adapter_s"] is None else result["adapter_s"],
        "memory_mb": round(result["peak_memory_bytes"] / 1e6),
    }
    return headline if result["kl_f16"] is None else headline | {"kl_f16": result["kl_f16"]}


def _make_metadata(lab: Lab, domain: Domain, work: Path) -> Product:
    from .metadata import metadata

    manifests = lab.manifests_of(domain, "data", "train", "gguf", "evaluate")
    base = lab.manifests.read("base", "base", lab.params.base)
    if base is None:
        raise MeetaraError("the base's manifest is missing", remedy="run 03_create_gguf first")
    figures = Path(lab.layout.figures(domain.category, domain.domain))
    text = metadata(domain, lab.params.base, lab.base, {**manifests, "base": base}, figures, lab.log.run_id)
    path = work / "metadata.json"
    path.write_text(text, encoding="utf-8", newline="\n")
    return Product(
        {path: Path(lab.layout.domain_metadata(domain.category, domain.domain))}, {"bytes": len(text.encode())}
    )


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "01_generate_data", 1, ("data",), (), "training data", _make_data),
        Stage("train", "02_train", 1, ("train",), ("data",), "trained model", _make_trained),
        Stage("gguf", "03_create_gguf", 1, ("gguf",), ("data", "train"), "GGUF", _make_gguf),
        Stage("evaluate", "04_evaluate", 1, ("evaluate",), ("train", "gguf"), "evaluation", _make_evaluation),
        Stage("metadata", "05_metadata", 1, (), ("data", "train", "gguf", "evaluate"), "metadata", _make_metadata),
    )
}
