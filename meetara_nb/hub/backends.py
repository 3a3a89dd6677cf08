"""Ways to a teacher: a GGUF file in llama.cpp, a model folder in transformers, or an endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..device import detect
from ..errors import MeetaraError
from ..params import TeacherParams

KEY = "MEETARA_TEACHER_KEY"
Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens it read and wrote."""

    text: str
    tokens_in: int
    tokens_out: int


class Backend(Protocol):
    """A way to a model. `name` tells replies of one model from another's; `together` is how many it takes at once."""

    name: str
    together: int

    def complete(self, requests: Sequence[list[Message]], seeds: Sequence[int]) -> list[Reply]: ...


class LlamaCpp:
    """A GGUF file in this process, one reply after the other."""

    def __init__(self, params: TeacherParams, model: Path) -> None:
        if not model.is_file():
            raise MeetaraError("no such file", where=model, remedy="set teacher.model to a GGUF file")
        import llama_cpp

        self.name, self.together, self._params = f"{model.name}:{model.stat().st_size}", 1, params
        try:
            self._model = llama_cpp.Llama(str(model), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)
        except ValueError:
            raise MeetaraError("llama.cpp cannot load it", where=model, remedy="check that it is a GGUF file") from None

    def complete(self, requests: Sequence[list[Message]], seeds: Sequence[int]) -> list[Reply]:
        replies = []
        for messages, seed in zip(requests, seeds, strict=True):
            said: Any = self._model.create_chat_completion(
                messages,  # type: ignore[arg-type]
                temperature=self._params.temperature,
                max_tokens=self._params.max_tokens,
                seed=seed,
            )
            usage = said["usage"]
            text = said["choices"][0]["message"]["content"] or ""
            replies.append(Reply(text, usage["prompt_tokens"], usage["completion_tokens"]))
        return replies


class Transformers:
    """A model folder in this process: replies are generated in batches, on the GPU where there is one."""

    def __init__(self, params: TeacherParams, model: Path) -> None:
        if not (model / "config.json").is_file():
            raise MeetaraError("no model folder", where=model, remedy="set teacher.model to one with a config.json")
        import torch
        import transformers

        self.name, self.together, self._params = f"{model.name}:transformers", params.concurrency, params
        self._torch = torch
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
        where = detect()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[where.precision]
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=where.kind)
        self._model.eval()

    def complete(self, requests: Sequence[list[Message]], seeds: Sequence[int]) -> list[Reply]:
        torch, tokenizer = self._torch, self._tokenizer
        torch.manual_seed(seeds[0])
        batch = tokenizer.apply_chat_template(
            [list(messages) for messages in requests],
            add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        ).to(self._model.device)  # fmt: skip
        sampling = {"do_sample": True, "temperature": self._params.temperature} if self._params.temperature else {}
        with torch.inference_mode():
            output = self._model.generate(
                **batch, max_new_tokens=self._params.max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        replies = []
        for row, mask in zip(output[:, batch["input_ids"].shape[1] :], batch["attention_mask"], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            written = int((row != tokenizer.pad_token_id).sum())
            replies.append(Reply(text, int(mask.sum()), written))
        return replies


class OpenAI:
    """An endpoint that speaks OpenAI's chat protocol; so many requests under way at once, failed ones tried again."""

    def __init__(self, params: TeacherParams) -> None:
        if not params.url:
            raise MeetaraError(
                "no endpoint is given", where="teacher.url", remedy="for example http://127.0.0.1:8000/v1"
            )
        import openai

        self.name, self.together, self._params = f"{params.url}:{params.model}", params.concurrency, params
        self._errors = openai
        # The key comes from the environment alone, so that it stands in no parameter, file or log.
        self._client = openai.OpenAI(
            base_url=params.url,
            api_key=os.environ.get(KEY) or "none",
            max_retries=params.retries,
            timeout=params.timeout_s,
        )

    def complete(self, requests: Sequence[list[Message]], seeds: Sequence[int]) -> list[Reply]:
        with ThreadPoolExecutor(self.together) as pool:
            return list(pool.map(self._one, requests, seeds))

    def _one(self, messages: list[Message], seed: int) -> Reply:
        where, errors = self._params.url, self._errors
        try:
            said = self._client.chat.completions.create(
                model=self._params.model or "default",
                messages=messages,  # type: ignore[arg-type]
                temperature=self._params.temperature,
                max_tokens=self._params.max_tokens,
                seed=seed,
            )
        except (errors.AuthenticationError, errors.PermissionDeniedError):
            raise MeetaraError("the endpoint refuses the key", where=where, remedy=f"set ${KEY}") from None
        except errors.NotFoundError:
            remedy = f"check teacher.url and teacher.model ({self._params.model!r})"
            raise MeetaraError("the endpoint does not know that address or model", where=where, remedy=remedy) from None
        except errors.APIConnectionError as error:
            reason = "does not answer in time" if isinstance(error, errors.APITimeoutError) else "cannot be reached"
            tries = self._params.retries + 1
            remedy = "check that it runs; `run` again goes on from here"
            raise MeetaraError(f"the endpoint {reason} ({tries} tries)", where=where, remedy=remedy) from None
        except errors.APIStatusError as error:
            remedy = "`run` again later goes on from here"
            raise MeetaraError(
                f"the endpoint answers with error {error.status_code}", where=where, remedy=remedy
            ) from None
        if not said.choices:
            raise MeetaraError("the endpoint's reply is no chat completion", where=where, remedy="check teacher.url")
        usage = said.usage
        text = said.choices[0].message.content or ""
        return Reply(text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)


def backend(params: TeacherParams, base_file: Callable[[], Path], base_folder: Callable[[], Path]) -> Backend:
    """The backend that `params` names; the base's own weights, as GGUF or as a folder, where they name no model."""
    if params.backend == "openai":
        return OpenAI(params)
    if params.backend == "llama_cpp":
        return LlamaCpp(params, Path(params.model).expanduser() if params.model else base_file())
    return Transformers(params, Path(params.model).expanduser() if params.model else base_folder())
