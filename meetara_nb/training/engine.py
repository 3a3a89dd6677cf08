"""Trains a LoRA adapter to a plan that is made before the first step, and goes on where it was interrupted."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MeetaraError
from ..params import Base, TrainParams
from ..runlog import RunLog
from ..store import digest_of
from . import checkpoint, samples, schedule
from .adapted import Adapted, WarmBase
from .collate import Encoded, Packs, pack
from .progress import Progress, peak_memory
from .schedule import Plan
from .stepper import Stepper

SAVE_EVERY_S, LASTING_EVERY_S = 45.0, 900.0
# The held-out loss is measured so rarely that it takes no more than this share of the time, and at most this often.
EVAL_SHARE, MOST_EVALS = 0.05, 10
# An improvement of the held-out loss smaller than this share is none.
NO_PROGRESS = 0.002
# The mean loss of recent steps may exceed its lowest value by this factor and this many nats.
EXPLODED = 1.5, 0.5
# What decides for how long is trained, not what is learned in a step: a later session may change it and go on.
DURATION = {"epochs", "max_minutes", "run_minutes", "max_steps", "go_on", "tensorboard", "patience"}


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        name, category: The domain's.
        base_name, base: The base model's name in the registry, and its entry.
        data, data_sha256: The training-data file, and its hash.
        params: How to train.
        minutes: Wall clock for all of it; None for no limit.
        work: A local folder for the checkpoints of exactly this training.
        lasting: A folder for copies of them that outlive the machine; None where `work` does.
        before: A finished training of the same name to go on from; None for a fresh start.
    """

    name: str
    category: str
    base_name: str
    base: Base
    data: Path
    data_sha256: str
    params: TrainParams
    minutes: float | None
    work: Path
    lasting: Path | None = None
    before: Path | None = None

    @property
    def identity(self) -> str:
        """Hash of all that decides what a step learns."""
        params = self.params.model_dump(mode="json", exclude=DURATION)
        return digest_of([params, self.data_sha256, self.base.identity])


@dataclass(frozen=True)
class Trained:
    """A finished training: the file, and what was measured."""

    path: Path
    facts: dict[str, Any]


@dataclass
class State:
    """How far a training is; with weights, optimizer and random generators, all that a checkpoint holds."""

    plan: Plan
    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    trunk: dict[str, Any] | None = None


def train(job: Job, warm: Callable[[], WarmBase], log: RunLog) -> Trained:
    """Trains the adapter of one domain, or goes on with what an earlier session began.

    Args:
        job: What to train.
        warm: Gives the base, from memory if it is there.
        log: Where progress goes.

    Returns:
        The trained-model file inside the work folder, and figures: steps, tokens, seconds, losses.

    Raises:
        MeetaraError: Data or base that cannot be used, no memory or disk, or a loss that is not a number.
    """
    started = time.monotonic()
    base = warm()
    where = base.where
    log.event("device", domain=job.name, **asdict(where))
    log.say(f"  on {where.name}: {where.precision}{', base in NF4' if where.nf4 else ''} ({where.reason})")
    train_on, held = samples.load(job.data, base.tokenizer, job.base.context, job.params, log.say)
    adapted = base.attach(job.params)
    try:
        return _Training(job, base, adapted, train_on, held, log, started).run()
    finally:
        adapted.detach()


class _Training:
    """One training under way."""

    def __init__(
        self, job: Job, base: WarmBase, adapted: Adapted, samples: list[Encoded], held: list[Encoded], log: RunLog,
        started: float,
    ) -> None:  # fmt: skip
        self.job, self.params, self.where, self.adapted, self.log = job, job.params, base.where, adapted, log
        self.samples, self.held, self.started = samples, held, started
        self.stepper = Stepper(adapted, base.where, job.base.shape, self.params, log)
        self.checkpoints = checkpoint.Checkpoints(job.work / "checkpoints", job.lasting, LASTING_EVERY_S, log.say)
        self.versions = _versions()
        self.recent: list[float] = []  # seconds of the last steps of this session
        self.packs: Packs
        self.state: State

    def run(self) -> Trained:
        resumed = self._begin()
        state = self.state
        self.progress = Progress(self.log, self.job.name, state.step, state.tokens, tensorboard=self.params.tensorboard)
        earlier, began = state.seconds, time.monotonic()
        if state.step == 0 and self.held:
            self._measure_held_out()
        while state.step < state.plan.steps:
            step_began = time.monotonic()
            self._next_step()
            step = state.step
            self.recent = [*self.recent[-49:], time.monotonic() - step_began]
            state.seconds = earlier + time.monotonic() - self.started
            if self.held and step % state.plan.eval_steps == 0 and step < state.plan.steps:
                self._measure_held_out()
                self._stop_early()
            self._revise()
            if step == state.plan.trunk_step:
                state.trunk = self._snapshot()
            if step % state.plan.save_steps == 0 and step < state.plan.steps:
                self.checkpoints.save(self._content())
            self.progress.step(state.losses[-1], state.plan.steps, state.tokens)
        if self.held and state.held_out[-1][0] != state.step:
            self._measure_held_out()
        self.progress.close()
        return self._finished(bool(resumed), time.monotonic() - began)

    # Where it begins

    def _begin(self) -> str:
        """Sets `state` and `packs`: from a checkpoint, from an earlier training's trunk, or anew. Returns from what."""
        found = self.checkpoints.newest()
        if found and found["identity"] != self.job.identity:
            self.log.say(f"  {found['path']} belongs to another training and is not used")
            found = None
        if found:
            self.state = State(**{**found["state"], "plan": Plan(**found["state"]["plan"])})
            self._restore(found)
            self._pack(self.state.plan.batch_tokens)
            self._compare(self.state.plan)
            self.log.say(f"  going on from step {self.state.step} of {self.state.plan.steps}")
            self.log.event("resume", domain=self.job.name, checkpoint=found["path"])
            return "checkpoint"
        trunk = self._earlier_trunk()
        plan = self._plan(trunk)
        self.state = State(plan)
        if trunk:
            self._restore(trunk)
            self.state = State(plan, **{name: trunk[name] for name in ("step", "tokens", "trained_tokens", "losses")})
            self.log.say(f"  going on from step {self.state.step} of the training before, where its decay began")
            self.log.event("resume", domain=self.job.name, checkpoint=str(self.job.before))
            return "trunk"
        return ""

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["weights"].shape != self.adapted.weights.shape:
            raise MeetaraError(
                "the checkpoint's adapter does not fit this base",
                where=saved.get("path", self.job.before),
                remedy="remove it and run again",
            )
        self.stepper.load(saved)

    def _earlier_trunk(self) -> dict[str, Any] | None:
        """The state before the decay of a finished training on the same data in the same way; None without one."""
        if not (self.params.go_on and self.job.before):
            return None
        try:
            content = checkpoint.load_trained_model(self.job.before)
        except MeetaraError as error:
            self.log.say(f"  starting anew: {error}")
            return None
        trunk = content["trunk"]
        if content["identity"] != self.job.identity or not trunk:
            return None
        if self.params.max_steps and self.params.max_steps <= trunk["step"]:
            return None
        return {**trunk, "batch_tokens": content["plan"]["batch_tokens"]}

    def _compare(self, plan: Plan) -> None:
        if plan.packs_sha256 != self._packs_sha256():
            raise MeetaraError(
                "the tokens of the data are not those that this training began with",
                where=self.job.data,
                remedy=f"the tokenizer changed; remove {self.checkpoints.local} and run again",
            )
        if plan.versions != self.versions:
            changed = {name: f"{old} -> {self.versions.get(name)}" for name, old in plan.versions.items()}
            told = ", ".join(f"{n} {c}" for n, c in changed.items() if self.versions.get(n) != plan.versions[n])
            self.log.say(f"  WARNING: libraries changed since this training began ({told}): small differences are due")
        if plan.device != self._device:
            self.log.say(f"  WARNING: begun on {plan.device}, going on on {self._device}: the plan's time may not hold")

    # The plan

    def _plan(self, trunk: dict[str, Any] | None) -> Plan:
        """The plan, from the steps asked for, the epochs, or the time that is left."""
        params = self.params
        tokens = sum(len(sample.ids) for sample in self.samples)
        done = trunk["step"] if trunk else 0
        fixed: dict[str, Any] = {"device": self._device, "versions": self.versions, "timed": False, "step_s": 0.0}
        if params.max_steps or self.job.minutes is None:
            batch_tokens = trunk["batch_tokens"] if trunk else schedule.step_tokens(params, tokens * params.epochs)
            self._pack(batch_tokens)
            most = math.ceil(params.epochs * len(self.packs.packs))
            steps = params.max_steps or most
            cadence = {"save_steps": max(1, min(50, steps // 4)), "eval_steps": math.ceil(steps / 5)}
        else:
            token_s, optimizer_s, eval_s = self._measured()
            left = self.job.minutes * 60 - (time.monotonic() - self.started) - schedule.RESERVE_S - 2 * eval_s
            affordable = min(tokens * params.epochs, max(0.0, left) / token_s)
            batch_tokens = trunk["batch_tokens"] if trunk else schedule.step_tokens(params, affordable)
            self._pack(batch_tokens)
            most = math.ceil(params.epochs * len(self.packs.packs))
            step_s = token_s * self.packs.tokens / len(self.packs.packs) + optimizer_s
            steps = min(most, done + max(1, int(left * (1 - EVAL_SHARE) / step_s)))
            evals = max(math.ceil(steps / MOST_EVALS), math.ceil(eval_s / EVAL_SHARE / step_s))
            cadence = {"save_steps": max(1, round(SAVE_EVERY_S / step_s)), "eval_steps": evals}
            fixed |= {"timed": True, "step_s": round(step_s, 4)}
            self.log.say(
                f"  a step takes {step_s:.2f} s: {steps - done} steps ({(steps - done) / len(self.packs.packs):.1%} of "
                f"an epoch) in {self.job.minutes:g} minutes"
            )
        steps = max(steps, done + 1)
        packs_sha256 = self._packs_sha256()
        plan = schedule.make(
            params, steps, most_steps=max(most, steps), batch_tokens=batch_tokens, packs_sha256=packs_sha256,
            **cadence, **fixed,
        )  # fmt: skip
        if trunk:
            plan = plan.with_steps(steps, params.decay_share, done)
        self.log.event("plan", domain=self.job.name, **asdict(plan))
        return plan

    def _pack(self, batch_tokens: int) -> None:
        self.packs = pack(self.samples, batch_tokens, self.job.base.context)
        share = self.packs.trained_tokens / self.packs.tokens
        self.log.say(
            f"  {self.packs.tokens:,} tokens in {len(self.packs.packs):,} steps an epoch of at most {batch_tokens:,}; "
            f"{share:.0%} of them are trained on"
        )

    def _packs_sha256(self) -> str:
        return digest_of([[sample.ids for sample in samples] for samples in self.packs.packs])

    def _pack_of(self, step: int) -> list[Encoded]:
        """The samples of a step, counted from 1: the data's order in the first epoch, a shuffled one in each later."""
        epoch, place = divmod(step - 1, len(self.packs.packs))
        if epoch:
            order = list(range(len(self.packs.packs)))
            random.Random(self.params.seed + epoch).shuffle(order)
            place = order[place]
        return self.packs.packs[place]

    def _measured(self) -> tuple[float, float, float]:
        """Seconds for a token, for an optimizer step, and for the held-out loss, from a few that change nothing."""
        rng = checkpoint.rng_state()
        trial = pack(self.samples, schedule.SMALLEST_STEP, self.job.base.context).packs[:4]
        seconds = []
        for step in trial:
            began = time.monotonic()
            self.stepper.gradients(step)
            seconds.append((time.monotonic() - began) / sum(len(sample.ids) for sample in step))
        began = time.monotonic()
        self.stepper.apply(0.0)
        optimizer_s = time.monotonic() - began
        self.stepper.forget()
        checkpoint.set_rng_state(rng)
        # The first also warms caches. Of the others the fastest counts: a slow moment says nothing about the rest, and
        # the plan is revised as it goes.
        token_s = min(seconds[1:] or seconds)
        # Without gradients it takes a third.
        return token_s, optimizer_s, token_s * sum(len(sample.ids) for sample in self.held) / 3

    def _revise(self) -> None:
        """Fits a timed plan to the speed that was seen."""
        state = self.state
        # Not at every step: the mean of a few says more, and a plan that never rests is hard to follow.
        if not state.plan.timed or self.job.minutes is None or state.step % max(5, state.plan.steps // 20):
            return
        step_s = statistics.fmean(self.recent)
        left = self.job.minutes * 60 - state.seconds
        evals_left = max(0, state.plan.steps - state.step) // state.plan.eval_steps + 1
        plan = state.plan.revised(self.params, state.step, step_s, left - evals_left * self._eval_s)
        if plan != state.plan:
            self.log.say(f"  a step takes {step_s:.2f} s now: {plan.steps} steps instead of {state.plan.steps}")
            self.log.event("plan", domain=self.job.name, **asdict(plan))
            state.plan = plan

    # A step

    def _next_step(self) -> None:
        state, step = self.state, self.state.step + 1
        samples = self._pack_of(step)
        rate = self.params.learning_rate * state.plan.rate(step)
        loss = self.stepper.gradients(samples)
        if not math.isfinite(loss) or not self.stepper.apply(rate):
            self.checkpoints.save(self._content())
            raise self._diverged(f"the loss is {loss} at step {step}, or its gradient is no number")
        state.step = step
        state.tokens += sum(len(sample.ids) for sample in samples)
        state.trained_tokens += sum(sum(sample.trained) for sample in samples)
        state.losses.append([step, round(loss, 6), rate])
        values = [entry[1] for entry in state.losses]
        means = [statistics.fmean(values[at - 8 : at]) for at in range(8, len(values) + 1)]
        if means and means[-1] > min(means) * EXPLODED[0] + EXPLODED[1]:
            raise self._diverged(f"the loss rose from {min(means):.2f} to {means[-1]:.2f} by step {step}")

    def _diverged(self, what: str) -> MeetaraError:
        rate = self.params.learning_rate / 3
        return MeetaraError(
            what,
            where=f"domain {self.job.name}",
            remedy=f"lower the learning rate, for example --set train.learning_rate={rate:.0e}; the last good state is "
            f"kept in {self.checkpoints.local}",
        )

    # Held-out loss

    def _measure_held_out(self) -> None:
        began = time.monotonic()
        loss = self.stepper.loss(self.held)
        self._eval_s = time.monotonic() - began
        self.state.held_out.append([self.state.step, round(loss, 6)])
        self.progress.held_out(self.state.step, self.state.plan.steps, loss)

    _eval_s = 0.0

    def _stop_early(self) -> None:
        """Lets the decay begin where the held-out loss has not fallen for `patience` measurements."""
        state, patience = self.state, self.params.patience
        if not patience or len(state.held_out) <= patience or state.step >= state.plan.trunk_step:
            return
        best = min(loss for _, loss in state.held_out[:-patience])
        if min(loss for _, loss in state.held_out[-patience:]) > best * (1 - NO_PROGRESS):
            state.plan = state.plan.ended_early(self.params, state.step)
            self.log.say(
                f"  the held-out loss has not fallen for {patience} measurements: the learning rate goes down from here"
            )
            self.log.event("early stop", domain=self.job.name, **asdict(state.plan))

    # What is kept

    def _snapshot(self) -> dict[str, Any]:
        state = self.state
        return {
            "step": state.step,
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "losses": [list(entry) for entry in state.losses],
            **self.stepper.state(),
        }

    def _content(self) -> dict[str, Any]:
        return {
            **self.stepper.state(),
            "step": self.state.step,
            "identity": self.job.identity,
            "state": {**vars(self.state), "plan": asdict(self.state.plan)},
        }

    def _finished(self, resumed: bool, train_s: float) -> Trained:
        state, job, plan = self.state, self.job, self.state.plan
        path = job.work / "trained_model.pt"
        checkpoint.save_atomically(
            {
                "format": checkpoint.FORMAT,
                "domain": job.name,
                "category": job.category,
                "base": job.base_name,
                "lora": {
                    "rank": self.adapted.config.r,
                    "alpha": self.adapted.config.lora_alpha,
                    "modules": sorted(self.adapted.config.target_modules or ()),
                },
                "params": self.params.model_dump(),
                "identity": job.identity,
                "plan": asdict(plan),
                "versions": self.versions,
                "data_sha256": job.data_sha256,
                "base_sha256": job.base.identity,
                "adapter": self.adapted.tensors(),
                "trunk": state.trunk,
                "losses": state.losses,
                "held_out": state.held_out,
                "tokens": state.tokens,
                "trained_tokens": state.trained_tokens,
            },
            path,
        )
        self.checkpoints.clear()
        last = [loss for _, loss, _ in state.losses[-5:]]
        return Trained(
            path,
            {
                "steps": plan.steps,
                "batch_tokens": plan.batch_tokens,
                "tokens": state.tokens,
                "trained_tokens": state.trained_tokens,
                "trained_token_share": round(state.trained_tokens / state.tokens, 4),
                "samples_seen": sum(len(self._pack_of(step)) for step in range(1, plan.steps + 1)),
                "epochs": round(plan.steps / len(self.packs.packs), 4),
                "train_s": round(train_s, 1),
                "tokens_per_s": round(self.progress.tokens_per_s, 1),
                "peak_memory_bytes": peak_memory(),
                "first_loss": state.losses[0][1],
                "last_loss": round(statistics.fmean(last), 4),
                "losses": state.losses,
                "held_out": state.held_out,
                "resumed": resumed,
                "device": plan.device,
            },
        )

    @property
    def _device(self) -> str:
        return f"{self.where.kind} {self.where.precision}{' nf4' if self.where.nf4 else ''}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
