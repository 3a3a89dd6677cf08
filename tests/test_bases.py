"""Getting a base: from the Hub (a server of our own that answers as it does), a folder, a GGUF file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

from meetara_nb.errors import MeetaraError
from meetara_nb.params import Base, HubSource
from meetara_nb.training import bases

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository `org/tiny`; `org/gated` asks for consent."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []
        self.broken = ""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if "gated" in self.path:
            return self.fail(403, "GatedRepo")
        if "org/tiny" not in self.path:
            return self.fail(404, "RepoNotFound")
        if REVISION not in self.path:
            return self.fail(404, "RevisionNotFound")
        if parts[0] == "api":
            files = [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": "0" * 40,
                    "rfilename": path.name,
                }
                for path in self.server.folder.iterdir()
            ]
            if "tree" in parts:
                return self.send(json.dumps(files).encode(), "application/json", body)
            info = {"id": "org/tiny", "sha": REVISION, "siblings": files, "private": False}
            return self.send(json.dumps(info).encode(), "application/json", body)
        path = self.server.folder / parts[-1]
        if not path.exists():
            return self.fail(404, "EntryNotFound")
        if body and self.server.broken == path.name:
            return self.fail(500, "")
        self.send(path.read_bytes(), "application/octet-stream", body)

    def send(self, content: bytes, kind: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "as the Hub says it")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tiny_base)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def base_of(repo: str, revision: str = REVISION) -> Base:
    return Base(
        title="tiny", origin=repo, licence="Apache-2.0", parameters=1, shape=tiny.SHAPE, pre_tokenizer="smollm",
        source=HubSource(repo=repo, revision=revision), scopes=[], context=512,
    )  # fmt: skip


def test_a_base_from_the_hub(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    folder = bases.prepare(base_of("org/tiny"), tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_base / name).read_bytes()
    asked = len(hub.asked)
    assert bases.prepare(base_of("org/tiny"), tmp_path) == folder and len(hub.asked) == asked, "once"


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [
        ("org/gated", REVISION, "org/gated: its authors ask for consent -> consent at .*/org/gated, then set HF_TOKEN"),
        (
            "org/none",
            REVISION,
            "org/none: there is no such repository, or it is private -> check the name; set HF_TOKEN",
        ),
        ("org/tiny", "f" * 40, "org/tiny: it has no revision f{40} -> take the revision"),
    ],
)
def test_a_base_that_cannot_be_had(hub: Hub, tmp_path: Path, repo: str, revision: str, told: str) -> None:
    with pytest.raises(MeetaraError, match=told):
        bases.prepare(base_of(repo, revision), tmp_path)
    assert not [path for path in tmp_path.glob("*") if not path.name.endswith(".partial")]


def test_an_interrupted_download_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "model.safetensors"
    with pytest.raises(
        MeetaraError, match=r"org/tiny: it cannot be downloaded .* -> check the connection and run again"
    ):
        bases.prepare(base_of("org/tiny"), tmp_path)
    hub.broken = ""
    assert (bases.prepare(base_of("org/tiny"), tmp_path) / "model.safetensors").is_file()


def test_without_a_connection(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(MeetaraError, match=r"cannot be downloaded .* or give a local folder with --base"):
        bases.prepare(base_of("org/tiny"), tmp_path)


def test_gguf_files_are_not_made_of_safetensors_yet(tiny_base: Path) -> None:
    from meetara_nb.training.local import local

    bases.check(local(tiny_base))
    with pytest.raises(MeetaraError, match=r"comes as safetensors, .* -> train it with --until train"):
        bases.checked_source(local(tiny_base))
