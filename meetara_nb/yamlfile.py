"""Reads a YAML file into a typed model and reports every fault at once, each with its file, line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import Fault, MeetaraError, nearest

MOST_BYTES = 4_000_000
Key = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Strict(BaseModel):
    """Base of everything that is read from a file: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def load_yaml(path: Path) -> tuple[Any, dict[Key, int]]:
    """The data of a YAML file, and the line of every key and list item.

    Raises:
        MeetaraError: The file is missing, too large, not UTF-8, not YAML, or holds a repeated key or a tag.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise MeetaraError(
                f"the file has {size / 1e6:.1f} MB, over the limit of {MOST_BYTES / 1e6:.0f} MB",
                where=path,
                remedy="a spec or a params file is a few hundred kilobytes; check that it is the right file",
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MeetaraError("no such file", where=path) from None
    except UnicodeDecodeError:
        raise MeetaraError("not UTF-8 text", where=path, remedy="save the file as UTF-8") from None
    except OSError as error:
        raise MeetaraError(f"cannot be read ({error.strerror})", where=path) from None
    lines: dict[Key, int] = {}
    faults: list[Fault] = []
    try:
        _check_form(text, path)
        node = yaml.compose(text, Loader=_Loader)
        data = _build(node, (), lines, faults, path) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise MeetaraError(
            f"not valid YAML: {problem}", where=f"{path}{line}", remedy="quote texts that hold : or # or quotes"
        ) from None
    if faults:
        raise MeetaraError.of(faults)
    return data, lines


MOST_DEPTH = 30


def _check_form(text: str, path: Path) -> None:
    """Refuses what a small file could blow up with: deep nesting, and aliases that repeat a part again and again."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        alias = isinstance(event, yaml.AliasEvent)
        if alias or depth > MOST_DEPTH:
            what = "aliases are not allowed here" if alias else f"nested more than {MOST_DEPTH} deep"
            remedy = "write the text out" if alias else "check the brackets and the indentation"
            line = f":{event.start_mark.line + 1}" if event.start_mark else ""
            raise MeetaraError(what, where=f"{path}{line}", remedy=remedy)


_SAFE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_PLAIN = yaml.constructor.SafeConstructor()


def _build(node: yaml.Node, key: Key, lines: dict[Key, int], faults: list[Fault], path: Path) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(key, line)
    if node.tag not in _SAFE_TAGS:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        faults.append(Fault(f"{tag!r} values are not allowed here", f"{path}:{line}", "write plain text or a number"))
        return None
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for name_node, value_node in node.value:
            name = _PLAIN.construct_object(name_node) if isinstance(name_node, yaml.ScalarNode) else None
            name_line = name_node.start_mark.line + 1
            if not isinstance(name, str):
                faults.append(Fault("a key must be a word", f"{path}:{name_line}", "quote it if it is a number"))
                continue
            if name in result:
                faults.append(Fault(f"the key {name!r} stands here twice", f"{path}:{name_line}", "keep one"))
            lines[(*key, name)] = name_line
            result[name] = _build(value_node, (*key, name), lines, faults, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*key, index), lines, faults, path) for index, item in enumerate(node.value)]
    return _PLAIN.construct_object(node)


def load_model(path: Path, model: type[M]) -> M:
    """The YAML file at `path` as a `model`, or one MeetaraError that lists every fault."""
    data, lines = load_yaml(path)
    return parse_model(data, model, str(path), lines)


def parse_model(data: Any, model: type[M], source: str, lines: dict[Key, int] | None = None) -> M:
    """`data` as a `model`; faults name `source` and, where `lines` has it, the line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise MeetaraError.of(faults_of(error, model, source, lines or {})) from None


def faults_of(error: ValidationError, model: type[BaseModel], source: str, lines: dict[Key, int]) -> list[Fault]:
    """pydantic's errors as faults that a person can act on."""
    found = []
    for item in error.errors(include_url=False):
        key: Key = tuple(item["loc"])
        where = source
        line = next((lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in lines), None)
        if line is not None:
            where += f":{line}"
        if key:
            where += f": {_dotted(key)}"
        found.append(_fault(item, key, model, where))
    return found


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?\Z")


def _fault(item: Any, key: Key, model: type[BaseModel], where: str) -> Fault:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return Fault("unknown key", where, nearest(str(key[-1]), _known(model, key[:-1])))
    if kind == "missing":
        return Fault("missing", where, f"add {key[-1]!r}")
    if kind in ("float_type", "int_type") and isinstance(value, str):
        if _NUMBER.match(value.strip()):
            number = float(value)
            written = repr(int(number)) if kind == "int_type" else repr(number)
            if "e" in written and "." not in written:
                written = written.replace("e", ".0e")
            return Fault(f"a number came as the text {value!r}", where, f"write {written} without quotes")
        return Fault(f"{value!r} is not a number", where, "write a number")
    wanted = {
        "string_type": "text (in quotes)",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": "a mapping of keys",
        "model_type": "a mapping of keys",
    }.get(kind)
    if wanted:
        return Fault(f"{value!r:.60} is not {wanted}", where, f"write {wanted}")
    message = item["msg"].removeprefix("Value error, ")
    return Fault(message[0].lower() + message[1:], where, "" if kind == "value_error" else f"it is {value!r:.60}")


def _known(model: type[BaseModel], key: Key) -> list[str]:
    """The keys that may stand at `key` of `model`, by walking its annotations."""
    current: Any = model
    parts = iter(key)
    for part in parts:
        field = current.model_fields.get(part) if _is_model(current) else None
        if field is None:
            return []
        current = _inner(field.annotation)
        if get_origin(field.annotation) in (dict, list):
            next(parts, None)  # the item's own key or index
    return list(current.model_fields) if _is_model(current) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inner(annotation: Any) -> Any:
    """The model inside `X | None`, `tuple[X, ...]`, `dict[str, X]`, or `annotation` itself."""
    if _is_model(annotation):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        inner = _inner(part)
        if _is_model(inner):
            return inner
    return annotation
