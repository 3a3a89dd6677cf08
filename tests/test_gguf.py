"""The GGUF Factory on a tiny random model: what llama.cpp computes is what transformers computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model_state_dict

from meetara_nb.errors import MeetaraError
from meetara_nb.gguf_factory import adapter, convert, merge, quantize, verify
from meetara_nb.gguf_factory.child import run_child
from meetara_nb.gguf_factory.gguf_io import decode, open_gguf, tensors_like
from meetara_nb.gguf_factory.runtime import Runtime, log_softmax
from meetara_nb.metadata import modelfile
from meetara_nb.quants import ADAPTER_TYPES, LEVELS
from meetara_nb.store import sha256_of

TEXT = "How long does a cold last, and what helps?"
HEADER: dict[str, str | int | float] = {"general.name": "tiny adapter", "meetara.domain": "tiny", "meetara.x.steps": 7}


class Made:
    """The tiny model in all its forms, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base_F16.gguf"
        model = tiny.model()
        tiny.write(model, self.base)
        adapted = tiny.with_adapter(model)
        weights = {name: w.float().numpy() for name, w in get_peft_model_state_dict(adapted).items()}
        self.pairs = adapter.lora_pairs(weights, tiny.SHAPE)
        self.tensors = {level: self.write(level) for level in ("F32", "F16", "Q8_0", "Q4_K_M")}
        runtime = Runtime(self.base)
        self.ids = runtime.tokenize(TEXT)
        runtime.close()
        with torch.no_grad():
            self.adapted = adapted(torch.tensor([self.ids])).logits[0].numpy()
            with adapted.disable_adapter():
                self.plain = adapted(torch.tensor([self.ids])).logits[0].numpy()

    def write(self, level: str) -> Any:
        path = self.adapter(level)
        return adapter.write_adapter(path, tiny.SHAPE, self.pairs, level=level, alpha=32.0, header=HEADER)

    def adapter(self, level: str) -> Path:
        return self.folder / f"adapter_{level}.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("tiny"))


def kl(a: np.ndarray, b: np.ndarray) -> float:
    log_a, log_b = log_softmax(a), log_softmax(b)
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())


def logits(path: Path, ids: list[int], lora: Path | None = None) -> np.ndarray:
    runtime = Runtime(path)
    if lora:
        runtime.set_adapter(lora)
    rows = runtime.logits(ids[:1], [*ids[1:], ids[0]])
    runtime.close()
    return rows


def test_the_base_agrees_with_transformers(made: Made) -> None:
    assert kl(made.plain, logits(made.base, made.ids)) < 1e-4


@pytest.mark.parametrize(("level", "most"), [("F32", 1e-4), ("F16", 1e-4), ("Q8_0", 1e-3), ("Q4_K_M", 5e-3)])
def test_the_adapter_agrees_with_peft(made: Made, level: str, most: float) -> None:
    assert kl(made.plain, made.adapted) > 0.05, "the adapter matters"
    assert kl(made.adapted, logits(made.base, made.ids, made.adapter(level))) < most


def test_a_wrong_permutation_would_be_seen(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = get_peft_model_state_dict(tiny.with_adapter(tiny.model()))
    monkeypatch.setattr(adapter, "_permuted", lambda b, heads: b)
    pairs = adapter.lora_pairs(weights, tiny.SHAPE)
    wrong = tmp_path / "wrong.gguf"
    adapter.write_adapter(wrong, tiny.SHAPE, pairs, level="F32", alpha=32.0, header={})
    assert kl(made.adapted, logits(made.base, made.ids, wrong)) > 1e-3


def test_merging_agrees_with_applying(made: Made, tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    merge.merge(made.base, made.pairs, merged, alpha=32.0, header={"general.name": "merged", "meetara.x": 1})
    assert kl(made.adapted, logits(merged, made.ids)) < 1e-3
    assert open_gguf(merged).get_field("general.name").contents() == "merged"


def test_merging_refuses_an_adapter_of_another_base(made: Made, tmp_path: Path) -> None:
    pair = made.pairs[0]
    for other, message in (
        (adapter.LoraPair("blk.9.attn_q.weight", pair.a, pair.b), "the base has no"),
        (adapter.LoraPair(pair.name, pair.a[:, :64], pair.b), "belongs to another base"),
    ):
        with pytest.raises(MeetaraError, match=message):
            merge.merge(made.base, [other], tmp_path / "m.gguf", alpha=1.0, header={})


def test_adapters_of_other_names_are_refused() -> None:
    with pytest.raises(MeetaraError, match="has no name in GGUF"):
        adapter.lora_pairs({"base_model.model.model.layers.0.other.lora_A.weight": np.zeros((2, 2))}, tiny.SHAPE)
    half = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((2, 2))}
    with pytest.raises(MeetaraError, match="lacks a half"):
        adapter.lora_pairs(half, tiny.SHAPE)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_its_types_and_size(made: Made, level: str) -> None:
    made.write(level)
    tensors = open_gguf(made.adapter(level)).tensors
    most, more = ADAPTER_TYPES[level]
    assert {t.tensor_type.name for t in tensors if "ffn_down" in t.name or "attn_v" in t.name} == {more}
    assert {t.tensor_type.name for t in tensors if "ffn_up" in t.name} == {most}
    assert sum(int(t.n_bytes) for t in tensors) == adapter.adapter_bytes(tiny.SHAPE, 32, level)


def test_rows_that_do_not_divide_stay_f16(tmp_path: Path) -> None:
    pairs = [adapter.LoraPair("blk.0.ffn_up.weight", np.ones((13, 256), "f4"), np.ones((512, 13), "f4"))]
    tensors = adapter.write_adapter(tmp_path / "a.gguf", tiny.SHAPE, pairs, level="Q4_K_M", alpha=13.0, header={})
    assert [t.kind for t in tensors] == ["Q5_0", "F16"]


def test_converting_keeps_header_and_weights(made: Made, tmp_path: Path) -> None:
    quantised, again = tmp_path / "q8.gguf", tmp_path / "f16.gguf"
    quantize.quantize(made.base, quantised, "Q8_0")
    first = convert.f16_base(quantised, again)
    assert first == convert.f16_base(quantised, tmp_path / "f16_again.gguf"), "the same weights, the same hash"
    assert first != convert.f16_base(made.base, tmp_path / "other.gguf")
    a, b = open_gguf(made.base), open_gguf(again)
    assert set(a.fields) <= set(b.fields)
    assert b.get_field("general.file_type").contents() == LEVELS["F16"]
    for source, target in zip(open_gguf(quantised).tensors, b.tensors, strict=True):
        assert source.name == target.name
        np.testing.assert_allclose(decode(source), decode(target), rtol=1e-3, atol=1e-5)


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    pairs = [adapter.LoraPair("blk.0.ffn_up.weight", np.full((32, 256), np.nan, "f4"), np.ones((512, 32), "f4"))]
    with pytest.raises(MeetaraError, match="no numbers"):
        adapter.write_adapter(tmp_path / "a.gguf", tiny.SHAPE, pairs, level="F16", alpha=1.0, header={})


def test_swapping_adapters_equals_fresh_loads(made: Made) -> None:
    runtime = Runtime(made.base)

    def now() -> np.ndarray:
        return runtime.logits(made.ids[:1], [*made.ids[1:], made.ids[0]])

    plain = now()
    for level in ("Q4_K_M", "F16"):
        runtime.set_adapter(made.adapter(level))
        np.testing.assert_array_equal(now(), logits(made.base, made.ids, made.adapter(level)))
    runtime.set_adapter(None)
    np.testing.assert_array_equal(now(), plain)
    runtime.close()


def test_scores_do_not_depend_on_what_the_cache_holds(made: Made) -> None:
    runtime = Runtime(made.base)
    prompt, answers = made.ids[:10], [made.ids[10:20], made.ids[15:30], made.ids[5:6], made.ids[10:20]]
    together = [runtime.log_probs(prompt, answers) for _ in range(2)]
    for answer, first, second in zip(answers, *together, strict=True):
        np.testing.assert_array_equal(first, second)
        (alone,) = runtime.log_probs(prompt, [answer])
        np.testing.assert_allclose(alone, first, atol=1e-3)
        rows = log_softmax(runtime.logits(prompt, answer))
        np.testing.assert_allclose(rows[np.arange(len(answer)), answer], first, atol=1e-3)
    runtime.close()
    expected = log_softmax(made.plain[9:19])[np.arange(10), answers[0]]
    np.testing.assert_allclose(together[0][0], expected, atol=0.02)


# The integrity gate


def check(made: Made, path: Path, **changes: Any) -> list[dict[str, Any]]:
    request: dict[str, Any] = {
        "sha256": sha256_of(path), "tensors": made.tensors["Q4_K_M"], "keys": {"adapter.lora.alpha": 32.0, **HEADER},
        "prepared": made.folder, "system_prompt": "Be kind.", "base": made.base,
    }  # fmt: skip
    return verify.verify(path, **{**request, **changes})


@pytest.fixture
def candidate(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copy(made.adapter("Q4_K_M"), tmp_path / "candidate.gguf"))


def flip(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_the_gate_sees_an_altered_byte(made: Made, candidate: Path) -> None:
    written = sha256_of(candidate)
    flip(candidate, candidate.stat().st_size - 1000, b"\x7f")
    with pytest.raises(MeetaraError, match="hash: sha256 is"):
        check(made, candidate, sha256=written)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path, 0, b"GGML"), "begins with b'GGML'"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged or no GGUF"),
        (lambda path: path.write_bytes(b""), "begins with b''"),
    ],
)
def test_the_gate_sees_damage(made: Made, candidate: Path, damage: Any, message: str) -> None:
    damage(candidate)
    with pytest.raises(MeetaraError, match=message):
        check(made, candidate)


def test_the_gate_sees_wrong_keys_and_tensors(made: Made, candidate: Path) -> None:
    with pytest.raises(MeetaraError, match=r"the key 'meetara.domain' is 'tiny', expected 'other'"):
        check(made, candidate, keys={"meetara.domain": "other"})
    with pytest.raises(MeetaraError, match=r"the key 'none' is None"):
        check(made, candidate, keys={"none": 1})
    with pytest.raises(MeetaraError, match=r"the tensor 'blk\.0\.attn_k\.weight\.lora_a' is .*Q5_0.*, expected .*F16"):
        check(made, candidate, tensors=made.tensors["F16"])
    with pytest.raises(MeetaraError, match="1 tensors are too many"):
        check(made, candidate, tensors=made.tensors["Q4_K_M"][1:])


def test_the_gate_compares_a_whole_models_tensors_by_name_and_shape(made: Made, tmp_path: Path) -> None:
    from dataclasses import replace

    path = tmp_path / "q8.gguf"
    quantize.quantize(made.base, path, "Q8_0")
    like = tensors_like(made.base)
    keys: dict[str, Any] = {"general.type": "model"}
    for tensors, message in (
        ([replace(like[0], shape=(1, 2)), *like[1:]], "is .*, expected"),
        ([*like, replace(like[0], name="blk.9.none.weight")], "1 tensors are missing"),
        ([replace(t, kind="F16") for t in like], "expected .*F16"),
    ):
        with pytest.raises(MeetaraError, match=message):
            check(made, path, tensors=tensors, keys=keys, base=None)
    # What fails then is a later check: there is no tokenizer folder to compare with.
    with pytest.raises(MeetaraError) as error:
        check(made, path, tensors=like, keys=keys, base=None)
    assert "tensor" not in str(error.value).replace("safetensors", "")


def test_the_gate_sees_an_adapter_without_effect(made: Made, tmp_path: Path) -> None:
    pairs = [adapter.LoraPair(pair.name, pair.a, pair.b * 0) for pair in made.pairs]
    path = tmp_path / "nothing.gguf"
    tensors = adapter.write_adapter(path, tiny.SHAPE, pairs, level="Q4_K_M", alpha=32.0, header=HEADER)
    with pytest.raises(MeetaraError, match="it has no effect"):
        check(made, path, tensors=tensors)


def test_the_gate_sees_a_model_that_does_not_stop(made: Made, candidate: Path, tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:3] = 0  # an end token that is never the likeliest
    endless = tmp_path / "endless.gguf"
    tiny.write(model, endless)
    with pytest.raises(MeetaraError, match="the answer does not end within 200 tokens"):
        check(made, candidate, base=endless)


def test_a_crash_in_the_child_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crash.py").write_text("import os, signal\nprint('last words', flush=True)\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MeetaraError, match="SIGSEGV: last words"):
        run_child("crash", {})


def test_llama_cpp_refuses_what_is_no_model(tmp_path: Path, made: Made) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF nothing")
    with pytest.raises(MeetaraError, match=r"llama\.cpp cannot load it"):
        Runtime(path)
    runtime = Runtime(made.base)
    with pytest.raises(MeetaraError, match=r"llama\.cpp refuses the adapter"):
        runtime.set_adapter(path)
    runtime.close()
    with pytest.raises(MeetaraError, match="could not quantise"):
        quantize.quantize(path, tmp_path / "y.gguf", "Q8_0")
    assert not (tmp_path / "y.gguf").exists()


def test_the_modelfile_is_the_chat_template(made: Made) -> None:
    text = modelfile("m.gguf", tiny.TEMPLATE, "Be kind.")
    assert text.startswith("FROM ./m.gguf\n") and 'PARAMETER stop "<|im_end|>"' in text
    go = text.split('"""')[1]
    turns = [("system", "Be kind."), ("user", "Hi?")]
    loop = go[go.index("}}") + 2 : go.index("{{ end }}")]
    rendered = "".join(loop.replace("{{ .Role }}", r).replace("{{ .Content }}", c) for r, c in turns)
    rendered += go[go.index("{{ end }}") + len("{{ end }}") :]
    import jinja2

    messages = [{"role": role, "content": content} for role, content in turns]
    assert rendered == jinja2.Template(tiny.TEMPLATE).render(messages=messages, add_generation_prompt=True) + "\n"[:0]
    with pytest.raises(MeetaraError, match="not ChatML"):
        modelfile("m.gguf", "[INST]", "")


def test_gguf_calls_that_matter_keep_their_signatures() -> None:
    import inspect

    assert list(inspect.signature(gguf.GGUFWriter.add_tensor_info).parameters)[1:] == [
        "name", "tensor_shape", "tensor_dtype", "tensor_nbytes", "raw_dtype",
    ]  # fmt: skip
    assert "qtype" in inspect.signature(gguf.quants.quantize).parameters


def test_our_reader_reads_what_ggufs_reads(made: Made) -> None:
    from meetara_nb.gguf_factory.gguf_io import fields_of

    theirs, ours = gguf.GGUFReader(made.base), open_gguf(made.base)
    assert list(fields_of(theirs)) == list(fields_of(ours))
    for a, b in zip(theirs.tensors, ours.tensors, strict=True):
        assert (a.name, a.tensor_type, a.data_offset) == (b.name, b.tensor_type, b.data_offset)
        np.testing.assert_array_equal(a.data, b.data)
