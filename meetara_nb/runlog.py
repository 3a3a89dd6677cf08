"""The Intelligent Logger: what happened in a run, as events for programs and as lines for people."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def new_run_id() -> str:
    """A run id that sorts by time and does not clash: `20261122-143000-1f3a`."""
    return time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)


class RunLog:
    """Appends to `events.jsonl` in the run's folder and prints to the console.

    One event is one line: `time` (seconds since 1970), `run_id`, `stage`, `domain`, `event` and its own fields, whose
    names end in their unit (`_s`, `_bytes`, `_tokens`). Several processes may append to one file.
    """

    def __init__(self, folder: Path | None, run_id: str, *, stage: str = "", quiet: bool = False) -> None:
        self.folder = folder
        self.run_id = run_id
        self.stage = stage
        self.quiet = quiet
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def event(self, event: str, *, domain: str = "", **fields: Any) -> None:
        """Writes an event, and tells it to the listeners of this process."""
        head = {"time": round(time.time(), 3), "run_id": self.run_id, "stage": self.stage, "domain": domain}
        whole = {**head, "event": event, **fields}
        for listener in self.listeners:
            listener(whole)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(whole, ensure_ascii=False) + "\n"
        # One write of one line in append mode does not mix with another process's.
        descriptor = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def say(self, text: str) -> None:
        """One line for the reader."""
        if not self.quiet:
            print(text, flush=True)

    def events(self) -> Iterator[dict[str, Any]]:
        """The events so far; a half-written last line is left out."""
        path = self.folder / "events.jsonl" if self.folder else None
        if path is None or not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


class CollectedLog(RunLog):
    """A log whose lines for the reader are collected: another process shows them."""

    def __init__(self, folder: Path | None, run_id: str, *, stage: str = "") -> None:
        super().__init__(folder, run_id, stage=stage)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Rows under headers as plain text."""
    from tabulate import tabulate

    return tabulate(list(rows), headers=headers, tablefmt="simple", disable_numparse=True)


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes in decimal units: `8120000` -> `8.12 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} bytes"
