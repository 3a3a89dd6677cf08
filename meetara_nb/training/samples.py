"""The training-data file as encoded conversations, some of them held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import MeetaraError
from ..params import TrainParams
from ..store import Say
from .collate import Encoded, encode


def load(
    data: Path, tokenizer: Any, context: int, params: TrainParams, say: Say
) -> tuple[list[Encoded], list[Encoded]]:
    """The conversations to train on and those held out, evenly over the file, after the lengths were looked at.

    Args:
        data: A training-data file.
        tokenizer: With the base's chat template.
        context: Tokens that the base attends to.
        params: Of them `max_length` and `held_out` count.
        say: For what was found.

    Raises:
        MeetaraError: No such data, none of it usable, or a sample longer than the context.
    """
    encoded = encode(tokenizer, _conversations(data))
    lengths = sorted(len(sample.ids) for sample in encoded)
    longest = params.max_length
    if longest is None and lengths[-1] > context:
        number = next(n for n, sample in enumerate(encoded) if len(sample.ids) == lengths[-1])
        raise MeetaraError(
            f"sample {number} has {lengths[-1]:,} tokens, the base attends to {context:,}",
            where=data,
            remedy=f"leave out such samples with --set train.max_length={context}",
        )
    limit = min(longest or context, context)
    kept = [sample for sample in encoded if len(sample.ids) <= limit]
    if not kept:
        raise MeetaraError(f"every sample is longer than {limit:,} tokens", where=data, remedy="raise train.max_length")
    middle, most = lengths[len(lengths) // 2], lengths[-1]
    say(f"  {len(encoded):,} samples of {lengths[0]} to {most} tokens, half of them up to {middle}")
    if len(kept) < len(encoded):
        say(f"  {len(encoded) - len(kept):,} of them exceed {limit} tokens and are left out")
    count = min(params.held_out, len(kept) // 10)
    places = {(2 * n + 1) * len(kept) // (2 * count) for n in range(count)}
    held = [sample for n, sample in enumerate(kept) if n in places]
    return [sample for n, sample in enumerate(kept) if n not in places], held


def _conversations(data: Path) -> list[list[dict[str, str]]]:
    try:
        return [sample["messages"] for sample in json.loads(data.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeetaraError(
            f"not usable as training data ({type(error).__name__}: {error})", where=data, remedy="remove it, run again"
        ) from None
