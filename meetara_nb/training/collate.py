"""Chat samples as packed token sequences in which only the assistant's tokens carry loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MeetaraError

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, and for each whether it is trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Packs:
    """The data as the engine sees it.

    Attributes:
        packs: Conversations grouped into steps of at most `batch_tokens` tokens, in the data's order.
        tokens: All tokens.
        trained_tokens: Those that carry loss.
        too_long: Conversations left out because they exceed `max_length`.
    """

    packs: list[list[Encoded]]
    tokens: int
    trained_tokens: int
    too_long: int


def encode(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[Encoded]:
    """Renders conversations with the tokenizer's chat template and marks the assistant's part.

    The template is rendered up to each assistant turn and past it; what lies between, up to and including the token
    that ends the turn, is trained on. So the model learns to answer and to stop, and nothing else.

    Raises:
        MeetaraError: A conversation without an assistant turn, or a template whose beginning depends on its end.
    """

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    texts, spans = [], []
    for number, messages in enumerate(conversations):
        text = render(messages, False)
        found = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = render(messages[:turn], True), render(messages[: turn + 1], False).rstrip()
            if not (text.startswith(before) and text.startswith(through)):
                raise MeetaraError("the chat template rewrites earlier turns", remedy="choose another base")
            found.append((len(before), len(through)))
        if not found:
            raise MeetaraError("a sample has no assistant turn", where=f"sample {number}", remedy="make the data again")
        texts.append(text)
        spans.append(found)
    if not texts:
        raise MeetaraError("the training data holds no samples", remedy="make the data again")
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        Encoded(ids, [any(start >= a and end <= b and end > start for a, b in found) for start, end in offsets])
        for ids, offsets, found in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True)
    ]


def pack(samples: Iterable[Encoded], batch_tokens: int, max_length: int) -> Packs:
    """Groups samples, in order, into packs of at most `batch_tokens` tokens (one longer sample is a pack alone)."""
    packs: list[list[Encoded]] = []
    room = tokens = trained = too_long = 0
    for sample in samples:
        length = len(sample.ids)
        if length > max_length:
            too_long += 1
            continue
        if not packs or length > room:
            packs.append([])
            room = max(batch_tokens, length)
        packs[-1].append(sample)
        room -= length
        tokens += length
        trained += sum(sample.trained)
    if not packs:
        raise MeetaraError(f"every sample is longer than {max_length} tokens", remedy="raise train.max_length")
    return Packs(packs, tokens, trained, too_long)


def collate(batch: list[list[Encoded]]) -> dict[str, torch.Tensor]:
    """One pack as tensors of shape [1, tokens].

    Positions restart at each sample and there is no attention mask: transformers then attends within each sample only
    (with a mask it would not). A sample's first token is never a target, so nothing is predicted across a boundary.
    """
    (samples,) = batch
    ids = [token for sample in samples for token in sample.ids]
    labels = [
        token if trained and place else IGNORED
        for sample in samples
        for place, (token, trained) in enumerate(zip(sample.ids, sample.trained, strict=True))
    ]
    positions = [place for sample in samples for place in range(len(sample.ids))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
