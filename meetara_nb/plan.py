"""What a run would make, before it is run, and what earlier runs have made."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import params as parameters
from .catalogue import Catalogue, Domain
from .errors import MeetaraError
from .lab import Asked, Lab
from .layout import Layout
from .params import RunParams, Scope
from .quants import ADAPTER_TYPES
from .runlog import RunLog, size, table
from .stages import STAGES
from .store import Manifests, existing


def lora_parameters(lab: Lab, params: RunParams) -> int:
    """Trained parameters of an adapter."""
    shape, rank = lab.base.shape, params.train.lora_rank
    return shape.layers * sum(rank * (outputs + inputs) for outputs, inputs in shape.matrices.values())


def sizes(lab: Lab, params: RunParams) -> list[tuple[str, int, Scope, bool]]:
    """Predicted size of each file: (what, bytes, scope, within budget)."""
    from .gguf_factory.adapter import adapter_bytes

    found = []
    for form in params.gguf.forms:
        scope = parameters.scopes()["domain" if form == "adapter" else "domain_merged"]
        for quant in params.gguf.quants:
            if form == "adapter":
                predicted = adapter_bytes(lab.base.shape, params.train.lora_rank, quant)
            else:
                predicted = int(lab.base.parameters * MERGED_BYTES[quant])
            found.append((f"{form} {quant}", predicted, scope, scope.fits(predicted)))
    return found


# Bytes for each parameter of the 135M base, quantised to each level by llama.cpp; measured.
MERGED_BYTES = {
    "F32": 4.013, "F16": 2.014, "BF16": 2.014, "Q8_0": 1.077, "Q6_K": 1.029, "Q5_K_M": 0.833,
    "Q5_K_S": 0.818, "Q5_1": 0.83, "Q5_0": 0.781, "Q4_K_M": 0.784, "Q4_K_S": 0.759, "Q4_1": 0.731,
    "Q4_0": 0.682, "Q3_K_L": 0.725, "Q3_K_M": 0.695, "Q3_K_S": 0.656, "Q2_K": 0.656,
}  # fmt: skip


def describe(lab: Lab) -> str:
    """Parameters, sizes against budget, disk and what is done, for people."""
    groups: dict[str, list[Domain]] = {}
    for domain in lab.domains:
        groups.setdefault(lab.params_of(domain).digest(), []).append(domain)
    (first, *others) = groups.values()
    parts = [f"base {lab.base_name}: {lab.base.title}", _parameters(lab, first, None)]
    parts += [_parameters(lab, group, first[0]) for group in others]
    every = [lab.params_of(group[0]) for group in groups.values()]
    if any(p.train.max_steps is None and p.train.max_minutes is None for p in every):
        parts.append("Training time is planned from the measured step time: 6 minutes on a CPU, an epoch on a GPU.")
    # Sizes follow from rank, levels and forms alone, which hardly ever differ.
    parts += dict.fromkeys(_sizes(lab, params) for params in every)
    rows = []
    for domain in lab.domains:
        rows.append([domain.domain, *("done" if lab.manifest(s, domain) else "to do" for s in STAGES.values())])
    parts.append(table(rows, ["domain", *STAGES]))
    for root, needed in zip((lab.layout.data_root, lab.layout.models_root), lab.needed_bytes(), strict=True):
        free = shutil.disk_usage(existing(Path(root))).free
        parts.append(f"Disk at {root}: at most {size(needed)} needed, {size(free)} free")
    return "\n\n".join(parts)


def _parameters(lab: Lab, group: list[Domain], but: Domain | None) -> str:
    """The parameters of some domains and where each came from; only what differs from those of the domain `but`."""
    params = lab.params_of(group[0])
    usual = parameters.resolve(params.tier, params.base)
    whose = ", ".join(domain.domain for domain in group)
    why = "asked for" if lab.asked.tier else f"the tier of {group[0].category}"
    head = f"{whose}: tier {params.tier} ({why}): {parameters.tiers().tiers[params.tier].about}"
    rows = []
    for key in parameters.parameter_names():
        section, name = key.split(".")
        value, of_tier = (getattr(getattr(p, section), name) for p in (params, usual))
        if but is not None and value == getattr(getattr(lab.params_of(but), section), name):
            continue
        if section == "teacher" and params.data.source != "teacher":
            continue
        plain = parameters.SECTIONS[section].model_fields[name].default
        origin = "default" if of_tier == plain else f"tier {params.tier}"
        if value != of_tier:
            special = any(f"{domain.domain}.{key}" in lab.asked.overrides for domain in group)
            origin = "given for it" if special else "given"
        rows.append([key, _shown(value), origin])
    but_for = f"\nAs {but.domain}, but for" if but is not None and rows else ""
    return head + but_for + ("\n" + table(rows, ["parameter", "value", "from"]) if rows else "")


def _sizes(lab: Lab, params: RunParams) -> str:
    """Predicted sizes of a domain's files, against their budgets."""
    trained = lora_parameters(lab, params)
    low, high = parameters.scopes()["domain"].trained_mb or (0.0, 0.0)
    trained_bytes = trained * 10 + 1_000_000  # fp32 weights twice, two 8-bit moments, and the rest
    rows = [
        ["trained model .pt", size(trained_bytes), f"{low:g}-{high:g} MB", _verdict(low <= trained_bytes / 1e6 <= high)]
    ]
    for what, predicted, scope, fits in sizes(lab, params):
        budget = f"{'at most ' if scope.rule == 'at_most' else ''}{scope.gguf_mb:g} MB"
        rows.append([what, size(predicted), budget, _verdict(fits)])
    text = f"A domain, with {trained:,} trained parameters\n" + table(rows, ["file", "predicted", "budget", ""])
    if "adapter" in params.gguf.forms:
        types = ", ".join(f"{q}: {' and '.join(dict.fromkeys(ADAPTER_TYPES[q]))}" for q in params.gguf.quants)
        text += f"\n\nTensor types of an adapter: {types}"
    return text


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "planned" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(fits: bool) -> str:
    return "within" if fits else "OUTSIDE BUDGET"


def status(catalogue: Catalogue, layout: Layout) -> str:
    """One row a domain, from its manifests; `stale` where its spec changed since."""
    manifests, rows = Manifests(layout), []
    for name in sorted(catalogue.files, key=lambda name: (catalogue.category(name), name)):
        category = catalogue.category(name)
        found = {stage: manifests.read(stage, category, name) for stage in STAGES}
        if not any(found.values()):
            rows.append([category, name, "nothing yet", "", "", "", ""])
            continue
        rows.append([category, name, *_state(catalogue, name, layout, found)])
    return table(rows, ["category", "domain", "state", "samples", "GGUF", "bits per byte", "recall"])


def _state(catalogue: Catalogue, name: str, layout: Layout, found: dict[str, dict | None]) -> list[str]:
    # Each stage is judged by the parameters it was run with: data may be older than what was trained on it.
    recorded = {stage: m["facts"]["params"] for stage, m in found.items() if m}
    params = {**next(iter(recorded.values())), **{s: recorded[s][s] for s in parameters.SECTIONS if s in recorded}}
    state = "done" if all(m and m.get("done") for m in found.values()) else "begun"
    try:
        domain = catalogue.load(name)
        resolved = {name: RunParams.model_validate(params)}
        lab = Lab(layout, Asked(), resolved, [domain], RunLog(None, ""), Manifests(layout))
        missing = [stage for stage in STAGES if lab.manifest(STAGES[stage], domain) is None]
        if missing:
            state = f"{'stale' if found[missing[0]] else 'begun'} from {missing[0]}"
    except MeetaraError as error:
        state = f"spec faulty: {error.faults[0].what}"
    data, gguf, evaluated = (found[stage] for stage in ("data", "gguf", "evaluate"))
    files = gguf["facts"]["files"] if gguf else []
    scores = next(iter(evaluated["facts"]["headline"].values())) if evaluated else None
    return [
        state,
        f"{data['facts']['kept']:,}" if data else "",
        ", ".join(f"{f['form']} {f['quant']} {size(f['bytes'])}" for f in files),
        "{:.3f} -> {:.3f}".format(*scores["bits_per_byte"]) if scores else "",
        "{:.0%} -> {:.0%}".format(*scores["recall"]) if scores else "",
    ]
