"""The teacher: what is asked, what is kept, resume, and an endpoint's faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from meetara_nb.catalogue import Domain
from meetara_nb.errors import MeetaraError
from meetara_nb.hub.backends import KEY, LlamaCpp, OpenAI, Reply, Transformers
from meetara_nb.hub.dataset import Dropped, compose, to_json
from meetara_nb.hub.grounded import Composer, Draft
from meetara_nb.hub.teacher import REWORDED, Teacher, parsed, request
from meetara_nb.params import DataParams, TeacherParams

DATA = DataParams(samples=60, source="teacher", kinds={"answer": 4.0, "red_flag": 1.0}, misspelt=0.0)


class Endpoint:
    """A loopback server of OpenAI's chat protocol that answers with the notes it was given, or with faults."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.faults: list[int] = []
        self.under_way = self.most_under_way = 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                    fault = outer.faults.pop(0) if outer.faults else 0
                    outer.keys.add(self.headers["Authorization"])
                    if not fault:
                        outer.requests.append(body)
                threading.Event().wait(0.01)
                text = json.dumps({"error": {"message": "no"}} if fault else outer.completion(body)).encode()
                self.send_response(fault or 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with lock:
                    outer.under_way -= 1
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        notes = [line[2:] for line in asked.splitlines() if line.startswith("- ")]
        question = asked.split("something like: ")[1].splitlines()[0]
        text = f"Question: Please tell me, {question}\nAnswer: {' '.join(reversed(notes))}"
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


def teacher(domain: Domain, endpoint: Endpoint, folder: Path, said: list[str], **params: Any) -> Teacher:
    chosen = TeacherParams(backend="openai", url=endpoint.url, model="m", **params)
    return Teacher(domain, DATA, chosen, OpenAI(chosen), folder / "replies.jsonl", said.append)


def test_the_models_words_are_kept_where_they_say_what_the_notes_say(
    domain: Domain, endpoint: Endpoint, tmp_path: Path
) -> None:
    said: list[str] = []
    one = teacher(domain, endpoint, tmp_path, said, price_in=1.0, price_out=10.0)
    data = compose(domain, DATA, one.drafts())
    reworded = [draft for draft in data.drafts if draft.kind in REWORDED]
    assert len(data.drafts) == 60 and len(reworded) > 40
    assert all(draft.turns[0].startswith("Please tell me") for draft in reworded)
    assert {draft.kind for draft in data.drafts} == {"answer", "red_flag"}
    assert "of the first 16 drafts kept; about" in said[0] and "minutes, price about" in said[0]
    assert one.usage.requests == len(endpoint.requests) and 1 < endpoint.most_under_way <= 8


def test_a_broken_run_goes_on_and_ends_as_an_unbroken_one(domain: Domain, endpoint: Endpoint, tmp_path: Path) -> None:
    whole = teacher(domain, endpoint, tmp_path / "a", [])
    expected = to_json(domain, DATA, compose(domain, DATA, whole.drafts()))
    asked = len(endpoint.requests)
    broken = teacher(domain, endpoint, tmp_path / "b", [], retries=0)
    endpoint.requests.clear()
    stream = broken.drafts()
    for _ in range(30):
        next(stream)
    before = len(endpoint.requests)
    replies = tmp_path / "b" / "replies.jsonl"
    replies.write_text(replies.read_text() + '["half a li')
    again = teacher(domain, endpoint, tmp_path / "b", [])
    assert to_json(domain, DATA, compose(domain, DATA, again.drafts())) == expected
    assert again.usage.resumed >= before > 8 and len(endpoint.requests) == asked


def test_other_sampling_is_asked_anew(domain: Domain, endpoint: Endpoint, tmp_path: Path) -> None:
    list(zip(range(20), teacher(domain, endpoint, tmp_path, []).drafts(), strict=False))
    other = teacher(domain, endpoint, tmp_path, [], temperature=0.1)
    list(zip(range(20), other.drafts(), strict=False))
    assert other.usage.resumed == 0


def test_failed_requests_are_tried_again(domain: Domain, endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.faults = [429, 500, 503]
    data = compose(domain, DataParams(samples=20, kinds=DATA.kinds), teacher(domain, endpoint, tmp_path, []).drafts())
    assert len(data.drafts) == 20


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, f"the endpoint refuses the key -> set ${KEY}"),
        (404, "does not know that address or model"),
        (500, "answers with error 500 -> `run` again later"),
    ],
)
def test_an_endpoints_faults_are_one_clear_line(
    domain: Domain, endpoint: Endpoint, tmp_path: Path, fault: int, message: str
) -> None:
    endpoint.faults = [fault] * 100
    with pytest.raises(MeetaraError) as error:
        next(teacher(domain, endpoint, tmp_path, [], retries=0).drafts())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_endpoint_that_is_not_there(domain: Domain, endpoint: Endpoint, tmp_path: Path) -> None:
    one = teacher(domain, endpoint, tmp_path, [], retries=0)
    endpoint.close()
    endpoint._server.server_close()
    with pytest.raises(MeetaraError, match="cannot be reached"):
        next(one.drafts())
    with pytest.raises(MeetaraError, match="no endpoint is given"):
        OpenAI(TeacherParams(backend="openai"))


def test_the_key_comes_from_the_environment_and_stands_in_no_file(
    domain: Domain, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sesame-open")
    said: list[str] = []
    one = teacher(domain, endpoint, tmp_path, said)
    text = to_json(domain, DATA, compose(domain, DATA, one.drafts()), {"model": one.model.name})
    assert endpoint.keys == {"Bearer sesame-open"}
    for place in (text, *said, *(path.read_text() for path in tmp_path.rglob("*.jsonl"))):
        assert "sesame-open" not in place


def first(domain: Domain) -> Draft:
    return next(draft for draft in Composer(domain, 1, {"answer": 1.0}).drafts())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Question: When do {a} come out?\nAnswer: {source}", None),
        ("  Question: When do {a} come out?\n\nAnswer: {source}\nQuestion: And dogs?\nAnswer: No.", None),
        ("{source}", "parse: no question and answer"),
        ("Answer: {source}", "parse: no question and answer"),
        ("Question: Who painted Guernica?\nAnswer: {source}", "off the subject: a question"),
        ("Question: When do {a} come out?\nAnswer: Yes, they do.", "off the subject: an answer"),
    ],
)
def test_replies_are_parsed_or_dropped_with_a_reason(domain: Domain, reply: str, reason: str | None) -> None:
    draft = first(domain)
    filled = reply.format(a=draft.topic, source=draft.sources[0])
    found = parsed(draft, Reply(filled, 1, 1), "both")
    if reason:
        assert isinstance(found, Dropped) and found.reason.startswith(reason)
    else:
        assert isinstance(found, Draft) and found.turns[1] == draft.sources[0]


def test_answers_alone_keep_the_question(domain: Domain) -> None:
    draft = first(domain)
    found = parsed(draft, Reply(draft.sources[0] + " ", 1, 1), "answers")
    assert isinstance(found, Draft) and found.turns == (draft.turns[0], draft.sources[0])
    assert request(domain, draft, "answers")[-1] == {"role": "user", "content": draft.turns[1]}


def test_the_model_sees_the_notes_and_never_the_checks(domain: Domain) -> None:
    draft = first(domain)
    text = json.dumps(request(domain, draft, "both"))
    assert all(json.dumps(source)[1:-1] in text for source in draft.sources)
    assert not any(check.good in text for check in domain.checks)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MeetaraError, match=r"no such file -> set teacher\.model"):
        LlamaCpp(TeacherParams(), tmp_path / "none.gguf")
    with pytest.raises(MeetaraError, match="no model folder"):
        Transformers(TeacherParams(), tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(MeetaraError, match=r"llama\.cpp cannot load it"):
        LlamaCpp(TeacherParams(), tmp_path / "bad.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llama_cpp", "transformers", "openai"])
def test_a_real_model_words_answers(backend: str, domain: Domain, prepared: Path, base: Any, tmp_path: Path) -> None:
    """SmolLM2 through each backend; `openai` is llama-cpp-python's own server on loopback."""
    import socket
    import subprocess
    import sys
    import time

    from meetara_nb.training.bases import checked_source

    gguf = checked_source(base)
    params = TeacherParams(backend=backend, words="answers", temperature=0.2, max_tokens=60, concurrency=4)
    server = None
    try:
        if backend == "llama_cpp":
            model: Any = LlamaCpp(params, gguf)
        elif backend == "transformers":
            model = Transformers(params, prepared)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port)]
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            chosen = params.model_copy(update={"url": f"http://127.0.0.1:{port}/v1", "timeout_s": 300.0})
            model = OpenAI(chosen)
        data = DATA.model_copy(update={"samples": 12, "kinds": {"answer": 1.0, "red_flag": 1.0}})
        said: list[str] = []
        one = Teacher(domain, data, params, model, tmp_path / "replies.jsonl", said.append)
        made = compose(domain, data, one.drafts())
    finally:
        if server:
            server.kill()
            server.wait()
    assert one.usage.requests > 4 and one.usage.tokens_out > one.usage.requests
    funnel = made.funnel.as_dict()
    assert funnel["kept"] == 12 and funnel["generated"] == sum(k["generated"] for k in funnel["by_kind"].values())
    assert said and "of the first 16 drafts kept" in said[0]
