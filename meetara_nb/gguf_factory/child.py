"""Runs a check in a child process: llama.cpp aborts the whole process on some damaged files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MeetaraError

TIMEOUT_S = 1800


def run_child(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m module` with a request and returns its result; the module calls `serve_child`.

    Raises:
        MeetaraError: What the child raised, or that it crashed, with the signal and its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            process = subprocess.run(
                [sys.executable, "-m", module, str(asked), str(answered)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MeetaraError(f"the check did not end within {TIMEOUT_S} s", where=module) from None
        if not answered.exists():
            raise MeetaraError(f"the check's process {_end(process.returncode)}: {process.stdout.strip()[-300:]}")
        result = json.loads(answered.read_text(encoding="utf-8"))
    if "error" in result:
        raise MeetaraError(result["error"])
    return dict(result["result"])


def _end(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with code {code}"


def serve_child(work: Callable[..., dict[str, Any]]) -> None:
    """The child's side: reads the request named on the command line, calls `work(**request)`, writes the result."""
    asked, answered = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        result: dict[str, Any] = {"result": work(**json.loads(asked.read_text(encoding="utf-8")))}
    except MeetaraError as error:
        result = {"error": str(error)}
    except Exception:
        result = {"error": f"the check failed: {traceback.format_exc(limit=3)}"}
    partial = answered.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(answered)
