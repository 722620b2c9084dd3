"""Turn options into frozen dataclasses and back: the fields of a pass are its textual options.

What may live here: reading a value by the type of its field, writing it, and describing the fields for a person.
Nothing here knows passes.

A field's type is one of ``bool``, ``int``, ``float``, ``str``, ``None``, an enum, a ``Literal``, a ``tuple`` or
``Sequence`` of these, a ``Mapping`` from text to these, a dataclass of such fields, or a union. A field with the
metadata of :func:`choice` holds an instance of one of several dataclasses and is written by the name of its class:
``importance=l2``, ``importance=group-taylor{batches=4}``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

from graphopt.errors import PipelineError, unknown_name
from graphopt.pipeline.text import Call, Literal, Table, Word, is_word, print_literal

__all__ = ["OptionDoc", "choice", "decode", "describe", "encode", "summary", "toml_lines"]

_CHOICES: Final = "choices"
_TRUTH: Final = {"true": True, "false": False}
_NUMBER: Final = re.compile(r"[+-]?(inf|nan|\d+(\.\d+)?(e[+-]?\d+)?)")


class _MismatchError(Exception):
    """A value does not fit a type; ``args[0]`` says what was wanted, or the whole sentence."""


def choice(choices: Mapping[str, type]) -> Mapping[str, Any]:
    """Return the metadata of a dataclass field that holds an instance of one of ``choices``.

    Example:
        >>> criterion: Criterion = field(default=L2(), metadata=choice(CRITERIA))  # doctest: +SKIP

    Args:
        choices: the classes, frozen dataclasses, by the names that texts use.
    """
    return {_CHOICES: choices}


# -- reading --------------------------------------------------------------------------------------------------------


def decode(cls: type, table: Mapping[str, Any], where: str) -> Any:
    """Make an instance of the dataclass ``cls`` from options as a text or a TOML file gives them.

    Raises:
        PipelineError: an option does not exist, or its value does not fit; the message starts with ``where``.
    """
    fields = _fields(cls)
    arguments: dict[str, Any] = {}
    for key, raw in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise PipelineError(unknown_name(f"option of {where}", key, fields))
        field, hint = fields[name]
        try:
            arguments[name] = _read(field, hint, raw, f"{where}, {name}")
        except _MismatchError as error:
            raise PipelineError(f"{where}: the option '{name}' must be {error}; found {_shown(raw)}") from None
    missing = [n for n, (f, _) in fields.items() if n not in arguments and _default(f) is dataclasses.MISSING]
    if missing:
        raise PipelineError(f"{where}: the option '{missing[0]}' has no default; write {missing[0]}=…")
    try:
        return cls(**arguments)
    except (TypeError, ValueError, PipelineError) as error:
        raise PipelineError(f"{where}: {error}") from error


def _read(field: dataclasses.Field[Any], hint: Any, raw: Any, where: str) -> Any:
    choices = field.metadata.get(_CHOICES)
    return _value(hint, raw, where) if choices is None else _chosen(choices, hint, raw, where)


def _chosen(choices: Mapping[str, type], hint: Any, raw: Any, where: str) -> Any:
    if _is_none(raw) and type(None) in typing.get_args(hint):
        return None
    options: Mapping[str, Any] = {}
    if isinstance(raw, Call):
        raw, options = raw.name, raw.options
    elif isinstance(raw, dict) and isinstance(raw.get("name"), str):
        raw, options = raw["name"], {k: v for k, v in raw.items() if k != "name"}
    if not isinstance(raw, str):
        raise _MismatchError(f"one of {', '.join(choices)}")
    if raw not in choices:
        raise PipelineError(unknown_name(f"value of {where}:", raw, choices))
    return decode(choices[raw], options, f"{where}={raw}")


def _value(hint: Any, raw: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(parameters, raw, where)
    if origin in (tuple, Sequence):
        return _sequence(parameters if origin is tuple else (*parameters, Ellipsis), raw, where)
    if origin is Mapping:
        if not isinstance(raw, dict):
            raise _MismatchError(_type_name(hint))
        found_items = {}
        for key, item in raw.items():
            try:
                found_items[str(key)] = _value(parameters[1], item, f"{where}.{key}")
            except _MismatchError as error:
                raise _MismatchError(f"a table whose entry '{key}' is {error}") from None
        return found_items
    if origin is typing.Literal:
        found = next((p for p in parameters if isinstance(raw, str) and str(p) == raw), None)
        if found is None:
            raise _unknown_value(raw, where, map(str, parameters))
        return found
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = {str(m.value): m for m in hint}
        if not isinstance(raw, str) or raw not in members:
            raise _unknown_value(raw, where, members)
        return members[raw]
    if dataclasses.is_dataclass(hint):
        if not isinstance(raw, dict):
            raise _MismatchError(_type_name(hint))
        return decode(typing.cast(type, hint), raw, where)
    return _scalar(hint, raw)


def _scalar(hint: Any, raw: Any) -> Any:
    if hint in (None, type(None)):
        if _is_none(raw):
            return None
    elif hint is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, Word) and raw in _TRUTH:
            return _TRUTH[raw]
    elif hint in (int, float):
        if isinstance(raw, Word):
            try:
                return hint(raw)
            except ValueError:
                pass
        elif isinstance(raw, int | hint) and not isinstance(raw, bool):
            return hint(raw)
    elif hint is str:
        if isinstance(raw, str):
            return str(raw)
    else:
        raise TypeError(f"{hint!r} cannot be the type of an option")
    raise _MismatchError(_type_name(hint))


def _first_fit(hints: Sequence[Any], raw: Any, where: str) -> Any:
    # A word is text only where it is nothing else.
    for hint in sorted(hints, key=lambda h: h is str and isinstance(raw, Word)):
        try:
            return _value(hint, raw, where)
        except _MismatchError:
            continue
        except PipelineError:
            if dataclasses.is_dataclass(hint):  # the table was meant for it, and is wrong inside
                raise
    raise _MismatchError(_type_name(typing.Union[tuple(hints)]))  # noqa: UP007  # built at run time


def _sequence(parameters: Sequence[Any], raw: Any, where: str) -> tuple[Any, ...]:
    items = raw if isinstance(raw, list) else [raw]
    if len(parameters) == 2 and parameters[1] is Ellipsis:
        return tuple(_value(parameters[0], item, where) for item in items)
    if len(items) != len(parameters):
        raise _MismatchError(f"a list of {len(parameters)} values")
    return tuple(_value(hint, item, where) for hint, item in zip(parameters, items, strict=True))


def _unknown_value(raw: Any, where: str, valid: Any) -> PipelineError:
    shown = raw if isinstance(raw, str) else _shown(raw)
    return PipelineError(unknown_name(f"value of {where}:", shown, valid))


def _is_none(raw: Any) -> bool:
    return raw is None or (isinstance(raw, Word) and raw == "none")


def _shown(raw: Any) -> str:
    return print_literal(raw) if isinstance(raw, str | Call | list | dict) else repr(raw)


# -- writing --------------------------------------------------------------------------------------------------------


def encode(instance: Any) -> dict[str, Literal]:
    """Return the options of a dataclass that differ from their defaults, as :func:`decode` takes them."""
    found: dict[str, Literal] = {}
    cls: type = type(instance)
    for name, (field, hint) in _fields(cls).items():
        value = getattr(instance, name)
        if value != _default(field) or isinstance(value, bool) is not isinstance(_default(field), bool):
            choices = field.metadata.get(_CHOICES)
            found[name] = _literal(hint, value) if choices is None else _named(choices, value)
    return found


def _named(choices: Mapping[str, type], value: Any) -> Literal:
    if value is None:
        return Word("none")
    for name, cls in choices.items():
        if type(value) is cls:
            options = encode(value)
            return Call(name, options) if options else Word(name)
    raise PipelineError(
        f"{type(value).__name__} has no name that a pipeline's text could use; choose one of {', '.join(choices)}, "
        "or build the pipeline in Python and do not print it"
    )


def _literal(hint: Any, value: Any) -> Literal:
    if value is None:
        return Word("none")
    if isinstance(value, bool):
        return Word(str(value).lower())
    if isinstance(value, Enum):
        return _string(str(value.value))
    if isinstance(value, int | float):
        return Word(repr(value))
    if isinstance(value, str):
        return value if typing.get_origin(hint) in (typing.Union, types.UnionType) else _string(value)
    if isinstance(value, tuple | list):
        return [_literal(None, item) for item in value]
    if isinstance(value, Mapping):
        return Table({key: _literal(None, item) for key, item in value.items()})
    if dataclasses.is_dataclass(value):
        return encode(value)
    raise PipelineError(f"{value!r} cannot be written in a pipeline's text")


def _string(value: str) -> str:
    plain = is_word(value) and value not in _TRUTH and value != "none" and not _NUMBER.fullmatch(value)
    return Word(value) if plain else value


def toml_lines(options: Mapping[str, Literal], prefix: str = "") -> Iterator[str]:
    """Yield options, as :func:`encode` gives them, as lines of TOML."""
    for key, value in options.items():
        if isinstance(value, dict) and value and not isinstance(value, Table):
            yield from toml_lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {_toml(value)}"


def _toml(value: Literal) -> str:
    if isinstance(value, Word):
        return str(value) if value in _TRUTH or _NUMBER.fullmatch(value) else _quoted(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Table):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    table = {"name": Word(value.name), **value.options} if isinstance(value, Call) else value
    return "{" + ", ".join(toml_lines(table)) + "}"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# -- describing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptionDoc:
    """Describe one option for a person: its name, what it takes, its default as text, and what it does."""

    name: str
    takes: str
    default: str
    help: str

    def to_dict(self) -> dict[str, str]:
        """Return the description as plain values."""
        return dataclasses.asdict(self)


def describe(cls: type, prefix: str = "") -> list[OptionDoc]:
    """Describe the options of a dataclass; those of a nested dataclass by their dotted names."""
    helps = _helps(cls)
    found: list[OptionDoc] = []
    for name, (field, hint) in _fields(cls).items():
        nested = [h for h in _members(hint) if dataclasses.is_dataclass(h)]
        choices = field.metadata.get(_CHOICES)
        if choices is None and len(nested) == 1:
            found += describe(typing.cast(type, nested[0]), f"{prefix}{name}.")
            continue
        default = _default(field)
        if choices is not None:
            takes = " | ".join(choices)
            shown = print_literal(_named(choices, default))
        else:
            takes = _type_name(hint)
            shown = "" if default is dataclasses.MISSING else print_literal(_literal(hint, default))
        found.append(OptionDoc(prefix + name, takes, shown, helps.get(name, "")))
    return found


def summary(cls: type) -> str:
    """Return the first sentence of a class's docstring."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _helps(cls: type) -> dict[str, str]:
    """Read what docstrings say of each field, in their sections ``Args`` or ``Attributes``; base classes count."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        section = re.search(
            r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(each.__doc__ or ""), re.MULTILINE
        )
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.group(1), re.MULTILINE) if section else []
        found |= {name: re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())) for name, text in entries}
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "none"}
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, parameters))
    if origin in (tuple, Sequence):
        inner = dict.fromkeys(_type_name(p) for p in parameters if p is not Ellipsis)
        return f"a list of {' or '.join(inner)}"
    if origin is Mapping:
        return f"a table from text to {_type_name(parameters[1])}"
    if origin is typing.Literal:
        return " | ".join(map(str, parameters))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(m.value) for m in hint)
    if dataclasses.is_dataclass(hint):
        return "{" + " ".join(f"{name}=…" for name in _fields(typing.cast(type, hint))) + "}"
    return names.get(hint, str(hint))


@cache
def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
