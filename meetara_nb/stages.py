"""The stages of a run: what each takes, makes and depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import params as parameters
from .catalogue import Domain
from .errors import MeetaraError
from .runlog import size
from .store import move, sha256_of, write_json

if TYPE_CHECKING:
    from .hub.teacher import Teacher
    from .lab import Lab

# The level of the base on which adapters are tried and evaluated, whatever their own level.
RUN_BASE = "Q4_K_M"


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
        light: Whether it loads no model, so that several domains can be worked on at once.
    """

    name: str
    notebook: str
    version: int
    sections: tuple[str, ...]
    after: tuple[str, ...]
    makes: str
    make: Callable[[Lab, Domain, Path], Product]
    light: Callable[[Lab], bool] = lambda _: False


# The work of each stage


def _make_data(lab: Lab, domain: Domain, work: Path) -> Product:
    from .hub.dataset import compose, dropped_json, to_json

    params = lab.params_of(domain).data
    teacher = None
    if params.source == "teacher":
        teacher = _teacher(lab, domain, work / "replies.jsonl")
    data = compose(domain, params, teacher.drafts() if teacher else None, lab.log.say)
    facts = data.funnel.as_dict()
    made_by = {"model": teacher.model.name, **vars(teacher.usage)} if teacher else {}
    # What differs from session to session stays out of the file, so that equal work gives equal bytes.
    in_file = {"model": teacher.model.name} if teacher else None
    path, dropped = work / "training_data.json", work / "dropped.jsonl"
    for partial, text in ((path, to_json(domain, params, data, in_file)), (dropped, dropped_json(domain, data))):
        partial.write_text(text, encoding="utf-8", newline="\n")
    # For reading only: nothing depends on it, so it is no output that a later stage would wait for.
    move(dropped, Path(lab.layout.dropped(domain.category, domain.domain)))
    lab.log.say(
        f"  {facts['kept']:,} of {facts['requested']:,} samples kept of {facts['generated']:,} composed; "
        f"{facts['near_duplicates']:,} near-duplicates, {facts['contaminated']:,} overlap with the checks, "
        f"{sum(facts['dropped'].values()):,} filtered out"
    )
    final = Path(lab.layout.training_data(domain.category, domain.domain))
    return Product({path: final}, {**facts, **({"teacher": made_by} if made_by else {})})


def _composes(lab: Lab) -> bool:
    return all(params.data.source == "grounded" for params in lab.params.values())


def _teacher(lab: Lab, domain: Domain, replies: Path) -> Teacher:
    from .hub.backends import backend
    from .hub.teacher import Teacher

    def base_file() -> Path:
        lab.gguf_base()
        return Path(lab.layout.base(lab.base_name, RUN_BASE))

    params = lab.params_of(domain)
    model = backend(params.teacher, base_file, lambda: lab.prepared_base)
    return Teacher(domain, params.data, params.teacher, model, replies, lab.log.say)


def _make_trained(lab: Lab, domain: Domain, work: Path) -> Product:
    from .training.engine import Job, train

    data = Path(lab.layout.training_data(domain.category, domain.domain))
    final = Path(lab.layout.trained_model(domain.category, domain.domain))
    lasting = lab.layout.checkpoints(domain.category, domain.domain)
    job = Job(
        name=domain.domain,
        category=domain.category,
        base_name=lab.base_name,
        base=lab.base,
        data=data,
        data_sha256=sha256_of(data),
        params=lab.params_of(domain).train,
        minutes=lab.minutes_for(domain),
        work=work,
        lasting=Path(lasting) if lasting else None,
        before=final if lab.manifests.intact("train", domain.category, domain.domain) else None,
    )
    trained = train(job, lambda: lab.warm_base(domain), lab.log)
    return Product({trained.path: final}, trained.facts)


def _make_gguf(lab: Lab, domain: Domain, work: Path) -> Product:
    from importlib.metadata import version

    from .gguf_factory.factory import Gate, make_adapter, make_merged
    from .metadata import gguf_header, modelfile
    from .training.bases import load_tokenizer
    from .training.checkpoint import load_trained_model

    quants = lab.params_of(domain).gguf.quants
    based = lab.gguf_base()
    base_file = Path(lab.layout.base(lab.base_name, RUN_BASE))
    trained = load_trained_model(Path(lab.layout.trained_model(domain.category, domain.domain)))
    gate = Gate(lab.prepared_base, domain.system_prompt, lambda file: Path(lab.layout.rejected(file)))
    manifests = lab.manifests_of(domain, "data", "train")

    def header(quant: str, merged: bool) -> dict[str, str | int | float]:
        weights = based["facts"]["weights_sha256"]
        return gguf_header(
            domain, lab.base_name, lab.base, base_weights=weights, manifests=manifests, quant=quant, merged=merged
        )

    files: dict[Path, Path] = {}
    facts = []
    for form in lab.params_of(domain).gguf.forms:
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
            base_f16 = Path(lab.layout.base(lab.base_name, "F16"))
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

    base_file = Path(lab.layout.base(lab.base_name, RUN_BASE))
    f16 = work / "adapter_F16.gguf"
    if "adapter" in lab.params_of(domain).gguf.forms:
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
            answers=lab.params_of(domain).evaluate.answers,
            max_answer_tokens=lab.params_of(domain).evaluate.max_answer_tokens,
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
    base = lab.manifests.read("base", "base", lab.base_name)
    if base is None:
        raise MeetaraError("the base's manifest is missing", remedy="run 03_create_gguf first")
    figures = Path(lab.layout.figures(domain.category, domain.domain))
    text = metadata(domain, lab.base_name, lab.base, {**manifests, "base": base}, figures, lab.log.run_id)
    path = work / "metadata.json"
    path.write_text(text, encoding="utf-8", newline="\n")
    return Product(
        {path: Path(lab.layout.domain_metadata(domain.category, domain.domain))}, {"bytes": len(text.encode())}
    )


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("data", "01_generate_data", 4, ("data", "teacher"), (), "training data", _make_data, _composes),
        Stage("train", "02_train", 2, ("train",), ("data",), "trained model", _make_trained),
        Stage("gguf", "03_create_gguf", 1, ("gguf",), ("data", "train"), "GGUF", _make_gguf),
        Stage("evaluate", "04_evaluate", 1, ("evaluate",), ("train", "gguf"), "evaluation", _make_evaluation),
        Stage("metadata", "05_metadata", 1, (), ("data", "train", "gguf", "evaluate"), "metadata", _make_metadata),
    )
}
