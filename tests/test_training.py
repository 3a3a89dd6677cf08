"""The training engine on tiny random models: the gradients of plain transformers, and the same end after any break."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from meetara_nb import device
from meetara_nb.errors import MeetaraError
from meetara_nb.params import TrainParams
from meetara_nb.runlog import RunLog
from meetara_nb.store import sha256_of
from meetara_nb.training import schedule
from meetara_nb.training.adapted import Adapted, WarmBase
from meetara_nb.training.checkpoint import Checkpoints, load_trained_model
from meetara_nb.training.collate import Encoded, collate
from meetara_nb.training.decoder import Decoder
from meetara_nb.training.engine import Job, Trained, train
from meetara_nb.training.local import local
from meetara_nb.training.stepper import Stepper

CPU = device.Device("cpu", "test", "fp32", "", 8_000_000_000)
QUIET = RunLog(None, "", quiet=True)


def family(name: str) -> Any:
    """A tiny random model of a family."""
    torch.manual_seed(3)
    special = {"head_dim": 16} if name == "qwen3" else {}
    config = AutoConfig.for_model(
        name, vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=name != "mistral",
        initializer_range=0.15, **special, **({"sliding_window": None} if name == "mistral" else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in model.parameters():  # norms and biases that are not 1 and 0
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=weight.mean().item(), std=0.2)
    return model


def talk(seed: int, count: int, beginning: int = 6) -> list[Encoded]:
    """Samples of random tokens that begin alike, about half of each trained on."""
    drawn = random.Random(seed)
    common = [drawn.randrange(97) for _ in range(beginning)]
    samples = []
    for _ in range(count):
        rest = [drawn.randrange(97) for _ in range(drawn.randrange(8, 30))]
        samples.append(Encoded(common + rest, [False] * (beginning + 4) + [True] * (len(rest) - 4)))
    return samples


def adapted(model: Any, rank: int = 4) -> Any:
    """`model` with an adapter whose B is not zero, so that A has a gradient too."""
    result = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    torch.manual_seed(4)
    for name, weight in result.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return result


def padded_loss(model: Any, samples: list[Encoded]) -> torch.Tensor:
    """The reference: transformers' own forward pass over a padded batch, all logits, mean over the trained tokens."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([sample.ids + [0] * (width - len(sample.ids)) for sample in samples])
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (width - len(sample.ids)) for sample in samples])
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        for place, trained in enumerate(sample.trained):
            if trained and place:
                labels[row, place] = sample.ids[place]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_ten_steps_are_those_of_plain_transformers(name: str) -> None:
    """Parameters after ten steps: packed, shared and by hand against padded and unpacked."""
    ours, plain = adapted(family(name)), adapted(family(name))
    flat = Adapted(ours)
    decoder = Decoder(ours.train())
    assert decoder.fast == (name != "gemma2")
    trained = [weight for weight in plain.parameters() if weight.requires_grad]
    optimizers = torch.optim.AdamW([flat.weights], lr=3e-3), torch.optim.AdamW(trained, lr=3e-3)
    for step in range(10):
        samples = talk(step, 5)
        flat.weights.grad.zero_()
        batch = collate(samples, share=decoder.shares_beginnings)
        (decoder.loss(batch) / len(batch.targets)).backward()
        optimizers[1].zero_grad()
        padded_loss(plain, samples).backward()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.cat([weight.detach().flatten() for weight in trained])
    started = torch.cat([w.detach().flatten() for w in adapted(family(name)).parameters() if w.requires_grad])
    difference = (flat.weights - expected).norm() / (expected - started).norm()
    assert difference < 2e-3, f"{difference:.1e} of the distance travelled"


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_sharing_padding_and_recomputing_change_no_gradient(pad: bool, recompute: bool) -> None:
    samples, gradients = talk(1, 6), []
    for options in ({"share": False}, {"share": True, "pad": pad}):
        model = Adapted(adapted(family("llama")))
        decoder = Decoder(model.model.train())
        if recompute and options["share"]:
            decoder.recompute_activations()
        batch = collate(samples, **options)
        decoder.loss(batch).backward()
        gradients.append(model.weights.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max())


def test_the_loss_is_that_of_transformers_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = adapted(family("qwen2")), talk(2, 4)
    batch = collate(samples)
    whole = Decoder(model).loss(batch)
    monkeypatch.setattr("meetara_nb.training.decoder.LOSS_ROWS", 7)
    chunked = Decoder(model).loss(batch)
    with torch.no_grad():
        unrecorded = Decoder(model).loss(batch)
    expected = padded_loss(model, samples) * len(batch.targets)
    for value in (whole, chunked, unrecorded):
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_is_dropped_out_where_the_loss_is_only_measured() -> None:
    plain, thinned = (
        get_peft_model(family("llama"), LoraConfig(r=4, lora_dropout=p, target_modules="all-linear"))
        for p in (0.0, 0.9)
    )
    for model in (plain, thinned):
        torch.manual_seed(4)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
    batch = collate(talk(2, 4))
    assert Decoder(thinned.eval()).loss(batch).item() == Decoder(plain.eval()).loss(batch).item()
    assert Decoder(thinned.eval()).shares_beginnings and not Decoder(thinned.train()).shares_beginnings


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_goes_the_same_way(precision: str) -> None:
    """The paths of GPUs, on the CPU: a frozen base in 16 bits, fp32 adapters, and for fp16 a loss scaler."""
    losses = {}
    for kind in ("fp32", precision):
        base = family("llama").to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind])
        model = Adapted(adapted(base))
        shape = tiny.SHAPE
        step = Stepper(model, replace(CPU, precision=kind), shape, TrainParams(optimizer="adamw"), QUIET)
        assert step.scaler.is_enabled() == (kind == "fp16")
        found = []
        for n in range(30):
            found.append(step.gradients(talk(n % 3, 6)))
            assert step.apply(3e-3)
        assert model.weights.dtype == torch.float32
        losses[kind] = found
    assert losses[precision][-1] < losses[precision][0] - 0.1
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], abs=0.1)


def test_when_memory_runs_out_batches_shrink_and_the_gradient_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = talk(5, 12)
    most = max(len(sample.ids) for sample in samples)
    whole = Decoder.loss
    gradients = []
    for limit in (10_000, most + 10):

        def loss(self: Decoder, batch: Any, limit: int = limit) -> Any:
            if len(batch.ids) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(self, batch)

        monkeypatch.setattr(Decoder, "loss", loss)
        model = Adapted(adapted(family("llama")))
        step = Stepper(model, CPU, tiny.SHAPE, TrainParams(), RunLog(None, ""))
        step.gradients(samples)
        gradients.append(model.weights.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max())
    assert "out of memory: at most" in capsys.readouterr().out and step.micro_tokens < 10_000
    monkeypatch.setattr(Decoder, "loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(
        MeetaraError, match=r"not enough memory on test for one sample of .* tokens -> --set train.base"
    ):
        step.gradients(samples)


# The engine from data to trained model


def messages(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"what is {n} plus 1?"},
                {"role": "assistant", "content": f"it is {n + 1}"},
            ]
        }
        for n in range(count)
    ]


@pytest.fixture
def job(tmp_path: Path, tiny_base: Path) -> Callable[..., Job]:
    def make(work: str = "work", samples: int = 60, **changes: Any) -> Job:
        data = tmp_path / f"data_{samples}.json"
        if not data.exists():
            data.write_text(json.dumps({"samples": messages(samples)}))
        settings = {"max_steps": 12, "batch_tokens": 256, "lora_dropout": 0.1, "learning_rate": 1e-3, "held_out": 4}
        outside = {name: changes.pop(name) for name in ("minutes", "lasting", "before", "base") if name in changes}
        base = outside.pop("base", None) or local(tiny_base)
        return Job(
            "sums", "education", "tiny", base, data, sha256_of(data), TrainParams(**{**settings, **changes}),
            work=tmp_path / work, **{"minutes": None, **outside},
        )  # fmt: skip

    return make


@pytest.fixture
def go(tiny_base: Path) -> Callable[..., Trained]:
    def run(job: Job, log: RunLog = QUIET) -> Trained:
        return train(job, lambda: WarmBase(tiny_base, CPU), log)

    return run


class Break(RunLog):
    """A log that breaks the training off after a step."""

    def __init__(self, step: int) -> None:
        super().__init__(None, "", quiet=True)
        self.at = step

    def event(self, event: str, *, domain: str = "", **fields: Any) -> None:
        if event == "step" and fields["step"] == self.at:
            raise KeyboardInterrupt


def test_a_mixture_of_domains_is_trained_on(
    job: Callable[..., Job], go: Callable[..., Trained], tmp_path: Path
) -> None:
    from test_mixture import write

    from meetara_nb.hub.mixture import mix

    files = {"birds": write(tmp_path / "b", "birds", 60, "bird"), "cats": write(tmp_path / "c", "cats", 20, "cat")}
    mixture = mix(files, 40, 5.0, 1, 0.8)
    one = job()
    one.data.write_text(json.dumps({"samples": mixture.samples, "mixture": mixture.report}))
    assert go(one).facts["losses"][-1][1] < go(job("less", max_steps=2)).facts["losses"][0][1]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
def test_a_broken_training_ends_as_the_whole_one(
    job: Callable[..., Job], go: Callable[..., Trained], optimizer: str
) -> None:
    whole = go(job("whole", optimizer=optimizer))
    for step in (1, 5, 9, 10, 11):
        with pytest.raises(KeyboardInterrupt):
            go(job("broken", optimizer=optimizer), Break(step))
    ended = go(job("broken", optimizer=optimizer))
    assert ended.facts["resumed"] and ended.path.read_bytes() == whole.path.read_bytes()
    content = load_trained_model(whole.path)
    assert [int(step) for step, _, _ in content["losses"]] == list(range(1, 13))
    assert content["trunk"]["step"] == 8 and content["held_out"][0][0] == 0 and content["held_out"][-1][0] == 12


def test_another_machine_goes_on_from_the_lasting_copy(
    job: Callable[..., Job], go: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meetara_nb.training.engine.LASTING_EVERY_S", 0.0)
    whole = go(job("whole", lasting=tmp_path / "none"))
    lasting = tmp_path / "drive"
    with pytest.raises(KeyboardInterrupt):
        go(job("first machine", lasting=lasting), Break(7))
    assert sorted(path.name for path in lasting.iterdir()) == [
        "step-000003.json", "step-000003.pt", "step-000006.json", "step-000006.pt",
    ]  # fmt: skip
    log = Collected()
    ended = go(job("second machine", lasting=lasting), log)
    assert "going on from step 6 of 12" in log.text and ended.path.read_bytes() == whole.path.read_bytes()
    assert not lasting.exists(), "a finished training leaves nothing on the drive"


class Collected(RunLog):
    def __init__(self) -> None:
        super().__init__(None, "")
        self.text = ""

    def say(self, text: str) -> None:
        self.text += text + "\n"


def test_a_damaged_checkpoint_falls_back_and_a_lost_drive_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    drive = tmp_path / "drive"
    drive.write_text("not a folder any more")
    checkpoints = Checkpoints(tmp_path / "local", drive, 0.0, said.append)
    for step in (5, 10, 15):
        checkpoints.save({"step": step})
    assert "could not be copied" in said[0] and "training goes on" in said[0]
    assert [path.stem for path in sorted((tmp_path / "local").glob("*.pt"))] == ["step-000010", "step-000015"]
    newest = tmp_path / "local" / "step-000015.pt"
    newest.write_bytes(newest.read_bytes()[:-20])
    drive.unlink()
    found = checkpoints.newest()
    assert found is not None and found["step"] == 10 and "damaged or unfinished" in said[-1]
    newest.with_suffix(".json").unlink()  # killed before it was sealed
    assert checkpoints.newest()["step"] == 10
    torch.save({"format": "meetara-checkpoint/0"}, tmp_path / "local" / "step-000020.pt")
    seal = {"sha256": sha256_of(tmp_path / "local" / "step-000020.pt")}
    (tmp_path / "local" / "step-000020.json").write_text(json.dumps(seal))
    with pytest.raises(MeetaraError, match=r"step-000020.pt: not a checkpoint"):
        checkpoints.newest()


def test_a_later_session_goes_on_before_the_decay(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    short = go(job("short"))
    long = go(job("long", max_steps=30, before=short.path), log := Collected())
    assert "going on from step 8 of the training before" in log.text
    steps = [int(step) for step, _, _ in long.facts["losses"]]
    assert steps == list(range(1, 31)) and long.facts["losses"][:8] == short.facts["losses"][:8]
    assert all(rate == 1e-3 for _, _, rate in long.facts["losses"][8:20]), "no second warm-up"
    for changes in ({"learning_rate": 2e-3}, {"go_on": False}, {"max_steps": 8}):
        other = go(job(f"other {changes}", before=short.path, **{"max_steps": 30, **changes}))
        assert not other.facts["resumed"]


def test_one_base_serves_many_adapters(tiny_base: Path) -> None:
    warm = WarmBase(tiny_base, CPU)
    before = {name: weight.clone() for name, weight in warm.model.state_dict().items()}

    def held() -> int:
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))

    sizes, first = [], None
    for _ in range(4):
        one = warm.attach(TrainParams(lora_rank=8))
        first = one.weights.detach().clone() if first is None else first
        assert torch.equal(one.weights, first), "the same seed gives the same adapter"
        Decoder(one.model).loss(collate([Encoded([1, 2, 3], [True] * 3)])).backward()
        one.detach()
        sizes.append(held())
    assert len(set(sizes)) == 1, sizes
    after = warm.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_loss_that_is_no_number_stops_with_a_hint(
    job: Callable[..., Job], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = WarmBase(tiny_base, CPU)
    whole = Stepper.gradients
    calls = []

    def gradients(self: Stepper, samples: Any) -> float:
        calls.append(1)
        if len(calls) == 8:
            warm.model.model.norm.weight.fill_(float("nan"))
        return whole(self, samples)

    monkeypatch.setattr(Stepper, "gradients", gradients)
    with pytest.raises(
        MeetaraError, match=r"the loss is nan at step 8.* -> lower the learning rate, .* last good state"
    ):
        train(job(), lambda: warm, QUIET)
    newest = sorted((tmp_path / "work" / "checkpoints").glob("*.pt"))[-1]
    content = torch.load(newest, weights_only=True)
    assert content["step"] == 7 and torch.isfinite(content["weights"]).all()


def test_a_loss_that_explodes_stops_with_a_hint(
    job: Callable[..., Job], go: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Stepper.gradients
    losses = iter([3.0 - 0.02 * n for n in range(30)] + [2.4 + 0.5 * n for n in range(30)])
    monkeypatch.setattr(Stepper, "gradients", lambda self, samples: (whole(self, samples), next(losses))[1])
    with pytest.raises(MeetaraError, match=r"the loss rose from 2\.\d\d to 4\.\d\d by step \d\d.* -> lower"):
        go(job(max_steps=60))


def test_no_progress_lets_the_decay_begin(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    log = Collected()
    ended = go(job(learning_rate=1e-9, max_steps=100, patience=2, lora_dropout=0.0), log)
    assert "the held-out loss has not fallen for 2 measurements" in log.text
    assert ended.facts["steps"] < 100 and ended.facts["losses"][-1][2] < 1e-9


def test_tensorboard_files_on_request(job: Callable[..., Job], go: Callable[..., Trained], tmp_path: Path) -> None:
    go(job(tensorboard=True, max_steps=3), RunLog(tmp_path / "run", "x", quiet=True))
    (events,) = (tmp_path / "run" / "tensorboard" / "sums").iterdir()
    assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 300


# What is wrong with the input


def test_data_that_cannot_be_used(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    def fails(content: Any, match: str, **changes: Any) -> None:
        one = job(**changes)
        one.data.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(MeetaraError, match=match):
            go(one)

    fails("", "not usable as training data")
    fails("[1, 2]", "not usable as training data")
    fails({"samples": []}, "the training data holds no samples")
    fails({"samples": [{"messages": messages(1)[0]["messages"][:2]}]}, "sample 0: a sample has no assistant turn")
    long = [
        *messages(30),
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 600}]},
    ]
    fails(
        {"samples": long}, r"sample 30 has 6\d\d tokens, the base attends to 512 -> leave out such samples with --set"
    )
    fails({"samples": long[-1:]}, "every sample is longer than 64 tokens", max_length=64)


def test_longer_samples_are_left_out_when_asked(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    one = job(max_length=100, max_steps=2)
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 600}]}
    one.data.write_text(json.dumps({"samples": [*messages(30), long]}))
    go(one, log := Collected())
    assert "1 of them exceed 100 tokens and are left out" in log.text


def test_a_checkpoint_of_another_training_is_not_used(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(job(), Break(9))
    ended = go(job(learning_rate=5e-4), log := Collected())
    assert "belongs to another training" in log.text and not ended.facts["resumed"]


def test_changed_libraries_are_named(
    job: Callable[..., Job], go: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(job(), Break(9))
    now = {"torch": "9.9", "transformers": "1", "peft": "1", "bitsandbytes": "1"}
    monkeypatch.setattr("meetara_nb.training.engine._versions", lambda: now)
    go(job(), log := Collected())
    assert "WARNING: libraries changed since this training began (torch" in log.text and "-> 9.9" in log.text


def test_a_full_disk_is_one_clear_error(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    import resource
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(MeetaraError, match=r"state could not be saved .* -> make room, or choose another disk"):
            go(job("full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    whole = go(job("whole"))
    assert go(job("full")).path.read_bytes() == whole.path.read_bytes()


# The plan


def plan_of(steps: int, **changes: Any) -> schedule.Plan:
    fixed = {
        "most_steps": 1000, "timed": True, "batch_tokens": 512, "save_steps": 10, "eval_steps": 20, "step_s": 1.0,
        "packs_sha256": "", "device": "cpu fp32", "versions": {},
    }  # fmt: skip
    return schedule.make(TrainParams(), steps, **{**fixed, **changes})


def test_the_learning_rate_rises_stays_and_falls() -> None:
    plan = plan_of(100)
    rates = [plan.rate(step) for step in range(1, 101)]
    assert (plan.warmup_steps, plan.decay_steps, plan.trunk_step) == (5, 30, 70)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(rates[5:70]) == {1.0}
    assert rates[70:] == sorted(rates[70:], reverse=True) and 0 < rates[-1] < 0.04
    for steps in (1, 2, 3, 6):
        few = plan_of(steps)
        assert all(0 < few.rate(step) <= 1 for step in range(1, steps + 1)) and few.trunk_step >= 0


def test_a_timed_plan_follows_the_speed_until_the_decay() -> None:
    params, plan = TrainParams(), plan_of(100)
    slower = plan.revised(params, 20, 2.0, 85.0)  # 80 s left for steps of 2 s
    assert slower.steps == 60 and slower.trunk_step == 42
    assert plan.revised(params, 20, 1.0, 85.0) is plan, "as expected"
    assert plan.revised(params, 75, 5.0, 10.0) is plan, "not once the decay has begun"
    late = plan.revised(params, 50, 4.0, 45.0)
    assert late.steps == 60 and late.trunk_step == 50, "the decay begins at once"
    assert plan.revised(params, 20, 0.01, 500.0).steps == 1000, "no more than the epochs"
    assert replace(plan, timed=False).revised(params, 20, 9.0, 10.0).steps == 100


def test_the_size_of_a_step_follows_the_tokens() -> None:
    sizes = {tokens: schedule.step_tokens(TrainParams(), tokens) for tokens in (1e3, 9e4, 6e5, 5e6, 1e9)}
    assert sizes == {1e3: 512, 9e4: 512, 6e5: 2048, 5e6: 16384, 1e9: 16384}
    assert schedule.step_tokens(TrainParams(batch_tokens=700), 1e9) == 700


def test_time_is_planned_and_kept_track_of(job: Callable[..., Job], go: Callable[..., Trained]) -> None:
    ended = go(job(max_steps=None, minutes=0.2, batch_tokens=None), log := Collected())
    assert "in 0.2 minutes" in log.text
    content = load_trained_model(ended.path)
    assert content["plan"]["timed"] and content["plan"]["step_s"] > 0
    assert 1 <= ended.facts["steps"] <= content["plan"]["most_steps"]


# Bases


def test_a_base_must_fit_or_goes_to_four_bits() -> None:
    found = replace(CPU, kind="cuda", precision="fp16", memory_bytes=15_000_000_000)
    assert not device.for_base(found, 1_543_714_304).nf4
    big = device.for_base(found, 7_615_616_512)
    assert big.nf4 and "17.7 GB are needed otherwise, 15.0 GB are free" in big.reason
    assert device.for_base(found, 1, "nf4").nf4 and not device.for_base(found, 10**12, "full").nf4


def test_registered_shapes_are_those_of_the_configurations() -> None:
    """The parameters that the registry states are those that transformers counts for its shape."""
    from meetara_nb.params import bases

    for name, base in bases().items():
        shape = base.shape
        vocabulary = {"llama": 49152, "qwen2": 151936, "qwen3": 151936, "mistral": 32768}[shape.architecture]
        if name == "qwen2.5-7b":
            vocabulary = 152064
        config = AutoConfig.for_model(
            shape.architecture, vocab_size=vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
            intermediate_size=shape.feed_forward, tie_word_embeddings=name not in ("qwen2.5-7b", "mistral-7b"),
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(weight.numel() for weight in model.parameters()) == base.parameters, name


def test_a_folder_of_the_users_own(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    base = local(tiny_base)
    assert base.shape == tiny.SHAPE and base.context == 512
    assert base.parameters == sum(weight.numel() for weight in tiny.model().parameters())
    copy_ = tmp_path / "copy"
    shutil.copytree(tiny_base, copy_)
    weights = copy_ / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MeetaraError, match=r"model.safetensors: not a whole safetensors file"):
        local(copy_)
    weights.unlink()
    with pytest.raises(MeetaraError, match=r"has no weights \(\*.safetensors\)"):
        local(copy_)
    (copy_ / "config.json").unlink()
    with pytest.raises(MeetaraError, match=r"not a model folder: config.json"):
        local(copy_)


def test_a_gguf_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    tiny.write(tiny.model(), path)
    base = local(path)
    assert base.shape == tiny.SHAPE and base.pre_tokenizer == "smollm" and base.identity == sha256_of(path)
    path.write_bytes(b"GGUF rubbish")
    with pytest.raises(MeetaraError, match="no GGUF file"):
        local(path)


def test_adapters_of_another_base_are_refused(
    job: Callable[..., Job], go: Callable[..., Trained], tiny_base: Path, tmp_path: Path
) -> None:
    """A checkpoint that claims to be this training's, with weights of another shape."""
    with pytest.raises(KeyboardInterrupt):
        go(job(), Break(9))
    (newest,) = sorted((tmp_path / "work" / "checkpoints").glob("*.pt"))[-1:]
    content = torch.load(newest, weights_only=True)
    content["weights"] = content["weights"][:-64]
    torch.save(content, newest)
    newest.with_suffix(".json").write_text(json.dumps({"sha256": sha256_of(newest)}))
    with pytest.raises(MeetaraError, match="the checkpoint's adapter does not fit this base"):
        go(job())


# Killed


def in_a_process(job: Job, folder: Path, base: Path) -> None:
    """A training in a process of its own, which says every step in `folder`."""
    train(job, lambda: WarmBase(base, CPU), RunLog(folder, "x", quiet=True))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_the_whole_one(
    job: Callable[..., Job], go: Callable[..., Trained], tiny_base: Path, tmp_path: Path
) -> None:
    """20 times SIGKILL: the same bytes at the end, and each time no more is lost than the steps since a checkpoint."""
    import multiprocessing
    import time

    options = {"max_steps": 200, "samples": 200, "learning_rate": 3e-4}
    whole = go(job("whole", **options))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["meetara_nb.training.engine", "bitsandbytes", "transformers.models.llama.modeling_llama"]
    )
    drawn, kills, ended, log = random.Random(11), 0, 0, RunLog(tmp_path / "run", "x")
    seen = 0
    while kills < 20:
        process = context.Process(target=in_a_process, args=(job("killed", **options), tmp_path / "run", tiny_base))
        process.start()
        while process.is_alive() and not any(event["event"] == "step" for event in list(log.events())[seen:]):
            time.sleep(0.01)
        process.join(drawn.uniform(0.0, 2.0))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        steps = [event["step"] for event in list(log.events())[seen:] if event["event"] == "step"]
        before = [event["step"] for event in list(log.events())[:seen] if event["event"] == "step"]
        if steps and before and before[-1] < 200:
            assert before[-1] - 50 <= steps[0] - 1 <= before[-1], "at most the steps since the last checkpoint"
        seen = len(list(log.events()))
        if process.exitcode == 0:
            assert (tmp_path / "killed" / "trained_model.pt").read_bytes() == whole.path.read_bytes()
            (tmp_path / "killed" / "trained_model.pt").unlink()
            ended += 1
    assert go(job("killed", **options)).path.read_bytes() == whole.path.read_bytes()
    assert not list((tmp_path / "killed").glob("**/*.partial")), ended
