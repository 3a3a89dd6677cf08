"""Makes the GGUF files of a base and of a domain, each through the integrity gate before it is published."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MeetaraError
from ..params import Base
from ..quants import LEVELS
from ..store import move, sha256_of
from . import adapter, convert, merge, quantize
from .gguf_io import TensorPlan, TensorSpec, tensors_like
from .verify import verify

Header = dict[str, str | int | float]


@dataclass(frozen=True)
class Made:
    """A file that passed the gate and waits under a partial name.

    Attributes:
        path: Where it is.
        facts: form, quant, bytes, sha256, tensor types and their numbers, what the gate saw.
    """

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """What every file is checked against, and where one goes that fails.

    Attributes:
        prepared: The base as a transformers folder.
        system_prompt: For the stop test.
        rejected: File name -> place for a file that failed.
    """

    prepared: Path
    system_prompt: str
    rejected: Callable[[str], Path]

    def check(
        self,
        partial: Path,
        final_name: str,
        *,
        form: str,
        quant: str,
        tensors: Sequence[TensorPlan | TensorSpec],
        keys: Header,
        base: Path | None = None,
    ) -> Made:
        """The file with its facts.

        Raises:
            MeetaraError: It failed; it has been moved to `models/gguf/development/`.
        """
        sha256 = sha256_of(partial)
        try:
            checks = verify(
                partial, sha256=sha256, tensors=tensors, keys=keys, prepared=self.prepared,
                system_prompt=self.system_prompt, base=base,
            )  # fmt: skip
        except MeetaraError as error:
            place = self.rejected(final_name)
            move(partial, place)
            raise MeetaraError(
                f"the file failed the integrity gate: {error}",
                where=final_name,
                remedy=f"it was moved to {place} and not published; what stood under its name before is untouched",
            ) from None
        types = json.loads(next(check["detail"] for check in checks if check["check"] == "tensors"))
        facts = {
            "form": form,
            "quant": quant,
            "bytes": partial.stat().st_size,
            "sha256": sha256,
            "tensor_types": types,
            "checks": checks,
        }
        return Made(partial, facts)


def make_base(base: Base, source: Path, work: Path, quants: list[str], gate: Gate, name: str) -> dict[str, Made]:
    """The base as F16 and at each of `quants`; `facts` of F16 has the hash of its weights.

    Args:
        base: Registry entry.
        source: The GGUF file the weights come from, already checked.
        work: Local folder for partial files.
        quants: Levels besides F16.
        gate: Checks.
        name: The base's name in the registry.
    """
    work.mkdir(parents=True, exist_ok=True)
    f16 = work / "F16.gguf"
    weights_sha256 = convert.f16_base(source, f16)
    keys: Header = {
        "general.architecture": base.shape.architecture,
        "general.type": "model",
        "tokenizer.ggml.pre": base.pre_tokenizer,
    }
    quantised = tensors_like(source)
    plain = [replace(t, kind="F32" if len(t.shape) == 1 else "F16") for t in quantised]
    made = {}
    for quant in ["F16", *(quant for quant in quants if quant != "F16")]:
        path = work / f"{quant}.gguf"
        if quant != "F16":
            quantize.quantize(f16, path, quant)
        level = {**keys, "general.file_type": LEVELS[quant]}
        tensors = plain if quant == "F16" else quantised
        made[quant] = gate.check(path, f"{name}_{quant}.gguf", form="base", quant=quant, tensors=tensors, keys=level)
    made["F16"].facts["weights_sha256"] = weights_sha256
    return made


def make_adapter(
    trained: dict[str, Any], base: Base, base_file: Path, quant: str, header: Header, work: Path, gate: Gate, name: str
) -> Made:
    """A trained adapter as GGUF at one level.

    Args:
        trained: Content of the trained-model file.
        base: Registry entry.
        base_file: The base's GGUF file that it is tried on.
        quant: Level.
        header: Fields for the file's header.
        work: Local folder for the partial file.
        gate: Checks.
        name: The final file name.
    """
    path = work / f"adapter_{quant}.gguf"
    pairs = adapter.lora_pairs(trained["adapter"], base.shape)
    alpha = float(trained["lora"]["alpha"])
    tensors = adapter.write_adapter(path, base.shape, pairs, level=quant, alpha=alpha, header=header)
    keys: Header = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha, **header}
    return gate.check(path, name, form="adapter", quant=quant, tensors=tensors, keys=keys, base=base_file)


def make_merged(
    trained: dict[str, Any], base: Base, base_f16: Path, quants: list[str], header: Header, work: Path, gate: Gate,
    names: dict[str, str],
) -> dict[str, Made]:  # fmt: skip
    """Base and adapter as standalone models, one for each level, from one merged F16 file that is then removed."""
    f16 = work / "merged_F16.gguf"
    pairs = adapter.lora_pairs(trained["adapter"], base.shape)
    merge.merge(base_f16, pairs, f16, alpha=float(trained["lora"]["alpha"]), header=header)
    tensors = tensors_like(base_f16)
    made = {}
    for quant in quants:
        path = work / f"merged_model_{quant}.gguf"
        quantize.quantize(f16, path, quant)
        made[quant] = gate.check(path, names[quant], form="merged", quant=quant, tensors=tensors, keys=header)
    f16.unlink()
    return made
