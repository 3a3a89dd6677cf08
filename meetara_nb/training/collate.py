"""Chat samples as batches of tokens in which only the assistant's carry loss, without padding or repetition."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MeetaraError


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, and for each whether it is trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Packs:
    """The data as the engine sees it.

    Attributes:
        packs: Conversations grouped into optimizer steps of at most `batch_tokens` tokens, in the data's order.
        tokens: All tokens.
        trained_tokens: Those that carry loss.
        too_long: Conversations left out because they exceed `max_length`.
    """

    packs: list[list[Encoded]]
    tokens: int
    trained_tokens: int
    too_long: int


@dataclass(frozen=True)
class Batch:
    """Some conversations as tensors, a token that several of them begin with in common held once.

    Attributes:
        ids, positions: Of every token that is computed; shape [tokens].
        slots: For every place of the blocks, laid end to end, the token that stands there; None where that is simply
            0, 1, 2 and so on.
        first: For every token, the first place where it stands; None likewise.
        blocks: The places in which attention is causal: (samples, places for each), in the order of `slots`. Padding,
            if any, is at the ends, where no token attends to it.
        rows: The tokens whose next one is trained on, once for each sample; `targets`: that next one. Shape [trained].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None
    first: torch.Tensor | None
    blocks: list[tuple[int, int]]
    rows: torch.Tensor
    targets: torch.Tensor

    def to(self, device: str) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device) if torch.is_tensor(value) else value for name, value in vars(self).items()
        }
        return Batch(**moved)


def encode(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[Encoded]:
    """Renders conversations with the tokenizer's chat template and marks the assistant's part.

    The template is rendered up to each assistant turn and past it; what lies between, up to and including the token
    that ends the turn, is trained on. So the model learns to answer and to stop, and nothing else. Where a template
    writes earlier turns otherwise once others follow (as those that drop a model's thinking do), only the last answer
    is trained on.

    Raises:
        MeetaraError: A conversation without an assistant turn, or a template that changes even what precedes the last.
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
            if text.startswith(before) and text.startswith(through):
                found.append((len(before), len(through)))
            elif turn == len(messages) - 1:
                raise MeetaraError("the chat template rewrites what precedes an answer", remedy="choose another base")
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


def split(samples: Sequence[Encoded], tokens: int) -> list[list[Encoded]]:
    """The samples of a step as micro-batches of at most `tokens` tokens each, similar lengths together."""
    return pack(sorted(samples, key=lambda sample: -len(sample.ids)), tokens, sys.maxsize).packs


def collate(samples: Sequence[Encoded], *, share: bool = True, pad: bool = False) -> Batch:
    """Conversations as one batch.

    Args:
        samples: At least one.
        share: Hold tokens once with which several samples begin: their hidden states are the same by causality, so one
            pass, with the gradients of all, is exact.
        pad: Make one block of all samples, for devices where one large kernel beats many small ones; without it each
            sample is a block of its own, and no place is padding.
    """
    ids: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = []
    known: dict[tuple[int, int], int] = {}
    for sample in samples:
        before, path = -1, []
        for place, token in enumerate(sample.ids):
            at = known.get((before, token)) if share else None
            if at is None:
                at = len(ids)
                known[before, token] = at
                ids.append(token)
                positions.append(place)
            path.append(at)
            before = at
        paths.append(path)
    rows, targets = [], []
    for sample, path in zip(samples, paths, strict=True):
        for place in range(1, len(path)):
            if sample.trained[place]:
                rows.append(path[place - 1])
                targets.append(sample.ids[place])
    width = max(map(len, paths))
    blocks = [(len(paths), width)] if pad else [(1, len(path)) for path in paths]
    slots = [at for path in paths for at in path + [0] * (width - len(path) if pad else 0)]
    placed = slots == list(range(len(ids)))
    first: list[int] = [0] * len(ids)
    for place in range(len(slots) - 1, -1, -1):
        first[slots[place]] = place
    return Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slots=None if placed else torch.tensor(slots),
        first=None if placed else torch.tensor(first),
        blocks=blocks,
        rows=torch.tensor(rows, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
    )
