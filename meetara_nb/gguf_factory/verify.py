"""The integrity gate: what a GGUF file must show before it gets its final name.

Runs in a child process (`python -m meetara_nb.gguf_factory.verify`), since some damage makes llama.cpp abort.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MeetaraError
from ..store import sha256_of
from .child import run_child, serve_child
from .gguf_io import TensorPlan, TensorSpec, open_gguf

# Texts on which tokenizers differ: spaces, digits, accents, scripts, combining marks, emoji, code, special tokens.
AWKWARD = (
    "Hello, world!",
    "  two leading and two trailing  ",
    "tabs\tand\nnew\n\n\nlines\r\n",
    "3.14159 1,000,000 2026-11-22 0x1F 10^-5",
    "don't can't I'll we've it's DON'T",
    "naïve café Zoë straße İstanbul",
    "Ελληνικά русский עברית العربية हिन्दी ไทย",
    "日本語のテキスト 中文 한국어",
    "e\u0301 vs \u00e9, non\u00a0breaking, zero\u200bwidth",
    "👩‍⚕️🩺 👍🏽 🇩🇪",
    "for i in range(10):\n    print(f'{i:>3}')  # ok",
    "http://example.org/a?b=c&d=%20 user@example.org",
    "<|im_start|>user\nhi<|im_end|>\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "½ ² ™ … “quotes” – dashes —",
    "x² + y³ = ½z, Ⅻ ①② ３４ ٣٤ १२",
    "",
)

STOP_TOKENS = 200
"""A short question must be answered, and the answer end, within so many tokens."""
STOP_QUESTION = "In one short sentence: why should people wash their hands?"


def verify(
    path: Path,
    *,
    sha256: str,
    tensors: Sequence[TensorPlan | TensorSpec],
    keys: Mapping[str, str | int | float],
    prepared: Path,
    system_prompt: str,
    base: Path | None = None,
) -> list[dict[str, Any]]:
    """Checks a GGUF file in a child process.

    Args:
        path: The file, still under its partial name.
        sha256: Of the bytes that were written.
        tensors: Every tensor it must have: name, shape, and type where it is not llama.cpp's choice.
        keys: Header fields it must have, with their values.
        prepared: The base as a transformers folder: its tokenizer and template are what the file must agree with.
        system_prompt: For the stop test.
        base: For an adapter, the base it is applied to.

    Returns:
        One entry a check: `check`, `ok`, `detail`. All are ok.

    Raises:
        MeetaraError: A check failed, or the child crashed.
    """
    request = {
        "path": str(path),
        "sha256": sha256,
        "tensors": [[t.name, list(t.shape), t.kind] for t in tensors],
        "keys": dict(keys),
        "prepared": str(prepared),
        "system_prompt": system_prompt,
        "base": str(base) if base else None,
    }
    checks: list[dict[str, Any]] = run_child(__name__, request)["checks"]
    if failed := [check for check in checks if not check["ok"]]:
        raise MeetaraError("; ".join(f"{check['check']}: {check['detail']}" for check in failed))
    return checks


def _verify(
    path: str,
    sha256: str,
    tensors: list[list[Any]],
    keys: dict[str, Any],
    prepared: str,
    system_prompt: str,
    base: str | None,
) -> dict[str, Any]:
    """The child's side of `verify`: stops at the first check that fails, as later ones rest on it."""
    file, checks = Path(path), []
    steps = [
        ("hash", lambda: _hash(file, sha256)),
        ("header and tensors", lambda: _structure(file, tensors, keys)),
        ("runs", lambda: _runs(file, Path(base) if base else None, Path(prepared), system_prompt)),
    ]
    for name, step in steps:
        try:
            checks += [{"check": check, "ok": True, "detail": detail} for check, detail in step()]
        except MeetaraError as error:
            checks.append({"check": name, "ok": False, "detail": str(error)})
            break
    return {"checks": checks}


def _hash(file: Path, sha256: str) -> list[tuple[str, str]]:
    found = sha256_of(file)
    if found != sha256:
        raise MeetaraError(f"sha256 is {found[:16]}, written was {sha256[:16]}")
    return [("hash", sha256)]


def _structure(file: Path, tensors: list[list[Any]], keys: dict[str, Any]) -> list[tuple[str, str]]:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise MeetaraError(f"begins with {magic!r}, not with b'GGUF'")
    reader = open_gguf(file)
    for key, value in keys.items():
        field = reader.get_field(key)
        found: Any = field.contents() if field else None
        same = field and (np.isclose(float(found), value) if isinstance(value, float) else found == value)
        if not same:
            raise MeetaraError(f"the key {key!r} is {found!r}, expected {value!r}")
    found_tensors = {
        tensor.name: ([int(n) for n in reversed(tensor.shape)], tensor.tensor_type.name) for tensor in reader.tensors
    }
    expected = {name: (shape, kind) for name, shape, kind in tensors}
    if missing := expected.keys() - found_tensors.keys():
        raise MeetaraError(f"{len(missing)} tensors are missing, {sorted(missing)[0]!r} among them")
    if extra := found_tensors.keys() - expected.keys():
        raise MeetaraError(f"{len(extra)} tensors are too many, {sorted(extra)[0]!r} among them")
    for name, (shape, kind) in expected.items():
        found_shape, found_kind = found_tensors[name]
        if found_shape != shape or kind not in (None, found_kind):
            raise MeetaraError(f"the tensor {name!r} is {found_tensors[name]}, expected {(shape, kind)}")
    types = Counter(kind for _, kind in found_tensors.values())
    return [("header", f"{len(keys)} keys"), ("tensors", json.dumps(dict(types.most_common())))]


def _runs(file: Path, base: Path | None, prepared: Path, system_prompt: str) -> list[tuple[str, str]]:
    from .runtime import Runtime

    done = []
    runtime = Runtime(base or file)
    question = [{"role": "system", "content": system_prompt}, {"role": "user", "content": STOP_QUESTION}]
    if base is None:
        done += _same_tokenizer(runtime, prepared)
    else:
        prompt = runtime.prompt(question)
        without = runtime.logits(prompt, prompt[:1])
        seconds = runtime.set_adapter(file)
        change = float(np.abs(runtime.logits(prompt, prompt[:1]) - without).max())
        if not np.isfinite(change) or change == 0:
            raise MeetaraError(f"the adapter changes the base's logits by {change}: it has no effect")
        done.append(("adapter applies", f"in {seconds * 1000:.0f} ms; largest change of a logit {change:.2f}"))
    answer = runtime.answer(question, STOP_TOKENS)
    if not answer.text:
        raise MeetaraError("it answers nothing")
    if not answer.stopped:
        raise MeetaraError(f"the answer does not end within {STOP_TOKENS} tokens: {answer.text[:80]!r} ...")
    if "<|" in answer.text:
        raise MeetaraError(f"chat markup in the answer: {answer.text[:80]!r}")
    done += [("stops", f"after {answer.tokens} tokens"), ("answers", answer.text)]
    runtime.close()
    return done


def _same_tokenizer(runtime: Any, prepared: Path) -> list[tuple[str, str]]:
    """transformers' tokenizer and llama.cpp's agree on awkward texts, and the chat templates are identical."""
    from ..training.bases import load_tokenizer

    tokenizer = load_tokenizer(prepared)
    for text in AWKWARD:
        theirs = tokenizer.encode(text, add_special_tokens=False)
        ours = runtime.tokenize(text)
        if theirs != ours:
            raise MeetaraError(f"tokenizers differ on {text!r}: transformers {theirs[:12]}, llama.cpp {ours[:12]}")
    if runtime.meta("tokenizer.chat_template") != tokenizer.chat_template:
        raise MeetaraError("the chat template is not the base's")
    return [("tokenizer", f"agrees on {len(AWKWARD)} texts"), ("chat template", "identical")]


if __name__ == "__main__":
    serve_child(_verify)
