"""What is said about a model: its metadata file, its GGUF header fields, its Modelfile. Measured values only."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .catalogue import Domain
from .errors import MeetaraError
from .params import Base

FORMAT = "meetara-metadata/1"
MOST_BYTES = 2_048


def gguf_header(
    domain: Domain, base_name: str, base: Base, *, base_weights: str, manifests: Mapping[str, dict[str, Any]],
    quant: str, merged: bool,
) -> dict[str, str | int | float]:  # fmt: skip
    """Header fields of a domain's file: the standard `general.*` ones and the essentials of its making.

    They follow from content alone (no time, no run id), so that equal work gives equal bytes.
    """
    data, trained = manifests["data"]["facts"], manifests["train"]["facts"]
    return {
        "general.name": f"MeeTARA {domain.title}",
        "general.description": domain.covers,
        "general.finetune": domain.domain,
        "general.license": base.licence.lower(),
        "general.base_model.count": 1,
        "general.base_model.0.name": base.title,
        "meetara.format": FORMAT,
        "meetara.version": __version__,
        "meetara.domain": domain.domain,
        "meetara.category": domain.category,
        "meetara.form": "merged" if merged else "adapter",
        "meetara.quant": quant,
        "meetara.system_prompt": domain.system_prompt,
        "meetara.base.name": base_name,
        "meetara.base.weights_sha256": base_weights,
        "meetara.data.samples": data["kept"],
        "meetara.data.sha256": _only_hash(manifests["data"]),
        "meetara.trained.steps": trained["steps"],
        "meetara.trained.tokens": trained["tokens"],
        "meetara.trained.sha256": _only_hash(manifests["train"]),
    }


def _only_hash(manifest: Mapping[str, Any]) -> str:
    (entry,) = manifest["outputs"].values()
    return str(entry["sha256"])


def metadata(
    domain: Domain, base_name: str, base: Base, manifests: Mapping[str, dict[str, Any]], figures: Path, run_id: str
) -> str:
    """The metadata file: about 1 KB, 2,048 bytes at most.

    Args:
        domain: The spec.
        base_name, base: The base's name in the registry, and its entry.
        manifests: Of the stages base, data, train, gguf and evaluate.
        figures: The file with every figure of the evaluation; named by its hash.
        run_id: Of the run that wrote this.

    Raises:
        MeetaraError: So many files that it would exceed its limit.
    """
    data, trained = manifests["data"]["facts"], manifests["train"]["facts"]
    measured = manifests["evaluate"]["facts"]["headline"]
    (trained_entry,) = manifests["train"]["outputs"].values()
    from .store import sha256_of

    content = {
        "format": FORMAT,
        "domain": domain.domain,
        "category": domain.category,
        "scope": "D_domain_specific",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run_id": run_id,
        "base": {
            "name": base_name,
            "origin": base.origin,
            "licence": base.licence,
            "source_sha256": base.identity,
            "weights_sha256": manifests["base"]["facts"]["weights_sha256"],
        },
        "data": {
            "samples": data["kept"],
            "generated": data["generated"],
            "dropped": sum(data["dropped"].values()),
            "near_duplicates": data["near_duplicates"],
            "contaminated": data["contaminated"],
            "sha256": _only_hash(manifests["data"]),
        },
        "training": {
            key: trained[key] for key in ("steps", "tokens", "trained_tokens", "samples_seen", "train_s", "last_loss")
        }
        | {"bytes": trained_entry["bytes"], "sha256": trained_entry["sha256"]},
        "files": [
            {
                "form": f["form"],
                "quant": f["quant"],
                "bytes": f["bytes"],
                "sha256": f["sha256"],
                "types": f["tensor_types"],
            }
            | {"scores": measured[f"{f['form']} {f['quant']}"]}
            for f in manifests["gguf"]["facts"]["files"]
        ],
        "figures_sha256": sha256_of(figures),
        "versions": {"meetara": __version__, **manifests["gguf"]["facts"]["versions"]},
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    indented = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    for candidate in (indented, text):
        if len(candidate.encode()) <= MOST_BYTES:
            return candidate
    raise MeetaraError(
        f"the metadata would have {len(text.encode())} bytes, over {MOST_BYTES}",
        where=f"domain {domain.domain}",
        remedy="ask for fewer quantisation levels at once",
    )


CHATML = "<|im_start|>", "<|im_end|>"


def modelfile(gguf_name: str, chat_template: str, system_prompt: str) -> str:
    """Ollama's recipe for a merged file beside it.

    Raises:
        MeetaraError: The base's chat template is not ChatML, the only one translated so far.
    """
    start, end = CHATML
    if start not in chat_template or end not in chat_template:
        raise MeetaraError("the chat template is not ChatML: no Modelfile can be made", remedy="use form: adapter")
    return (
        f"FROM ./{gguf_name}\n"
        'TEMPLATE """{{ range .Messages }}'
        f"{start}{{{{ .Role }}}}\n{{{{ .Content }}}}{end}\n{{{{ end }}}}{start}assistant\n"
        '"""\n'
        f'SYSTEM """{system_prompt}"""\n'
        f'PARAMETER stop "{start}"\n'
        f'PARAMETER stop "{end}"\n'
    )
