"""From a YAML file and command-line overrides to a checked config, with errors that name file, key and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vmjepa.config_base import KeyProblem, Section
from vmjepa.errors import ConfigError

S = TypeVar("S", bound=Section)
Key = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section of `key: value` lines",
    "literal_error": "one of {expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "string_too_short": "text of at least {min_length} character",
}


class _UnusableKey(Exception):
    def __init__(self, key: Key, text: str) -> None:
        super().__init__(text)
        self.key, self.text = key, text


def load(schema: type[S], path: Path, overrides: Sequence[str]) -> tuple[S, list[str]]:
    """The config in `path` with `overrides` applied, and notices about keys that do nothing. Raises ConfigError."""
    raw = read_yaml(path)
    changed = {apply_override(raw, override): override for override in overrides}
    notices: list[str] = []
    try:
        cleaned = _without_foreign_keys(schema, schema, raw, (), notices)
        return schema.model_validate(cleaned), [f"{path}: {notice}" for notice in notices]
    except _UnusableKey as error:
        key, text = error.key, error.text
    except ValidationError as error:
        problems = [_describe(schema, details) for details in error.errors()]
        key, text = problems[0]
        if len(problems) > 1:
            text += f" (also to mend: {', '.join(_dotted(other) for other, _ in problems[1:])})"
    raise ConfigError(f"{_origin(path, changed, key)}: {_dotted(key)}: {text}")


def _origin(path: Path, changed: dict[Key, str], key: Key) -> str:
    """Who set the key that is wrong: an override, or the file (with overrides, which may matter to it)."""
    for target, override in changed.items():
        if key[: len(target)] == target:
            return f"override {override!r}"
    return f"{path} with {' '.join(changed.values())}" if changed else str(path)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML allows a key twice and keeps the last; in a config that hides a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key_node.value!r} appears twice; keep one", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError when it is missing, empty, no YAML, or no `key: value` lines."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; check the path, or start from a file in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder; name a YAML file inside it") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; name a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from None
    if raw is None:
        raise ConfigError(f"{path}: the file is empty; start from a file in configs/")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected `section:` lines, found {_show(raw)}; start from a file in configs/")
    return raw


def run_folder(path: Path, overrides: Sequence[str]) -> str | None:
    """logging.folder of a config that may be wrong elsewhere, so that its error can be noted there; None if unclear."""
    raw: dict[str, Any] = {}
    with suppress(ConfigError):  # an override may still name the folder
        raw = read_yaml(path)
    for override in overrides:
        if override.partition("=")[0].strip() == "logging.folder":
            raw["logging"] = {"folder": override.partition("=")[2].strip()}
    section = raw.get("logging")
    folder = section.get("folder") if isinstance(section, dict) else None
    return folder if isinstance(folder, str) and folder else None


def apply_override(raw: dict[str, Any], override: str) -> Key:
    """Sets the key of `key.sub=value` (list entries by number: mask.0.num_blocks=4) in place and returns it.

    Whether the key exists in the schema is checked later, with everything else. Raises ConfigError.
    """
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key.sub=value, e.g. optimization.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {_yaml_problem(error)}") from None
    node: Any = raw
    key: list[str | int] = []
    for part in parts:
        step: str | int = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                place = ".".join(map(str, key))
                raise ConfigError(
                    f"override {override!r}: {place} is a list of {len(node)}; name an entry from {place}.0 to "
                    f"{place}.{len(node) - 1}"
                )
            step = int(part)
        elif not isinstance(node, dict):
            place = ".".join(map(str, key))
            raise ConfigError(f"override {override!r}: {place} is the value {_show(node)}, no section; set {place}=…")
        key.append(step)
        if len(key) == len(parts):
            node[step] = value
            break
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    return tuple(key)


def _without_foreign_keys(
    root: type[Section], schema: type[Section], raw: dict[Any, Any], at: Key, notices: list[str]
) -> dict[str, Any]:
    """Drops keys that the schema knows as unused (with a notice) or neutral; raises _UnusableKey for unknown keys."""
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        here = (*at, str(key))
        if key in schema.unused:
            notices.append(f"{_dotted(here)} is accepted but not used: {schema.unused[key]}")
        elif key in schema.unsupported:
            neutral = schema.unsupported[key]
            if value != neutral or isinstance(value, bool) != isinstance(neutral, bool):  # False == 0 in Python
                text = f"{_show(value)} is not supported yet; set it to {_show(neutral)} or remove the key"
                raise _UnusableKey(here, text)
        elif key in schema.misplaced:
            raise _UnusableKey(here, schema.misplaced[key])
        elif key not in schema.model_fields:
            raise _UnusableKey(here, f"unknown key; {_suggestion(root, schema, here)}")
        else:
            inner = _section_in(schema.model_fields[key].annotation)
            if inner is None:
                kept[key] = value
            elif isinstance(value, dict):
                kept[key] = _without_foreign_keys(root, inner, value, here, notices)
            elif isinstance(value, list):
                kept[key] = [
                    _without_foreign_keys(root, inner, entry, (*here, i), notices) if isinstance(entry, dict) else entry
                    for i, entry in enumerate(value)
                ]
            elif value is not None:  # a section left empty in the file counts as absent
                kept[key] = value
    return kept


def _section_in(annotation: Any) -> type[Section] | None:
    """The section type that an annotation holds, directly or as list entries."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = [_section_in(inner) for inner in get_args(annotation)]
    return next((section for section in found if section is not None), None)


def _suggestion(root: type[Section], schema: type[Section], at: Key) -> str:
    """Names the known key that an unknown one most likely means: first in its own section, then anywhere."""
    plain = _plain(str(at[-1]))
    own = {_plain(key): key for key in schema.model_fields}
    close = difflib.get_close_matches(plain, own, n=1)
    if close:
        return f"did you mean {_dotted((*at[:-1], own[close[0]]))}?"
    everywhere = {_plain(key.rsplit(".", 1)[-1]): key for key in _all_keys(root)}
    close = difflib.get_close_matches(plain, everywhere, n=1, cutoff=0.8)
    if close:
        return f"did you mean {everywhere[close[0]]}?"
    return f"known keys here: {', '.join(schema.model_fields)}"


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _all_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in schema.model_fields.items():
        inner = _section_in(field.annotation)
        yield prefix + key
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{key}.")


def _describe(schema: type[Section], details: Any) -> tuple[Key, str]:
    """pydantic's error as (key, what is wrong and what to do)."""
    key, kind, context = tuple(details["loc"]), details["type"], details.get("ctx", {})
    if kind == "missing":
        return key, f"missing; add it: {_description(schema, key)}"
    if kind == "value_error":
        error = context["error"]
        if isinstance(error, KeyProblem):
            return (*key, *error.key.split(".")), error.text
        return key, str(error)
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else details["msg"]
    return key, f"given {_show(details['input'])}, expected {expected}"


def _description(schema: type[Section], key: Key) -> str:
    field = None
    for part in key:
        if isinstance(part, str):
            field = schema.model_fields[part]
            schema = _section_in(field.annotation) or schema
    return (field.description or "") if field else ""


def _show(value: Any) -> str:
    """A value as YAML writes it, with its type where that is not obvious: 'abc' (text)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} (text)" if isinstance(value, str) else text


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or "not YAML"
    return where + problem + ("" if "keep one" in problem else "; mend the YAML there (indentation, colons, quotes)")


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
