"""Every folder and file name of the lab. Nothing else builds a path.

The names are the contract of the README's table: data under one root, models under another, so that the models
can live on Google Drive. Paths are pure: no method here touches a disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from .errors import MeetaraError

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
QUANT = re.compile(r"[A-Z][A-Z0-9_]{1,15}\Z")
# Names that Windows keeps for devices, whatever their ending.
RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}

PROJECT = Path(__file__).resolve().parent.parent
PARAMS = PROJECT / "params"
NOTEBOOKS = PROJECT / "notebooks"


def checked_name(name: str, what: str = "name") -> str:
    """`name` if it is safe in a path on every system, else a MeetaraError."""
    if not NAME.match(name) or name in RESERVED:
        raise MeetaraError(
            f"{name!r} is no {what}",
            remedy="use lower-case letters, digits and underscores, beginning with a letter",
        )
    return name


def checked_quant(quant: str) -> str:
    """`quant` if it has the form of a llama.cpp quantisation level, else a MeetaraError."""
    if not QUANT.match(quant):
        raise MeetaraError(f"{quant!r} is no quantisation level", remedy="for example Q4_K_M, Q8_0 or F16")
    return quant


@dataclass(frozen=True)
class Layout:
    """The two roots and every name under them.

    Attributes:
        data_root: Training data, trained models, logs.
        models_root: GGUF files, by scope.
        work_root: Unfinished work, on a local disk: checkpoints, partial files, locks. Never on Drive.
    """

    data_root: PurePath
    models_root: PurePath
    work_root: PurePath

    # data/
    def training_data(self, category: str, domain: str) -> PurePath:
        return self.data_root / "training" / checked_name(category) / f"{checked_name(domain)}_training_data.json"

    def trained_model(self, category: str, domain: str) -> PurePath:
        return self._trained / checked_name(category) / f"{checked_name(domain)}_trained_model.pt"

    def category_trained_model(self, category: str) -> PurePath:
        return self._trained / checked_name(category) / f"{category}_category_trained_model.pt"

    def universal_trained_model(self, *, lite: bool) -> PurePath:
        return self._trained / "universal" / f"universal_{_size(lite)}_trained_model.pt"

    @property
    def _trained(self) -> PurePath:
        return self.data_root / "models" / "trained"

    @property
    def logs(self) -> PurePath:
        return self.data_root / "logs"

    @property
    def runs(self) -> PurePath:
        return self.logs / "runs"

    def run(self, run_id: str) -> PurePath:
        if not re.match(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z", run_id):
            raise MeetaraError(f"{run_id!r} is no run id", remedy="use letters, digits, - and _")
        return self.runs / run_id

    def manifest(self, stage: str, category: str, name: str) -> PurePath:
        """The record that a stage is done for a domain (or a base, under the category `base`)."""
        return self.logs / "manifests" / checked_name(category) / f"{name}.{stage}.json"

    def dropped(self, category: str, domain: str) -> PurePath:
        """Some of the drafts that were not kept for the training data, with their reasons."""
        return self.logs / "dropped" / checked_name(category) / f"{checked_name(domain)}_dropped.jsonl"

    def figures(self, category: str, domain: str) -> PurePath:
        """Every figure of the newest evaluation; the metadata names this file by its hash."""
        return self.logs / "evaluations" / checked_name(category) / f"{checked_name(domain)}_evaluation.json"

    # models/
    def base(self, base: str, quant: str) -> PurePath:
        return self.models_root / "base" / f"{base}_{checked_quant(quant)}.gguf"

    def _domains(self, category: str) -> PurePath:
        return self.models_root / "D_domain_specific" / checked_name(category)

    def domain_gguf(self, category: str, domain: str, quant: str, *, merged: bool = False) -> PurePath:
        form = "_merged" if merged else ""
        return self._domains(category) / f"meetara_{checked_name(domain)}{form}_{checked_quant(quant)}.gguf"

    def domain_modelfile(self, category: str, domain: str, quant: str) -> PurePath:
        """Ollama's recipe for the merged file beside it."""
        return self.domain_gguf(category, domain, quant, merged=True).with_suffix(".Modelfile")

    def domain_metadata(self, category: str, domain: str) -> PurePath:
        return self._domains(category) / f"{checked_name(domain)}_metadata.json"

    def category_gguf(self, category: str, quant: str) -> PurePath:
        folder = self.models_root / "C_category_specific" / checked_name(category)
        return folder / f"meetara_{category}_category_{checked_quant(quant)}.gguf"

    def category_metadata(self, category: str) -> PurePath:
        folder = self.models_root / "C_category_specific" / checked_name(category)
        return folder / f"{category}_category_metadata.json"

    def universal_gguf(self, quant: str, *, lite: bool) -> PurePath:
        return self._universal(lite) / f"meetara_universal_{_size(lite)}_{checked_quant(quant)}.gguf"

    def universal_metadata(self, *, lite: bool) -> PurePath:
        return self._universal(lite) / f"universal_{_size(lite)}_metadata.json"

    def _universal(self, lite: bool) -> PurePath:
        return self.models_root / ("B_universal_lite" if lite else "A_universal_full")

    def development_gguf(self, name: str, quant: str) -> PurePath:
        return self._gguf("development") / f"meetara_{checked_name(name)}_{checked_quant(quant)}.gguf"

    def rejected(self, file_name: str) -> PurePath:
        """Where a file goes that failed the integrity gate."""
        return self._gguf("development") / f"rejected_{file_name}"

    def legacy(self, file_name: str) -> PurePath:
        return self._gguf("legacy") / file_name

    def production(self, file_name: str) -> PurePath:
        return self._gguf("production") / file_name

    def _gguf(self, environment: str) -> PurePath:
        return self.models_root / "gguf" / environment

    # work
    def domain_work(self, category: str, domain: str) -> PurePath:
        return self.work_root / checked_name(category) / checked_name(domain)

    def base_work(self, base: str) -> PurePath:
        return self.work_root / "base" / base

    def checkpoints(self, category: str, domain: str) -> PurePath | None:
        """Where copies of checkpoints outlive the machine; None where the work folder lies under the data root."""
        if self.work_root.is_relative_to(self.data_root):
            return None
        return self.data_root / ".checkpoints" / checked_name(category) / checked_name(domain)

    def lock(self, category: str, name: str) -> PurePath:
        return self.work_root / "locks" / f"{checked_name(category)}.{name}.lock"


def _size(lite: bool) -> str:
    return "lite" if lite else "full"
