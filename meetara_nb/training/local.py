"""Bases that are not in the registry: a model folder or a GGUF file of the user's own."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from ..errors import MeetaraError
from ..gguf_factory.gguf_io import open_gguf
from ..params import Base, FileSource, FolderSource, Shape
from ..store import digest_of, sha256_of

UNKNOWN_LICENCE = "see the model's own card"


def local(path: Path) -> Base:
    """The base in a local folder or GGUF file, as an entry like the registry's.

    Raises:
        MeetaraError: Neither a model folder nor a GGUF file of a known architecture.
    """
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_folder(path: Path) -> Base:
    config = checked_folder(path)
    weights = sorted(path.glob("*.safetensors"))
    heads = config["num_attention_heads"]
    shape = Shape(
        architecture=config["model_type"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        feed_forward=config["intermediate_size"],
    )
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]
    return Base(
        title=path.name,
        origin=str(path),
        licence=UNKNOWN_LICENCE,
        parameters=_count(weights),
        shape=shape,
        pre_tokenizer="",
        source=FolderSource(folder=str(path.absolute()), identity=digest_of([config, files])),
        scopes=[],
        context=config.get("max_position_embeddings", 2048),
    )


def _count(files: list[Path]) -> int:
    """Parameters in safetensors files, from their headers."""
    from safetensors import safe_open

    total = 0
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    total += prod(tensors.get_slice(name).get_shape())
        except Exception as error:  # safetensors raises its own kind for a damaged file
            raise MeetaraError(
                f"not a whole safetensors file ({error})", where=file, remedy="get the model again"
            ) from None
    return total


def checked_folder(path: Path) -> dict[str, Any]:
    """The folder's configuration.

    Raises:
        MeetaraError: Something is missing that training needs.
    """
    remedy = "give a folder as transformers' save_pretrained or a download of a model repository leaves it"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MeetaraError(f"not a model folder: config.json: {error}", where=path, remedy=remedy) from None
    if config.get("quantization_config"):
        raise MeetaraError("the model is quantised already", where=path, remedy="give its unquantised form")
    for what, pattern in (("weights", "*.safetensors"), ("a tokenizer", "tokenizer*")):
        if not any(path.glob(pattern)):
            raise MeetaraError(f"the model folder has no {what} ({pattern})", where=path, remedy=remedy)
    index = path / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (path / shard).exists()):
            raise MeetaraError(f"{missing[0]} is missing", where=path, remedy="get the model again")
    needed = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    if absent := [key for key in needed if key not in config]:
        raise MeetaraError(f"config.json has no {absent[0]}", where=path, remedy="choose a text model")
    return config


def _of_gguf(path: Path) -> Base:
    reader = open_gguf(path)
    plain = ("general.", "llama.", "tokenizer.ggml.pre")
    header = {key: field.contents() for key, field in reader.fields.items() if key.startswith(plain)}
    architecture = header.get("general.architecture")

    if architecture != "llama":
        raise MeetaraError(
            f"the architecture {architecture!r} cannot be read from GGUF",
            where=path,
            remedy="give the model as a folder of safetensors",
        )

    def field(name: str, default: Any = None) -> Any:
        value = header.get(f"llama.{name}", default)
        if value is None:
            raise MeetaraError(f"the GGUF header has no llama.{name}", where=path, remedy="choose a text model")
        return value

    heads = field("attention.head_count")
    return Base(
        title=path.stem,
        origin=str(path),
        licence=str(header.get("general.license", UNKNOWN_LICENCE)),
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        shape=Shape(
            architecture=architecture,
            layers=field("block_count"),
            hidden=field("embedding_length"),
            heads=heads,
            kv_heads=field("attention.head_count_kv", heads),
            head_size=field("attention.key_length", field("embedding_length") // heads),
            feed_forward=field("feed_forward_length"),
        ),
        pre_tokenizer=str(header.get("tokenizer.ggml.pre", "gpt-2")),
        source=FileSource(path=str(path.absolute()), sha256=sha256_of(path)),
        scopes=[],
        context=field("context_length"),
    )
