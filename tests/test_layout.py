"""Every name of the contract, on POSIX and on Windows."""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath, PureWindowsPath

import pytest

from meetara_nb.errors import MeetaraError
from meetara_nb.layout import Layout

NAMES = {
    "data/training/healthcare/general_health_training_data.json": lambda x: x.training_data(
        "healthcare", "general_health"
    ),
    "data/models/trained/healthcare/general_health_trained_model.pt": lambda x: x.trained_model(
        "healthcare", "general_health"
    ),
    "data/models/trained/business/business_category_trained_model.pt": lambda x: x.category_trained_model("business"),
    "data/models/trained/universal/universal_lite_trained_model.pt": lambda x: x.universal_trained_model(lite=True),
    "data/logs": lambda x: x.logs,
    "data/logs/runs/20261122-140000-ab12": lambda x: x.run("20261122-140000-ab12"),
    "models/A_universal_full/meetara_universal_full_Q4_K_M.gguf": lambda x: x.universal_gguf("Q4_K_M", lite=False),
    "models/A_universal_full/universal_full_metadata.json": lambda x: x.universal_metadata(lite=False),
    "models/B_universal_lite/meetara_universal_lite_Q4_K_M.gguf": lambda x: x.universal_gguf("Q4_K_M", lite=True),
    "models/C_category_specific/business/meetara_business_category_Q4_K_M.gguf": lambda x: x.category_gguf(
        "business", "Q4_K_M"
    ),
    "models/C_category_specific/business/business_category_metadata.json": lambda x: x.category_metadata("business"),
    "models/D_domain_specific/healthcare/meetara_general_health_Q4_K_M.gguf": lambda x: x.domain_gguf(
        "healthcare", "general_health", "Q4_K_M"
    ),
    "models/D_domain_specific/healthcare/meetara_general_health_merged_Q8_0.gguf": lambda x: x.domain_gguf(
        "healthcare", "general_health", "Q8_0", merged=True
    ),
    "models/D_domain_specific/healthcare/general_health_metadata.json": lambda x: x.domain_metadata(
        "healthcare", "general_health"
    ),
    "models/base/smollm2-135m-q4_1_F16.gguf": lambda x: x.base("smollm2-135m-q4_1", "F16"),
    "models/gguf/development/meetara_test_domain_Q4_K_M.gguf": lambda x: x.development_gguf("test_domain", "Q4_K_M"),
    "models/gguf/production/a.gguf": lambda x: x.production("a.gguf"),
    "models/gguf/legacy/a.gguf": lambda x: x.legacy("a.gguf"),
}


@pytest.mark.parametrize(("kind", "root"), [(PurePosixPath, "/drive/lab"), (PureWindowsPath, "G:\\My Drive\\lab")])
@pytest.mark.parametrize("name", NAMES)
def test_names(kind: type[PurePath], root: str, name: str) -> None:
    layout = Layout(kind(root, "data"), kind(root, "models"), kind(root, "work"))
    found = NAMES[name](layout)
    assert isinstance(found, kind)
    assert found.relative_to(kind(root)).as_posix() == name


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "Health", "1st", "con", "a b", "a.b", "x" * 65])
def test_unsafe_names_are_refused(name: str) -> None:
    layout = Layout(PurePosixPath("d"), PurePosixPath("m"), PurePosixPath("w"))
    for make in (lambda: layout.training_data("healthcare", name), lambda: layout.domain_gguf(name, "x", "Q8_0")):
        with pytest.raises(MeetaraError, match="lower-case"):
            make()


def test_unsafe_quant_and_run_are_refused() -> None:
    layout = Layout(PurePosixPath("d"), PurePosixPath("m"), PurePosixPath("w"))
    with pytest.raises(MeetaraError, match="quantisation"):
        layout.base("b", "../x")
    with pytest.raises(MeetaraError, match="run id"):
        layout.run("../../etc")
