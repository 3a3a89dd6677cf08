"""Which tokens carry loss, and that packed samples do not see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meetara_nb.errors import MeetaraError
from meetara_nb.training.collate import Encoded, collate, encode, pack, split

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "very well"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "no idea"},
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE without merges, with ChatML's marks as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|im_end|>")
    wrapped.chat_template = CHATML
    return wrapped


def test_only_the_assistant_and_its_end_are_trained(tokenizer: Any) -> None:
    (sample,) = encode(tokenizer, [TALK])
    trained = tokenizer.decode([token for token, on in zip(sample.ids, sample.trained, strict=True) if on])
    assert trained == "very well<|im_end|>no idea<|im_end|>"
    assert tokenizer.decode(sample.ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_samples_without_an_answer_are_refused(tokenizer: Any) -> None:
    with pytest.raises(MeetaraError, match="sample 1: a sample has no assistant turn"):
        encode(tokenizer, [TALK, TALK[:2]])
    with pytest.raises(MeetaraError, match="no samples"):
        encode(tokenizer, [])


def test_packs_keep_the_order_and_the_limit() -> None:
    samples = [Encoded([n] * length, [True] * length) for n, length in enumerate((30, 30, 50, 100, 10, 120))]
    packs = pack(samples, 100, 110)
    assert [[len(s.ids) for s in samples] for samples in packs.packs] == [[30, 30], [50], [100], [10]]
    assert (packs.tokens, packs.trained_tokens, packs.too_long) == (220, 220, 1)
    with pytest.raises(MeetaraError, match="every sample is longer"):
        pack(samples, 100, 5)


def test_collated_samples_are_laid_end_to_end() -> None:
    batch = collate([Encoded([5, 6, 7], [True, True, False]), Encoded([8, 9], [True, True])])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9] and batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.blocks == [(1, 3), (1, 2)] and batch.slots is None and batch.first is None
    # A sample's first token is nobody's target: nothing is predicted across a boundary.
    assert batch.rows.tolist() == [0, 3] and batch.targets.tolist() == [6, 9]


def test_a_common_beginning_is_held_once() -> None:
    a, b = Encoded([5, 6, 7], [False, True, True]), Encoded([5, 6, 8, 9], [False, True, True, True])
    batch = collate([a, b])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9] and batch.positions.tolist() == [0, 1, 2, 2, 3]
    assert batch.slots is not None and batch.first is not None
    assert batch.ids[batch.slots].tolist() == [*a.ids, *b.ids]
    assert batch.first.tolist() == [0, 1, 2, 5, 6]
    assert batch.rows.tolist() == [0, 1, 0, 1, 3] and batch.targets.tolist() == [6, 7, 6, 8, 9]
    padded = collate([a, b], pad=True)
    assert padded.blocks == [(2, 4)] and padded.slots is not None and len(padded.slots) == 8
    assert padded.rows.tolist() == batch.rows.tolist()
    # As many places as tokens, yet not the same ones: 2 shared, 2 padded.
    both = collate([Encoded([1, 2, 3], [True] * 3), Encoded([1, 2, 4, 5, 6], [True] * 5)], pad=True)
    assert both.slots is not None and len(both.slots) == 10 and len(both.ids) == 6


def test_micro_batches_hold_what_fits_and_all_of_it() -> None:
    samples = [Encoded([n] * length, [True] * length) for n, length in enumerate((30, 90, 50, 20))]
    parts = split(samples, 100)
    assert sorted(sample.ids[0] for part in parts for sample in part) == [0, 1, 2, 3]
    assert [[len(s.ids) for s in part] for part in parts] == [[90], [50, 30, 20]]


def test_where_a_template_drops_thinking_the_last_answer_is_trained(tokenizer: Any) -> None:
    thinking = CHATML.replace(
        "m['content'] +", "('<t>' if m['role'] == 'assistant' and loop.last else '') + m['content'] +"
    )
    plain, tokenizer.chat_template = tokenizer.chat_template, thinking
    try:
        (sample,) = encode(tokenizer, [TALK])
    finally:
        tokenizer.chat_template = plain
    assert (
        tokenizer.decode([t for t, on in zip(sample.ids, sample.trained, strict=True) if on]) == "<t>no idea<|im_end|>"
    )


def test_a_trained_model_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    from meetara_nb.training.checkpoint import load_trained_model

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "boom",))

    path = tmp_path / "x_trained_model.pt"
    torch.save({"format": Bomb()}, path)
    with pytest.raises(MeetaraError, match="cannot be loaded as weights"):
        load_trained_model(path)
    assert not (tmp_path / "boom").exists()
    path.write_bytes(pickle.dumps({"format": 1})[:5])
    with pytest.raises(MeetaraError, match="cannot be loaded as weights"):
        load_trained_model(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(MeetaraError, match="not a trained model of this version of the lab"):
        load_trained_model(path)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    from meetara_nb.training.checkpoint import save_atomically

    text = "".join(["to", "rch"])
    weight = torch.arange(6.0).reshape(2, 3)
    first = {"a": text, "b": [text, "torch"], "w": weight, "v": weight}
    second = {"a": "torch", "b": ["".join(["torc", "h"]), text], "w": weight.clone(), "v": weight.T.clone().T}
    for name, content in (("1", first), ("2", second)):
        (tmp_path / name).mkdir()
        save_atomically(content, tmp_path / name / "x.pt")
    assert (tmp_path / "1" / "x.pt").read_bytes() == (tmp_path / "2" / "x.pt").read_bytes()
    assert torch.equal(torch.load(tmp_path / "1" / "x.pt")["v"], weight)
