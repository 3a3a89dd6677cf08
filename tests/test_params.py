"""Params files: every fault at once, with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest

from meetara_nb import params
from meetara_nb.errors import MeetaraError
from meetara_nb.quants import ADAPTER_TYPES, LEVELS


def faults_of(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MeetaraError) as error:
        params.load_run_file(path)
    return [str(fault) for fault in error.value.faults]


def test_every_fault_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "domains: general_health\ntier: 3\noverides: {}\n"
    assert faults_of(path, text) == [
        f"{path}:1: domains: 'general_health' is not a list -> write a list",
        f"{path}:2: tier: 3 is not text (in quotes) -> write text (in quotes)",
        f"{path}:3: overides: unknown key -> did you mean overrides?",
    ]


def test_faults_in_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "domains: [a]\ntier: fst\noverrides: {train.lora_rnk: 8, train.learning_rate: 2e-4, data.samples: no}\n"
    assert faults_of(path, text) == [
        f"{path}: tier: 'fst' is no tier -> did you mean fast?",
        f"{path}: train.lora_rnk: unknown parameter -> did you mean train.lora_rank or train.lora_dropout "
        "or train.lora_alpha?",
        f"{path}: parameter: data.samples: False is not a whole number -> write a whole number",
        f"{path}: parameter: train.learning_rate: a number came as the text '2e-4' -> write 0.0002 without quotes",
    ]


def test_unknown_key_deep_in_a_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "tiers.yaml").write_text("default: a\ntiers:\n  a:\n    about: x\n    train: {epoch: 2}\n")
    with pytest.raises(MeetaraError, match=r"tiers.yaml:5: tiers.a.train.epoch: unknown key -> did you mean epochs"):
        params.tiers(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("domains: [a]\ndomains: [b]\n", "stands here twice"),
        ("domains: [a\n", "not valid YAML"),
        ("domains: !!python/object/apply:os.system ['true']\n", "not allowed"),
        ("domains: [2026-11-22]\n", "not allowed"),
        ("", "not a mapping"),
    ],
)
def test_yaml_that_is_not_what_it_seems(tmp_path: Path, text: str, message: str) -> None:
    assert any(message in fault for fault in faults_of(tmp_path / "run.yaml", text))


def test_too_large_and_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"domains: [\xff\xfe]")
    with pytest.raises(MeetaraError, match="UTF-8"):
        params.load_run_file(path)
    path.write_bytes(b"#" * 5_000_000)
    with pytest.raises(MeetaraError, match="over the limit"):
        params.load_run_file(path)
    with pytest.raises(MeetaraError, match="no such file"):
        params.load_run_file(tmp_path / "none.yaml")


def test_overrides_win_over_the_tier() -> None:
    resolved = params.resolve("smoke", "", {"train.max_steps": 9, "gguf.quants": ["Q8_0"]})
    assert (resolved.data.samples, resolved.train.max_steps, resolved.gguf.quants) == (200, 9, ["Q8_0"])
    assert params.resolve().tier == "fast"


def test_the_domain_rank_is_32_in_every_tier() -> None:
    assert {tier.train.lora_rank for tier in params.tiers().tiers.values()} == {32}


def test_the_digest_follows_the_sections_named() -> None:
    a, b = params.resolve("fast"), params.resolve("fast", "", {"train.seed": 3})
    assert a.digest("data") == b.digest("data")
    assert a.digest("train") != b.digest("train")
    assert a.digest() != b.digest()


def test_shipped_files_load() -> None:
    assert set(params.tiers().tiers) == {"smoke", "fast", "balanced", "quality"}
    for base in params.bases().values():
        assert base.licence == "Apache-2.0" and set(base.scopes) <= set(params.scopes())
    default = params.bases()[params.scopes()["domain"].base]
    assert default.source.identity == default.identity
    assert set(params.scopes()) == {"domain", "domain_merged"}
    runs = sorted((params.layout.PARAMS / "runs").glob("*.yaml"))
    assert len(runs) == 1
    for path in runs:
        params.load_run_file(path)


def test_levels_are_llama_cpps() -> None:
    assert set(LEVELS) == set(ADAPTER_TYPES)
    for level, number in LEVELS.items():
        name = "LLAMA_FTYPE_ALL_F32" if level == "F32" else f"LLAMA_FTYPE_MOSTLY_{level}"
        assert number == getattr(llama_cpp, name)


def test_sizes_are_predicted_and_judged() -> None:
    scope = params.scopes()["domain"]
    assert scope.fits(8_300_000) and not scope.fits(8_300_001)
    merged = params.scopes()["domain_merged"]
    assert merged.fits(105_454_144) and not merged.fits(111_000_000) and not merged.fits(99_000_000)
