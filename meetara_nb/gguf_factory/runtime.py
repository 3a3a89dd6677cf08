"""llama.cpp as the lab uses it: one base, an adapter that can be swapped, scores and answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np

from ..errors import MeetaraError

Array = np.ndarray[Any, Any]
Message = dict[str, str]

MOST_ANSWERS = 8
"""Answers that are scored together."""

# llama.cpp calls it from C for as long as it runs; an unreferenced callback would crash it.
_lines: list[str] = []


@ll.llama_log_callback
def _on_log(level: int, text: bytes, _: Any) -> None:
    _lines.append(text.decode("utf-8", "replace").rstrip())
    del _lines[:-200]


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """llama.cpp's own messages, collected instead of printed."""
    ll.llama_log_set(_on_log, ctypes.c_void_p(0))
    _lines.clear()
    yield _lines


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer.
        tokens: Their number, without the end token.
        stopped: Whether it ended by itself, with an end-of-generation token.
        first_token_s: Seconds until the first token, the prompt included.
        tokens_per_s: Rate of the tokens after the first; 0 where there were none.
    """

    text: str
    tokens: int
    stopped: bool
    first_token_s: float
    tokens_per_s: float


class Runtime:
    """A GGUF model in llama.cpp on the CPU.

    Args:
        model: The GGUF file of a whole model.
        context: Tokens of context.

    Raises:
        MeetaraError: llama.cpp cannot load it.
    """

    def __init__(self, model: Path, context: int = 1024) -> None:
        started = time.monotonic()
        with captured_log() as lines:
            ll.llama_backend_init()
            params = ll.llama_model_default_params()
            params.n_gpu_layers = 0
            self._model = ll.llama_model_load_from_file(str(model).encode(), params)
            if not self._model:
                reason = next((line for line in reversed(lines) if "error" in line.lower()), "no reason given")
                raise MeetaraError(f"llama.cpp cannot load it: {reason}", where=model, remedy="make the file again")
            options = ll.llama_context_default_params()
            options.n_ctx = options.n_batch = context
            # Several answers to one prompt share its part of the cache.
            options.n_seq_max, options.kv_unified = MOST_ANSWERS, True
            options.n_threads = options.n_threads_batch = os.cpu_count() or 1
            self._context = ll.llama_init_from_model(self._model, options)
        if not self._context:
            raise MeetaraError("llama.cpp cannot make a context", where=model, remedy="free some memory")
        self.load_s = time.monotonic() - started
        self.path = model
        self.context = context
        self._vocab = ll.llama_model_get_vocab(self._model)
        self._vocab_size = ll.llama_vocab_n_tokens(self._vocab)
        self._memory = ll.llama_get_memory(self._context)
        self._batch = ll.llama_batch_init(context, 0, 1)
        self._adapter: Any = None
        self._held: list[int] = []

    def close(self) -> None:
        self.set_adapter(None)
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)
        ll.llama_model_free(self._model)

    def set_adapter(self, path: Path | None) -> float:
        """Applies an adapter file, or none; returns the seconds it took.

        Raises:
            MeetaraError: llama.cpp refuses it for this base.
        """
        started = time.monotonic()
        ll.llama_set_adapters_lora(self._context, None, 0, None)
        if self._adapter:
            ll.llama_adapter_lora_free(self._adapter)
            self._adapter = None
        if path is not None:
            with captured_log() as lines:
                adapter = ll.llama_adapter_lora_init(self._model, str(path).encode())
            if not adapter:
                reason = next((line for line in reversed(lines) if "fail" in line or "error" in line), "")
                raise MeetaraError(f"llama.cpp refuses the adapter: {reason}", where=path, remedy="make it again")
            self._adapter = adapter
            adapters = (ll.llama_adapter_lora_p_ctypes * 1)(adapter)
            if ll.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)):
                raise MeetaraError("llama.cpp could not apply the adapter", where=path, remedy="make it again")
        # What is in the cache was computed with the other weights.
        ll.llama_memory_clear(self._memory, True)
        self._held = []
        return time.monotonic() - started

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens recognised, none added."""
        data = text.encode()
        room = len(data) + 8
        buffer = (ll.llama_token * room)()
        count = ll.llama_tokenize(self._vocab, data, len(data), buffer, room, False, True)
        if count < 0:
            raise MeetaraError(f"the text has more than {room} tokens")
        return list(buffer[:count])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        buffer = (ll.llama_token * len(tokens))(*tokens)
        room = 64 + 32 * len(tokens)
        text = ctypes.create_string_buffer(room)
        count = ll.llama_detokenize(self._vocab, buffer, len(tokens), text, room, False, special)
        return text.raw[:count].decode("utf-8", "replace")

    def meta(self, key: str) -> str:
        """A header field as text; empty where there is none."""
        room = 1 << 16
        text = ctypes.create_string_buffer(room)
        count = ll.llama_model_meta_val_str(self._model, key.encode(), text, room)
        return text.raw[:count].decode("utf-8", "replace") if count > 0 else ""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks, by the file's own chat template."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.meta("tokenizer.chat_template")
        if not template:
            raise MeetaraError("the file has no chat template", where=self.path, remedy="make the file again")
        end = ll.llama_vocab_get_text(self._vocab, ll.llama_vocab_eos(self._vocab)).decode()
        start = ll.llama_vocab_bos(self._vocab)
        start_text = ll.llama_vocab_get_text(self._vocab, start).decode() if start >= 0 else ""
        formatter = Jinja2ChatFormatter(template, eos_token=end, bos_token=start_text)
        return self.tokenize(formatter(messages=list(messages)).prompt)  # type: ignore[arg-type]

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Array:
        """Logits that predict each token of `answer` after `prompt`: float32 [len(answer), vocabulary].

        What the cache already holds of the prompt is not computed again.
        """
        tokens = [*prompt, *answer]
        if len(tokens) > self.context:
            raise MeetaraError(f"{len(tokens)} tokens do not fit the context of {self.context}")
        first = len(prompt) - 1
        keep = 0
        while keep < min(len(self._held), first) and self._held[keep] == tokens[keep]:
            keep += 1
        ll.llama_memory_seq_rm(self._memory, 0, keep, -1)
        self._held = tokens[:-1]
        rows = self._decode(tokens[keep:-1], keep, wanted_from=first)
        return rows

    def _decode(self, tokens: Sequence[int], position: int, wanted_from: int) -> Array:
        places = range(position, position + len(tokens))
        return self._evaluate([(t, place, 0, place >= wanted_from) for t, place in zip(tokens, places, strict=True)])

    def _evaluate(self, entries: Sequence[tuple[int, int, int, bool]]) -> Array:
        """One batch of (token, position, sequence, whether its logits are wanted); the wanted rows of logits."""
        batch = self._batch
        batch.n_tokens = len(entries)
        wanted = []
        for i, (token, place, sequence, want) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, want
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if want:
                wanted.append(i)
        if status := ll.llama_decode(self._context, batch):
            raise MeetaraError(f"llama.cpp could not evaluate {len(entries)} tokens (code {status})", where=self.path)
        rows = np.empty((len(wanted), self._vocab_size), dtype=np.float32)
        for row, i in enumerate(wanted):
            pointer = ll.llama_get_logits_ith(self._context, i)
            rows[row] = np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
        return rows

    def log_probs(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Array]:
        """Natural log-probability of each token of each answer after `prompt`: float64 [tokens] for every answer.

        The prompt is computed once, the answers together, each in a sequence of its own.
        """
        if len(answers) > MOST_ANSWERS or len(prompt) + sum(map(len, answers)) > self.context:
            raise MeetaraError(f"{len(answers)} answers do not fit the context of {self.context} tokens")
        ll.llama_memory_clear(self._memory, True)
        self._held = []
        first = self._decode(prompt, 0, wanted_from=len(prompt) - 1)
        entries = []
        for sequence, answer in enumerate(answers):
            if sequence:
                ll.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            entries += [(token, len(prompt) + i, sequence, True) for i, token in enumerate(answer[:-1])]
        rest = self._evaluate(entries) if entries else first[:0]
        found, start = [], 0
        for answer in answers:
            rows = np.concatenate([first, rest[start : start + len(answer) - 1]])
            start += len(answer) - 1
            rows -= rows.max(axis=-1, keepdims=True)
            picked = rows[np.arange(len(answer)), list(answer)].astype(np.float64)
            found.append(picked - np.log(np.exp(rows, out=rows).sum(axis=-1, dtype=np.float64)))
        ll.llama_memory_clear(self._memory, True)
        return found

    def answer(self, messages: Sequence[Message], most_tokens: int) -> Answer:
        """The most likely next token again and again, until the model ends its turn or `most_tokens` are said."""
        started = time.monotonic()
        prompt = self.prompt(messages)
        most_tokens = min(most_tokens, self.context - len(prompt) - 1)
        ll.llama_memory_clear(self._memory, True)
        self._held = []
        said: list[int] = []
        rows = self._decode(prompt, 0, wanted_from=len(prompt) - 1)
        first_s = time.monotonic() - started
        stopped = False
        while True:
            token = int(rows[0].argmax())
            stopped = bool(ll.llama_vocab_is_eog(self._vocab, token))
            if stopped or len(said) == most_tokens:
                break
            said.append(token)
            rows = self._decode([token], len(prompt) + len(said) - 1, wanted_from=0)
        rest_s = time.monotonic() - started - first_s
        rate = len(said) / rest_s if said and rest_s > 0 else 0.0
        text = self.detokenize(said).strip() if said else ""
        return Answer(text, len(said), stopped, first_s, rate)


def log_softmax(rows: Array) -> Array:
    """log-softmax over the last axis in float64."""
    rows = rows.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
