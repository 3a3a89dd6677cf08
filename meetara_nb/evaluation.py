"""Scores of the exact file shipped, measured through llama.cpp on the held-out checks.

Runs in a child process (`python -m meetara_nb.evaluation`), so that its memory is its own and a crash stays there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .catalogue import Domain
from .gguf_factory.child import run_child, serve_child

KL_CHECKS = 16
"""Checks over whose good answers adapters are compared token by token; each keeps 6 MB of logits in memory."""


def evaluate(
    domain: Domain,
    *,
    base: Path,
    adapter: Path | None,
    adapter_f16: Path | None,
    merged: Path | None,
    answers: int,
    max_answer_tokens: int,
) -> dict[str, Any]:
    """Every figure of one shipped file.

    Args:
        domain: Its checks are the questions.
        base: The base's GGUF file.
        adapter: The shipped adapter, or None where `merged` is shipped.
        adapter_f16: The same adapter unquantised, to say what quantising it cost.
        merged: The shipped standalone model.
        answers: Held-out questions to answer, spread over the checks.
        max_answer_tokens: Where an answer that does not end is cut.

    Returns:
        `base` and `tuned` with `bits_per_byte` and `recall` and one entry a check; `kl_f16`, mean nats a token from the
        unquantised to the quantised adapter (None for a merged model); `load_s`, `adapter_s`, `tokens_per_s`,
        `first_token_s`, `peak_memory_bytes`; and `answers`.
    """
    step = max(1, len(domain.checks) // answers)
    chosen = {check.id for check in domain.checks[::step][:answers]}
    request = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "adapter_f16": str(adapter_f16) if adapter_f16 else None,
        "merged": str(merged) if merged else None,
        "system_prompt": domain.system_prompt,
        "checks": [check.model_dump() for check in domain.checks],
        "answered": sorted(chosen),
        "max_answer_tokens": max_answer_tokens,
    }
    return run_child(__name__, request)


def _evaluate(
    base: str,
    adapter: str | None,
    adapter_f16: str | None,
    merged: str | None,
    system_prompt: str,
    checks: list[dict[str, Any]],
    answered: list[str],
    max_answer_tokens: int,
) -> dict[str, Any]:
    """The child's side of `evaluate`."""
    from .gguf_factory.runtime import Runtime

    def asked(question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]

    runtime = Runtime(Path(base))
    result: dict[str, Any] = {"base": _scores(runtime, asked, checks), "kl_f16": None, "adapter_s": None}
    if merged:
        runtime.close()
        runtime = Runtime(Path(merged))
    else:
        assert adapter is not None
        reference = None
        if adapter_f16:
            runtime.set_adapter(Path(adapter_f16))
            reference = _logits(runtime, asked, checks[:KL_CHECKS])
        result["adapter_s"] = round(runtime.set_adapter(Path(adapter)), 4)
        if reference is not None:
            result["kl_f16"] = _mean_kl(reference, _logits(runtime, asked, checks[:KL_CHECKS]))
            del reference
    result["tuned"] = _scores(runtime, asked, checks)
    result["load_s"] = round(runtime.load_s, 4)
    said = []
    for check in checks:
        if check["id"] in answered:
            answer = runtime.answer(asked(check["question"]), max_answer_tokens)
            said.append({"question": check["question"], "expected": check["good"], **vars(answer)})
    result["answers"] = said
    timed = [answer for answer in said if answer["tokens_per_s"]]
    result["tokens_per_s"] = round(float(np.median([a["tokens_per_s"] for a in timed])), 1) if timed else 0.0
    result["first_token_s"] = round(float(np.median([a["first_token_s"] for a in said])), 3)
    result["peak_memory_bytes"] = _peak_memory()
    runtime.close()
    return result


def _scores(runtime: Any, asked: Any, checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bits per byte of the good answers, and how often the good one is the likeliest by mean log-probability."""
    bits = size = 0.0
    entries = []
    for check in checks:
        prompt = runtime.prompt(asked(check["question"]))
        texts = (check["good"], *check["wrong"])
        log_probs = runtime.log_probs(prompt, [runtime.tokenize(text) for text in texts])
        means = [float(values.mean()) for values in log_probs]
        check_bits, check_bytes = -float(log_probs[0].sum()) / math.log(2), len(check["good"].encode())
        bits, size = bits + check_bits, size + check_bytes
        entries.append(
            {
                "id": check["id"],
                "topic": check["topic"],
                "recalled": means[0] > max(means[1:]),
                "bits_per_byte": round(check_bits / check_bytes, 4),
                "mean_log_probs": [round(mean, 4) for mean in means],
            }
        )
    recalled = sum(entry["recalled"] for entry in entries)
    return {
        "bits_per_byte": round(bits / size, 4),
        "recall": round(recalled / len(entries), 4),
        "recalled": recalled,
        "checks": entries,
    }


def _logits(runtime: Any, asked: Any, checks: Sequence[dict[str, Any]]) -> list[Any]:
    return [
        runtime.logits(runtime.prompt(asked(check["question"])), runtime.tokenize(check["good"])) for check in checks
    ]


def _mean_kl(reference: list[Any], other: list[Any]) -> float:
    """Mean over tokens of KL(reference || other), in nats."""
    from .gguf_factory.runtime import log_softmax

    total, tokens = 0.0, 0
    for p_rows, q_rows in zip(reference, other, strict=True):
        log_p, log_q = log_softmax(p_rows), log_softmax(q_rows)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
        tokens += len(p_rows)
    return round(total / tokens, 6)


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve_child(_evaluate)
