"""Training on a CUDA GPU: speed and memory of the engine and of TRL, fp16 by force, and memory over many domains.

    pip install '.[benchmarks]'
    python tests/gpu/training.py speed --shape qwen2.5-7b                    # bf16 LoRA, then NF4 QLoRA, engine and TRL
    python tests/gpu/training.py speed --shape smollm2-135m --precision fp16  # the path of a T4
    python tests/gpu/training.py domains --shape qwen2.5-1.5b                # 12 adapters on one base
    python tests/gpu/training.py speed --shape tiny                          # tries the script itself, on a CPU too

The weights are random, of the shape that params/bases.yaml states: speed and memory do not ask what they mean. They are
written to a folder (--folder) and loaded as a user's own base is. Each setting runs in a process of its own. What is
printed goes into RESULTS.md, with machine, driver and versions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

STEPS, SAMPLES, RANK = 12, 64, 32


def made(shape_name: str, folder: Path) -> Path:
    """A model folder with random weights of a registered shape, made once."""
    import torch
    from conftest import byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from meetara_nb.params import bases

    target = folder / shape_name
    if (target / "config.json").exists():
        return target
    import tiny

    shape = tiny.SHAPE if shape_name == "tiny" else bases()[shape_name].shape
    config = AutoConfig.for_model(
        shape.architecture, vocab_size=300 if shape_name == "tiny" else 152_064, hidden_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, intermediate_size=shape.feed_forward, max_position_embeddings=8192,
    )  # fmt: skip
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(kind):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    byte_tokenizer().save_pretrained(target)
    model.save_pretrained(target)
    return target


def steps_of(vocabulary: int) -> list[list[Any]]:
    """The same random chat samples for every setting: 80 to 400 tokens, a common beginning, half trained on."""
    from meetara_nb.training.collate import Encoded

    drawn = random.Random(17)
    common = [drawn.randrange(vocabulary) for _ in range(30)]
    found = []
    for _ in range(STEPS):
        step = []
        for _ in range(SAMPLES):
            rest = [drawn.randrange(vocabulary) for _ in range(drawn.randrange(50, 370))]
            step.append(Encoded(common + rest, [n >= (30 + len(rest)) // 2 for n in range(30 + len(rest))]))
        found.append(step)
    return found


def params_of(precision: str, nf4: bool) -> Any:
    from meetara_nb.params import TrainParams

    return TrainParams(precision=precision, base_precision="nf4" if nf4 else "full", lora_rank=RANK)


def warm_base(folder: Path, params: Any) -> Any:
    from meetara_nb import device
    from meetara_nb.training.adapted import WarmBase
    from meetara_nb.training.local import local

    base = local(folder)
    where = device.for_base(device.detect(params.precision), base.parameters, params.base_precision)
    return base, WarmBase(folder, where)


def peak() -> float:
    from meetara_nb.training.progress import peak_memory

    return peak_memory() / 1e9


def engine(folder: Path, precision: str, nf4: bool) -> dict[str, Any]:
    from meetara_nb.runlog import RunLog
    from meetara_nb.training.stepper import Stepper

    params = params_of(precision, nf4)
    base, warm = warm_base(folder, params)
    step_of = Stepper(warm.attach(params), warm.where, base.shape, params, RunLog(None, ""))
    seconds, losses = [], []
    for step in steps_of(warm.model.config.vocab_size):
        began = time.perf_counter()
        losses.append(step_of.gradients(step))
        step_of.apply(1e-4)
        _wait()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "loss": losses[-1], "peak": peak(), "note": f"{step_of.micro_tokens} tokens at once"}


def trl(folder: Path, precision: str, nf4: bool) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from meetara_nb.training import bases

    params = params_of(precision, nf4)
    _, warm = warm_base(folder, params)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.began)

    rows = [
        {"input_ids": s.ids, "assistant_masks": [int(t) for t in s.trained]}
        for step in steps_of(warm.model.config.vocab_size)
        for s in step
    ]
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=warm.model,
            args=SFTConfig(
                output_dir=output, per_device_train_batch_size=8, gradient_accumulation_steps=SAMPLES // 8,
                max_steps=STEPS, learning_rate=1e-4, optim="adamw_bnb_8bit", report_to="none", save_strategy="no",
                logging_steps=1, disable_tqdm=True, bf16=warm.where.precision == "bf16",
                fp16=warm.where.precision == "fp16", use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=bases.load_tokenizer(folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "loss": losses[-1], "peak": peak(), "note": "batches of 8, gradient checkpointing"}


def domains(folder: Path, precision: str, nf4: bool) -> dict[str, Any]:
    """12 adapters, one after another, on one base: bytes held after each."""
    import torch

    from meetara_nb.runlog import RunLog
    from meetara_nb.training.stepper import Stepper

    params = params_of(precision, nf4)
    base, warm = warm_base(folder, params)
    held = []
    for _ in range(12):
        adapted = warm.attach(params)
        step_of = Stepper(adapted, warm.where, base.shape, params, RunLog(None, "", quiet=True))
        step_of.gradients(steps_of(warm.model.config.vocab_size)[0][:16])
        step_of.apply(1e-4)
        del step_of
        adapted.detach()
        held.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    print("bytes held after each domain:", held)
    return {"seconds": [], "loss": 0.0, "peak": peak(), "note": f"grew by {held[-1] - held[1]:,} bytes from 2 to 12"}


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def child(what: Callable[..., dict[str, Any]], pipe: Any, *arguments: Any) -> None:
    try:
        pipe.send(what(*arguments))
    except Exception as error:
        pipe.send({"seconds": [], "loss": float("nan"), "peak": 0.0, "note": f"{type(error).__name__}: {error}"[:160]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "domains"))
    parser.add_argument("--shape", default="qwen2.5-7b", help="a name from params/bases.yaml, or tiny")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "random_bases")
    asked = parser.parse_args()

    from tabulate import tabulate

    from meetara_nb import device
    from meetara_nb.training.engine import _versions

    print(device.detect(asked.precision), _versions())
    context = multiprocessing.get_context("spawn")
    folder = made(asked.shape, asked.folder)
    tokens = sum(len(sample.ids) for step in steps_of(100)[2:] for sample in step)
    runs = [
        (f.__name__, f, nf4) for nf4 in (False, True) for f in ((engine, trl) if asked.what == "speed" else (domains,))
    ]
    rows = []
    for name, function, nf4 in runs:
        here, there = context.Pipe()
        process = context.Process(target=child, args=(function, there, folder, asked.precision, nf4))
        process.start()
        there.close()
        found = here.recv()
        process.join()
        spent = sum(found["seconds"][2:])  # the first two warm up
        rate = f"{tokens / spent:,.0f}" if spent else ""
        rows.append(
            [name, "NF4" if nf4 else "full", rate, f"{found['peak']:.2f}", f"{found['loss']:.3f}", found["note"]]
        )
    print(tabulate(rows, ["", "base", "tokens/s", "peak GB", "last loss", ""], disable_numparse=True))


if __name__ == "__main__":
    main()
