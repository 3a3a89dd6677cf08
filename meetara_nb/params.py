"""Parameters of a run: tier, base, scope and overrides, resolved into one frozen, typed RunParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from . import layout
from .errors import Fault, MeetaraError, nearest
from .quants import LEVELS
from .store import digest_of
from .yamlfile import Strict, load_model, parse_model

Share = Annotated[float, Field(ge=0, le=1)]


Kind = Literal[
    "answer", "steps", "scenario", "follow_up", "conversation", "pair", "overview",
    "mistake", "decision", "red_flag", "handover", "beyond", "outside",
]  # fmt: skip
Weight = Annotated[float, Field(ge=0, le=1_000)]


class DataParams(Strict):
    """How training data is made."""

    source: Literal["grounded", "teacher"] = "grounded"
    """grounded: composed from the statements alone; teacher: single questions and answers worded anew by a model."""
    samples: Annotated[int, Field(ge=10, le=100_000)] = 5_000
    """Samples to keep for a domain, after every filter."""
    seed: int = 17
    """The same seed and spec give the same bytes."""
    kinds: dict[Kind, Weight] = {
        "answer": 24.0, "steps": 8.0, "scenario": 10.0, "follow_up": 14.0, "conversation": 10.0, "pair": 8.0,
        "overview": 4.0, "mistake": 7.0, "decision": 6.0, "red_flag": 4.0, "handover": 2.0, "beyond": 1.5,
        "outside": 1.5,
    }  # fmt: skip
    """Kind of sample -> weight. A kind that the spec has no more new samples of gives its share to the others."""
    misspelt: Share = 0.1
    """Share of the samples whose questions are typed in a hurry."""
    unsupported: Share = 0.1
    """Share of the content words of an answer that may be missing in the statements it is made of."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Answers whose word 5-grams have this Jaccard similarity or more count as one."""
    decontamination_words: Annotated[int, Field(ge=4, le=50)] = 8
    """A sample that shares this many words in a row with a held-out check is dropped."""

    @field_validator("kinds")
    @classmethod
    def _some(cls, kinds: dict[Kind, float]) -> dict[Kind, float]:
        if not any(kinds.values()):
            raise ValueError("every kind of sample has the weight 0")
        return kinds


class TeacherParams(Strict):
    """A model that words questions and answers; counts only where `data.source` is teacher."""

    backend: Literal["llama_cpp", "transformers", "openai"] = "llama_cpp"
    """llama_cpp: a GGUF file on the CPU; transformers: a model folder or a base, in batches, on the GPU where there is
    one; openai: any endpoint that speaks OpenAI's chat protocol, its key in $MEETARA_TEACHER_KEY."""
    model: str = ""
    """GGUF file, model folder, or the endpoint's name for the model; empty: the run's base."""
    url: str = ""
    """The endpoint, for example http://127.0.0.1:8000/v1."""
    words: Literal["both", "answers"] = "both"
    """What it words: questions and answers, or answers alone, which is all that a very small model manages."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Annotated[int, Field(ge=16, le=4_096)] = 160
    """Tokens in a reply, at most."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at once (openai), or replies generated together (transformers)."""
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Tries after a failed request, each after twice the wait."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million tokens read, in any currency; for the forecast."""
    price_out: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million tokens written."""


class TrainParams(Strict):
    """How an adapter is trained."""

    seed: int = 17
    epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Passes over the data, if neither time nor steps end it before."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall clock for a domain's training, loading and saving included. None: 6 on a CPU, no limit on a GPU."""
    run_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall clock for the training of all domains of a run; each gets an equal share of what is left."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps; when set, time is not planned."""
    batch_tokens: Annotated[int, Field(ge=64, le=1_000_000)] | None = None
    """Tokens in an optimizer step, at most; samples are packed whole. None: 512 to 16,384, so that there are about 200
    steps."""
    max_length: Annotated[int, Field(ge=64, le=131_072)] | None = None
    """Tokens in a sample, at most; longer ones are left out and counted. None: what the base attends to."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-3
    """Peak, after warm-up."""
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay_share: Share = 0.3
    """Share of the steps, at the end, in which it falls to 0. A later session goes on from before the decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lora_rank: Annotated[int, Field(ge=1, le=512)] = 32
    """A domain's rank is 32 in every tier: its rows must divide by 32, and both size budgets rest on it."""
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    """The adapter's output is scaled by alpha / rank."""
    lora_dropout: Share = 0.0
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """adamw8bit keeps its state in 8 bits, which the size of the trained model rests on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of what is computed. auto: bf16 on GPUs that have it, fp16 with a scaler on older ones, fp32 on a CPU."""
    base_precision: Literal["auto", "full", "nf4"] = "auto"
    """How the frozen base is held: in full, or in 4 bits (QLoRA). auto: in 4 bits where it does not fit in full."""
    held_out: Annotated[int, Field(ge=0, le=1_000)] = 24
    """Samples that are not trained on, for the held-out loss. They come from the same composer: it flatters."""
    patience: Annotated[int, Field(ge=1)] | None = 3
    """The learning rate's decay begins early where the held-out loss has not fallen for so many measurements."""
    go_on: bool = True
    """Go on where the domain's last training, on the same data in the same way, stood before its decay."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run's folder."""


class GgufParams(Strict):
    """Which GGUF files are made."""

    quants: Annotated[list[str], Field(min_length=1)] = ["Q4_K_M"]
    """llama.cpp quantisation levels."""
    form: Literal["adapter", "merged", "both"] = "adapter"
    """adapter: 8 MB beside the shared base; merged: a standalone model of about 105 MB; or both."""

    @field_validator("quants")
    @classmethod
    def _known(cls, quants: list[str]) -> list[str]:
        for quant in quants:
            if quant not in LEVELS:
                raise ValueError(f"{quant!r} is no quantisation level; {nearest(quant, LEVELS)}")
        if len(set(quants)) < len(quants):
            raise ValueError("a level is listed twice")
        return quants

    @property
    def forms(self) -> tuple[str, ...]:
        return ("adapter", "merged") if self.form == "both" else (self.form,)


class EvaluateParams(Strict):
    """How the shipped file is measured."""

    answers: Annotated[int, Field(ge=1, le=100)] = 3
    """Held-out questions whose answers are printed and kept."""
    max_answer_tokens: Annotated[int, Field(ge=8, le=4096)] = 160


class Tier(Strict):
    """A named set of parameters; what it leaves out keeps its default."""

    about: str
    data: DataParams = DataParams()
    teacher: TeacherParams = TeacherParams()
    train: TrainParams = TrainParams()
    gguf: GgufParams = GgufParams()
    evaluate: EvaluateParams = EvaluateParams()


class PackageSource(Strict):
    """A GGUF file inside an installed Python package."""

    package: str
    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def identity(self) -> str:
        return self.sha256


class HubSource(Strict):
    """A model repository of the Hugging Face Hub."""

    repo: str
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit, so that the same name means the same weights next year."""

    @property
    def identity(self) -> str:
        return digest_of([self.repo, self.revision])


class FolderSource(Strict):
    """A local folder as transformers saves it."""

    folder: str
    identity: str
    """Hash of its configuration and of its weight files' names, sizes and times."""


class FileSource(Strict):
    """A local GGUF file."""

    path: str
    sha256: str

    @property
    def identity(self) -> str:
        return self.sha256


class Shape(Strict):
    """Dimensions of a base: they give an adapter's size before it is trained, and GGUF's order of its rows."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The adapted matrices of a layer by GGUF name: (outputs, inputs)."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "attn_q": (q, self.hidden),
            "attn_k": (kv, self.hidden),
            "attn_v": (kv, self.hidden),
            "attn_output": (self.hidden, q),
            "ffn_gate": (self.feed_forward, self.hidden),
            "ffn_up": (self.feed_forward, self.hidden),
            "ffn_down": (self.hidden, self.feed_forward),
        }


class Base(Strict):
    """A base model of the registry."""

    title: str
    origin: str
    """Where the weights come from, as its authors name it."""
    licence: str
    parameters: int
    shape: Shape
    pre_tokenizer: str
    """llama.cpp's name for how text is cut before byte-pair encoding: the file's `tokenizer.ggml.pre`."""
    source: PackageSource | HubSource | FolderSource | FileSource
    scopes: list[str]
    context: int
    """Tokens that the model was trained to attend to."""

    @property
    def identity(self) -> str:
        """Hash that tells these weights from others."""
        return self.source.identity

    @property
    def comes_as_gguf(self) -> bool:
        return isinstance(self.source, PackageSource | FileSource)


class Scope(Strict):
    """A kind of product and its size budget; sizes in decimal megabytes."""

    base: str
    gguf_mb: float
    rule: Literal["at_most", "within_5_percent"]
    trained_mb: tuple[float, float] | None = None

    @field_validator("trained_mb", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def fits(self, size_bytes: int) -> bool:
        budget = self.gguf_mb * 1e6
        return size_bytes <= budget if self.rule == "at_most" else abs(size_bytes - budget) <= 0.05 * budget


class _Tiers(Strict):
    default: str
    """For what belongs to no category."""
    categories: dict[str, str]
    """Category -> its domains' tier where none is asked for."""
    tiers: dict[str, Tier]

    @model_validator(mode="after")
    def _known(self) -> _Tiers:
        for name in (self.default, *self.categories.values()):
            if name not in self.tiers:
                raise ValueError(f"{name!r} is no tier; {nearest(name, self.tiers)}")
        return self


class _Bases(Strict):
    bases: dict[str, Base]


class _Scopes(Strict):
    scopes: dict[str, Scope]


@cache
def tiers(folder: Path = layout.PARAMS) -> _Tiers:
    return load_model(folder / "tiers.yaml", _Tiers)


@cache
def bases(folder: Path = layout.PARAMS) -> dict[str, Base]:
    return load_model(folder / "bases.yaml", _Bases).bases


@cache
def scopes(folder: Path = layout.PARAMS) -> dict[str, Scope]:
    return load_model(folder / "scopes.yaml", _Scopes).scopes


class RunParams(Strict):
    """Everything that decides what a run makes, with the values that it will use."""

    tier: str
    base: str
    data: DataParams
    teacher: TeacherParams
    train: TrainParams
    gguf: GgufParams
    evaluate: EvaluateParams

    def digest(self, *sections: str) -> str:
        """sha256 of the named sections (all when none is named); the teacher counts only where it is used."""
        chosen = set(sections or SECTIONS)
        if self.data.source != "teacher":
            chosen.discard("teacher")
        return digest_of(self.model_dump(mode="json", include=chosen))


SECTIONS: dict[str, type[Strict]] = {
    "data": DataParams,
    "teacher": TeacherParams,
    "train": TrainParams,
    "gguf": GgufParams,
    "evaluate": EvaluateParams,
}


def parameter_names() -> list[str]:
    """Every parameter that can be overridden, as `section.name`."""
    return [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def resolve(
    tier: str = "", base: str = "", overrides: Mapping[str, Any] | None = None, *, domain: str = "", category: str = ""
) -> RunParams:
    """The parameters of a run, for one domain of it.

    Args:
        tier: A name from `params/tiers.yaml`; empty for the category's.
        base: A name from `params/bases.yaml`, or the path of a folder or GGUF file; empty for the domain scope's.
        overrides: `section.name` -> value; they win over the tier. `domain.section.name` holds for that domain only,
            and wins over both.
        domain, category: Whose parameters; empty where none is known yet.

    Raises:
        MeetaraError: Every unknown name and wrong value at once.
    """
    known, faults = tiers(), []
    tier, base = tier or known.categories.get(category, known.default), base or scopes()["domain"].base
    if tier not in known.tiers:
        faults.append(Fault(f"{tier!r} is no tier", "tier", nearest(tier, known.tiers)))
    if base not in bases() and not is_path(base):
        faults.append(Fault(f"{base!r} is no base", "base", nearest(base, bases())))
    elif is_path(base) and not Path(base).expanduser().exists():
        faults.append(Fault("there is no such folder or file", base, "give a model folder, a .gguf file, or a name"))
    chosen = known.tiers.get(tier, known.tiers[known.default])
    data = {"tier": tier, "base": base, **chosen.model_dump(include=set(SECTIONS))}
    general, special = {}, {}
    for key, value in (overrides or {}).items():
        whose, name = key.split(".", 1) if key.count(".") == 2 else ("", key)
        if name not in parameter_names():
            faults.append(Fault("unknown parameter", key, nearest(name, parameter_names())))
        elif not whose:
            general[name] = value
        elif whose == domain:
            special[name] = value
    for key, value in (general | special).items():
        section, name = key.split(".")
        data[section][name] = value
    try:
        params = parse_model(data, RunParams, "parameter")
    except MeetaraError as error:
        faults += error.faults
    if faults:
        raise MeetaraError.of(faults)
    return params


def is_path(base: str) -> bool:
    """Whether a base is given as a folder or file of the user's own, not by a name of the registry."""
    return "/" in base or "\\" in base or base.endswith(".gguf")


class RunFile(Strict):
    """A run written down: `run --params FILE`, or `papermill -f FILE`. Its keys are the notebooks' parameters."""

    domains: list[str]
    tier: str = ""
    base: str = ""
    overrides: dict[str, Any] = {}


def load_run_file(path: Path) -> RunFile:
    run_file = load_model(path, RunFile)
    try:
        resolve(run_file.tier, run_file.base, run_file.overrides)
    except MeetaraError as error:
        faults = [replace(fault, where=f"{path}: {fault.where}") for fault in error.faults]
        raise MeetaraError.of(faults) from None
    return run_file
