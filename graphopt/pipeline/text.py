"""Read and print the textual form of pipelines: structure only, no knowledge of passes or types.

The grammar, blanks between words being free::

    pipeline := [call ("," call)*]
    call     := word ["{" option* "}"]
    option   := key "=" value                    key may be dotted, budget.flops, or a string, taken as it is
    value    := string | call | list | table
    list     := "[" [value ("," value)*] "]"
    table    := "{" option* "}"
    string   := JSON string, in double quotes
    word     := any characters but blanks and , { } [ ] " =

A word stands for a number, a truth value, ``none``, a name or a short string: which one is decided by the type of the
option. A quoted string is always a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from graphopt.errors import PipelineError

__all__ = ["Call", "Literal", "Table", "Word", "is_word", "parse_calls", "print_literal"]

_BLANK: Final = re.compile(r"\s*")
_WORD: Final = re.compile(r'[^\s,{}\[\]"=]+')
_KEY: Final = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


class Word(str):
    """An unquoted word: a number, a truth value, ``none``, a name or a short string."""

    __slots__ = ()


class Table(dict[str, "Literal"]):
    """A table whose keys are data, not options: written in braces, with quoted keys."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A name with options in braces: a pass, or an option that is chosen by name and has options of its own."""

    name: str
    options: Mapping[str, Literal]


Literal = Word | str | Call | list["Literal"] | dict[str, "Literal"]
"""What a value is before its type is known; dotted keys stand as nested dictionaries."""


def parse_calls(text: str) -> list[Call]:
    """Parse a pipeline's text.

    Raises:
        PipelineError: the text does not follow the grammar; the message shows where.
    """
    return _Parser(text).calls()


def print_literal(value: Literal) -> str:
    """Return one value as text."""
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Call):
        return value.name + (f"{{{_options(value.options)}}}" if value.options else "")
    if isinstance(value, list):
        return f"[{', '.join(map(print_literal, value))}]"
    if isinstance(value, Table):
        return "{" + " ".join(f"{print_literal(str(k))}={print_literal(v)}" for k, v in value.items()) + "}"
    return f"{{{_options(value)}}}"


def is_word(text: str) -> bool:
    """Say whether ``text`` can stand unquoted."""
    return _WORD.fullmatch(text) is not None


def _options(options: Mapping[str, Literal]) -> str:
    return " ".join(f"{key}={print_literal(value)}" for key, value in _dotted(options))


def _dotted(options: Mapping[str, Literal], prefix: str = "") -> list[tuple[str, Literal]]:
    found: list[tuple[str, Literal]] = []
    for key, value in options.items():
        if isinstance(value, dict) and value and not isinstance(value, Table):
            found += _dotted(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self._skip_blanks()

    def calls(self) -> list[Call]:
        found: list[Call] = []
        while self.position < len(self.text):
            if found:
                self._expect(",", "',' between two passes")
            found.append(self._call("the name of a pass"))
        return found

    def _call(self, wanted: str) -> Call:
        name = self._match(_WORD, wanted)
        return Call(name, self._table() if self._at("{") else {})

    def _table(self) -> dict[str, Literal]:
        self._expect("{", "'{'")
        options: dict[str, Literal] = {}
        while not self._at("}"):
            start = self.position
            quoted = self._at('"')
            key = self._string() if quoted else self._match(_KEY, "an option, as in name=value, or '}'")
            self._expect("=", f"'=' after '{key}'")
            path = [key] if quoted else key.replace("-", "_").split(".")
            self._store(options, key, path, self._value(key), start)
        self._expect("}", "'}'")
        return options

    def _store(self, options: dict[str, Literal], key: str, path: list[str], value: Literal, start: int) -> None:
        *path, last = path
        table = options
        for part in path:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                self._fail(f"'{part}' is given a value and options of its own", start)
            table = inner
        if last in table:
            self._fail(f"the option '{key}' is given twice", start)
        table[last] = value

    def _value(self, key: str) -> Literal:
        if self._at('"'):
            return self._string()
        if self._at("["):
            return self._list(key)
        if self._at("{"):
            return self._table()
        call = self._call(f"a value for '{key}'")
        return call if call.options else Word(call.name)

    def _list(self, key: str) -> list[Literal]:
        self._expect("[", "'['")
        found: list[Literal] = []
        while not self._at("]"):
            if found:
                self._expect(",", f"',' or ']' in the list of '{key}'")
            found.append(self._value(key))
        self._expect("]", "']'")
        return found

    # -- characters --

    def _string(self) -> str:
        try:
            value, self.position = json.JSONDecoder().raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            self._fail(f"the string does not end, or holds a bad escape ({error.msg})", self.position)
        self._skip_blanks()
        return str(value)

    def _at(self, character: str) -> bool:
        return self.text.startswith(character, self.position)

    def _match(self, pattern: re.Pattern[str], wanted: str) -> str:
        match = pattern.match(self.text, self.position)
        if match is None:
            self._fail(f"expected {wanted}", self.position)
        self.position = match.end()
        self._skip_blanks()
        return match.group()

    def _expect(self, character: str, wanted: str) -> None:
        if not self._at(character):
            self._fail(f"expected {wanted}", self.position)
        self.position += 1
        self._skip_blanks()

    def _skip_blanks(self) -> None:
        match = _BLANK.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def _fail(self, message: str, position: int) -> NoReturn:
        found = f"found '{self.text[position]}'" if position < len(self.text) else "the text ends there"
        line = re.sub(r"\s", " ", self.text)
        raise PipelineError(
            f"pipeline text, character {position + 1}: {message}; {found}\n  {line}\n  {' ' * position}^"
        )
