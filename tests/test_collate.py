"""Which tokens carry loss, and that packed samples do not see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meetara_nb.errors import MeetaraError
from meetara_nb.training.collate import IGNORED, Encoded, collate, encode, pack

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


def test_collated_positions_restart_and_first_tokens_are_no_targets() -> None:
    batch = collate([[Encoded([5, 6, 7], [True, True, False]), Encoded([8, 9], [True, True])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED, IGNORED, 9]]


def test_packed_samples_do_not_see_one_another() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    a, b = Encoded([1, 2, 3, 4], [True] * 4), Encoded([9, 8, 7, 6, 5], [True] * 5)
    batch = collate([[a, b]])
    with torch.no_grad():
        together = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]  # fmt: skip
        alone = torch.cat([model(input_ids=torch.tensor([s.ids])).logits[0] for s in (a, b)])
    assert torch.allclose(together, alone, atol=1e-5)


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
    with pytest.raises(MeetaraError, match="not a trained model of this lab"):
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


def test_damaged_checkpoints_fall_back_to_the_one_before(tmp_path: Path) -> None:
    from meetara_nb.training.checkpoint import newest_whole, seal

    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_text(str(step))
        if step != 20:  # killed before it was sealed
            seal(folder)
    (tmp_path / "checkpoint-15" / "optimizer.pt").unlink()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
