"""Files that can be trusted: hashes, atomic publishing, manifests, locks, and room on the disk.

A stage writes into the work folder, publishes under the final name, and writes its manifest last. What the manifest
does not vouch for is not ours: it is moved to `models/gguf/legacy/`, never trusted and never overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import Fault, MeetaraError
from .layout import Layout

Say = Callable[[str], None]


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(data: Any) -> str:
    """sha256 of `data` as canonical JSON: the same for equal content, whatever the key order."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` under a partial name beside `path`, then renames it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in `path`, or None where there is no such file or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, NotADirectoryError):
        return None


def move(source: Path, final: Path) -> None:
    """Gives `source` its final name, across file systems too: copy, compare the hash, rename."""
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(final)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, partial)
        if sha256_of(partial) != sha256_of(source):
            raise MeetaraError("the copy differs from its source", where=final, remedy="run again; check the disk")
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    source.unlink()


class Manifests:
    """Which stage is done for what, from which inputs, with which files.

    A manifest is JSON: `key` (hash of stage, version, params and inputs), `outputs` (file -> bytes, sha256, mtime),
    `facts` (what the stage measured), `ours` (file -> its last contents' sha256) and `done`. It is written twice:
    before publishing with `done: false`, so that files published just before a crash are known as ours, and after it
    with `done: true`.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def read(self, stage: str, category: str, name: str) -> dict[str, Any] | None:
        manifest = read_json(Path(self.layout.manifest(stage, category, name)))
        return manifest if isinstance(manifest, dict) else None

    def current(self, stage: str, category: str, name: str, key: str) -> dict[str, Any] | None:
        """The manifest if the stage is done for `key` and its files are untouched, else None.

        A file whose size and time are those in the manifest counts as untouched; otherwise its hash decides.
        """
        manifest = self.read(stage, category, name)
        return manifest if manifest and manifest.get("key") == key and self._stands(manifest) else None

    def _stands(self, manifest: Mapping[str, Any]) -> bool:
        return bool(manifest.get("done")) and all(self._untouched(*output) for output in manifest["outputs"].items())

    def _untouched(self, ref: str, entry: Mapping[str, Any]) -> bool:
        path = self.path_of(ref)
        try:
            stat = path.stat()
        except OSError:
            return False
        if stat.st_size != entry["bytes"]:
            return False
        return stat.st_mtime_ns == entry["mtime_ns"] or sha256_of(path) == entry["sha256"]

    def intact(self, stage: str, category: str, name: str) -> bool:
        """Whether what the stage last finished still stands, for whatever parameters it was made."""
        manifest = self.read(stage, category, name)
        return manifest is not None and self._stands(manifest)

    def damaged(self, stage: str, category: str, name: str) -> list[Path]:
        """Files that a finished manifest vouches for and that are there, but are not what they were."""
        manifest = self.read(stage, category, name)
        if not manifest or not manifest.get("done"):
            return []
        present = {ref: entry for ref, entry in manifest["outputs"].items() if self.path_of(ref).exists()}
        return [self.path_of(ref) for ref, entry in present.items() if not self._untouched(ref, entry)]

    def publish(
        self,
        stage: str,
        category: str,
        name: str,
        *,
        key: str,
        files: Mapping[Path, Path],
        facts: Mapping[str, Any],
        say: Say,
    ) -> dict[str, Any]:
        """Moves finished `files` (partial -> final) to their names and writes the manifest last."""
        before = self.read(stage, category, name) or {}
        outputs: dict[str, dict[str, Any]] = {
            self._ref(final): {"bytes": partial.stat().st_size, "sha256": sha256_of(partial)}
            for partial, final in files.items()
        }
        # For every file ever published here, the last two contents: the one that stands and the one that replaces it.
        ours: dict[str, list[str]] = dict(before.get("ours", {}))
        for ref, entry in outputs.items():
            ours[ref] = [*(sha for sha in ours.get(ref, []) if sha != entry["sha256"]), entry["sha256"]][-2:]
        for final in files.values():
            if final.exists() and sha256_of(final) not in ours[self._ref(final)]:
                self.set_aside(final, say)
        manifest = {
            "stage": stage,
            "name": name,
            "key": key,
            "done": False,
            "outputs": outputs,
            "facts": dict(facts),
            "ours": ours,
        }
        path = Path(self.layout.manifest(stage, category, name))
        write_json(path, manifest)
        for partial, final in files.items():
            move(partial, final)
            outputs[self._ref(final)]["mtime_ns"] = final.stat().st_mtime_ns
        manifest["done"] = True
        write_json(path, manifest)
        return manifest

    def set_aside(self, path: Path, say: Say) -> None:
        """Moves a file that is not ours to `models/gguf/legacy/`, under a name that is free there."""
        target = Path(self.layout.legacy(path.name))
        number = 1
        while target.exists():
            target = Path(self.layout.legacy(f"{path.stem}.{number}{path.suffix}"))
            number += 1
        move(path, target)
        say(f"{path} was not made by this lab: moved to {target}")

    def _ref(self, path: Path) -> str:
        """`path` relative to its root, so that the roots can move."""
        for root_name, root in (("data", self.layout.data_root), ("models", self.layout.models_root)):
            with contextlib.suppress(ValueError):
                return f"{root_name}:{path.relative_to(root).as_posix()}"
        raise ValueError(f"{path} lies under neither root")

    def path_of(self, ref: str) -> Path:
        root_name, relative = ref.split(":", 1)
        return Path(self.layout.data_root if root_name == "data" else self.layout.models_root) / relative


@contextlib.contextmanager
def locked(path: Path, holder: str, say: Say) -> Iterator[None]:
    """Holds the lock file at `path`; the system frees it when the process ends, however it ends.

    Where another process has it, says who, and waits.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_suffix(".holder")
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = read_json(note) or {}
        say(f"waiting for {other.get('holder', 'another run')} (process {other.get('pid', '?')}) to finish its part")
        lock.acquire()
    try:
        write_json(note, {"holder": holder, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def check_writable(root: Path, name: str) -> None:
    """Raises MeetaraError unless files can be made in `root` (or in the nearest folder above it that exists)."""
    place = existing(root)
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "there is a file of that name")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise MeetaraError(
            f"the {name} root cannot be written ({error.strerror})",
            where=root,
            remedy=f"choose another folder with --{name}-root or the variable MEETARA_{name.upper()}_ROOT",
        ) from None


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_space(needs: Iterable[tuple[str, Path, int]]) -> None:
    """Raises MeetaraError unless every disk has the bytes free that its roots need: (name, root, bytes)."""
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for need in needs:
        disks.setdefault(existing(need[1]).stat().st_dev, []).append(need)
    faults = []
    for on_disk in disks.values():
        needed = sum(need for _, _, need in on_disk)
        free = shutil.disk_usage(existing(on_disk[0][1])).free
        if free < needed:
            options = " and ".join(f"--{name}-root" for name, _, _ in on_disk)
            faults.append(
                Fault(
                    f"too little disk: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed",
                    str(on_disk[0][1]),
                    f"free some space, or choose another disk with {options}",
                )
            )
    if faults:
        raise MeetaraError.of(faults)
