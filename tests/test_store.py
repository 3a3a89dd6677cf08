"""Publishing, manifests, locks, roots: nothing half-written, nothing of others overwritten."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from meetara_nb import store
from meetara_nb.errors import MeetaraError
from meetara_nb.layout import Layout
from meetara_nb.store import Manifests


@pytest.fixture
def manifests(layout: Layout) -> Manifests:
    return Manifests(layout)


def publish(manifests: Manifests, tmp_path: Path, text: str, key: str = "k", said: list[str] | None = None) -> Path:
    partial = tmp_path / "partial"
    partial.write_text(text)
    final = Path(manifests.layout.domain_gguf("healthcare", "x", "Q8_0"))
    say = print if said is None else said.append
    manifests.publish("gguf", "healthcare", "x", key=key, files={partial: final}, facts={}, say=say)
    return final


def current(manifests: Manifests, key: str = "k") -> Any:
    return manifests.current("gguf", "healthcare", "x", key)


def test_published_files_are_current_until_they_change(manifests: Manifests, tmp_path: Path) -> None:
    assert current(manifests) is None
    final = publish(manifests, tmp_path, "one")
    assert current(manifests) and not current(manifests, "other key")
    os.utime(final, (1, 1))
    assert current(manifests), "only the time changed: the hash decides"
    final.write_text("two")
    assert current(manifests) is None
    assert manifests.damaged("gguf", "healthcare", "x") == [final]
    final.unlink()
    assert current(manifests) is None and manifests.damaged("gguf", "healthcare", "x") == []


def test_our_own_files_are_replaced(manifests: Manifests, tmp_path: Path) -> None:
    publish(manifests, tmp_path, "one")
    final = publish(manifests, tmp_path, "two")
    assert final.read_text() == "two"
    assert not Path(manifests.layout.legacy("x")).parent.exists()


def test_files_of_others_go_to_legacy(manifests: Manifests, tmp_path: Path) -> None:
    final = Path(manifests.layout.domain_gguf("healthcare", "x", "Q8_0"))
    final.parent.mkdir(parents=True)
    for text in ("from an older kit", "and another"):
        final.write_text(text)
        said: list[str] = []
        publish(manifests, tmp_path, "ours", said=said)
        assert len(said) == 1 and "was not made by this lab" in said[0]
    legacy = sorted(Path(manifests.layout.legacy("x")).parent.iterdir())
    assert [path.read_text() for path in legacy] == ["and another", "from an older kit"]
    assert final.read_text() == "ours"


def test_files_of_an_earlier_choice_stay_ours(manifests: Manifests, tmp_path: Path) -> None:
    """A stage that made one file, then another, then the first anew."""
    paths = [Path(manifests.layout.domain_gguf("healthcare", "x", q)) for q in ("Q8_0", "F16")]
    for number, path in enumerate((*paths, *paths)):
        partial = tmp_path / "partial"
        partial.write_text(f"content {number}")
        manifests.publish("gguf", "healthcare", "x", key="k", files={partial: path}, facts={}, say=print)
    assert [path.read_text() for path in paths] == ["content 2", "content 3"]
    assert not Path(manifests.layout.legacy("x")).parent.exists()


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_crash_while_publishing_leaves_the_old_or_the_new(
    manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    finals = [Path(manifests.layout.domain_gguf("healthcare", "x", q)) for q in ("Q8_0", "F16")]

    def publish_both(text: str) -> None:
        partials = [tmp_path / q for q in ("a", "b")]
        for partial in partials:
            partial.write_text(text)
        files = dict(zip(partials, finals, strict=True))
        manifests.publish("gguf", "healthcare", "x", key=text, files=files, facts={}, say=lambda _: None)

    publish_both("old")
    real, count = store.move, 0

    def failing_move(source: Path, final: Path) -> None:
        nonlocal count
        if count == moved:
            raise KeyboardInterrupt
        count += 1
        real(source, final)

    monkeypatch.setattr(store, "move", failing_move)
    if moved < 2:
        with pytest.raises(KeyboardInterrupt):
            publish_both("new")
    else:
        publish_both("new")
    assert {final.read_text() for final in finals} <= {"old", "new"}
    monkeypatch.setattr(store, "move", real)
    publish_both("new")
    assert current(manifests, "new")
    assert not Path(manifests.layout.legacy("x")).parent.exists(), "our own files were taken for those of others"


def test_a_move_across_file_systems_copies_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, final = tmp_path / "a", tmp_path / "sub" / "b"
    source.write_text("content")
    real = Path.replace

    def across(self: Path, target: Any) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", across)
    store.move(source, final)
    assert final.read_text() == "content" and not source.exists() and list(final.parent.iterdir()) == [final]


def test_atomic_writing_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    store.write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        store.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_lock_is_waited_for_and_freed_by_a_kill(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "a.lock"
    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from meetara_nb.store import locked
        with locked(Path({str(lock)!r}), "run one", print):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        other.kill()

    started = time.monotonic()
    with store.locked(lock, "run two", say):
        assert said == [f"waiting for run one (process {other.pid}) to finish its part"]
    assert time.monotonic() - started < 30
    other.wait()


def test_roots_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    for root in (blocker, blocker / "below", Path("/proc/none") if Path("/proc").is_dir() else blocker):
        with pytest.raises(MeetaraError, match="data root cannot be written"):
            store.check_writable(root, "data")
    store.check_writable(tmp_path / "new" / "deep", "data")
    assert list(tmp_path.iterdir()) == [blocker], "checking changes nothing"


def test_too_little_disk(tmp_path: Path, free_space: Any) -> None:
    free_space(1_000_000_000)
    store.check_space([("data", tmp_path / "a" / "b", 500_000_000), ("models", tmp_path, 400_000_000)])
    with pytest.raises(MeetaraError, match=r"too little disk: 1\.00 GB free, about 1\.10 GB needed"):
        store.check_space([("data", tmp_path / "a" / "b", 600_000_000), ("models", tmp_path, 500_000_000)])


def test_the_digest_is_of_content() -> None:
    assert store.digest_of({"a": 1, "b": [2]}) == store.digest_of({"b": [2], "a": 1})
    assert store.digest_of({"a": 1}) != store.digest_of({"a": "1"})
