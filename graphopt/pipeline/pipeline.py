"""Hold an ordered list of passes, as Python, as text and as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from graphopt.errors import PipelineError
from graphopt.pipeline import options
from graphopt.pipeline.base import Pass, Preserves
from graphopt.pipeline.registry import find_pass
from graphopt.pipeline.text import Word, parse_calls

__all__ = ["Pipeline"]


@dataclass(frozen=True, init=False)
class Pipeline(Sequence[Pass]):
    """An ordered list of passes.

    Printing a pipeline gives text that :meth:`parse` turns back into an equal one; the same holds for
    :meth:`to_toml` and :meth:`from_toml`.

    Args:
        passes: the passes, in the order in which they run.

    Example:
        >>> str(Pipeline.parse("prune-channels{budget.flops=0.5}"))
        'prune-channels{budget.flops=0.5}'
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        given: tuple[object, ...] = tuple(passes)
        found: list[Pass] = []
        for position, each in enumerate(given):
            if not isinstance(each, Pass):
                kind = each.__name__ if isinstance(each, type) else type(each).__name__
                raise PipelineError(f"entry {position} of a pipeline must be an instance of a pass; found {kind}")
            found.append(each)
        object.__setattr__(self, "passes", tuple(found))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the textual form, ``"prune-channels{importance=l2 budget.flops=0.5},…"``.

        Raises:
            PipelineError: the text does not parse, or names a pass, an option or a value that does not exist.
        """
        return cls(_made(call.name, call.options, i) for i, call in enumerate(parse_calls(text)))

    @classmethod
    def from_toml(cls, text: str) -> Pipeline:
        """Read the TOML form: one table ``[[pass]]`` a pass, with its ``name`` and its options.

        Raises:
            PipelineError: the text is no TOML, has another structure, or names something that does not exist.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PipelineError(f"the pipeline is not valid TOML: {error}") from error
        passes = document.pop("pass", [])
        if document or not isinstance(passes, list):
            found = ", ".join(document) or "a single table 'pass'"
            raise PipelineError(f"a pipeline in TOML holds tables [[pass]] and nothing else; found {found}")
        made = []
        for position, table in enumerate(passes):
            if not isinstance(table, dict) or not isinstance(table.get("name"), str):
                raise PipelineError(f'table {position} of [[pass]] needs a name = "…"')
            rest = {key: _worded(value) for key, value in table.items() if key != "name"}
            made.append(_made(table["name"], rest, position))
        return cls(made)

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """Read a .toml file.

        Raises:
            PipelineError: the file cannot be read, or does not hold a pipeline; the message names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(f"cannot read the pipeline {path}: {error}") from error
        try:
            return cls.from_toml(text)
        except PipelineError as error:
            raise PipelineError(f"{path}: {error}") from error

    @classmethod
    def of(cls, value: Pipeline | Pass | Iterable[Pass] | str | Path) -> Pipeline:
        """Return the pipeline that ``value`` stands for: passes, a text, or the path of a .toml file."""
        if isinstance(value, Pipeline):
            return value
        if isinstance(value, Pass):
            return cls([value])
        if isinstance(value, Path) or (isinstance(value, str) and value.strip().endswith(".toml")):
            return cls.load(value if isinstance(value, Path) else value.strip())
        return cls.parse(value) if isinstance(value, str) else cls(value)

    def stepped(self, steps: int, between: Pipeline | None = None) -> Pipeline:
        """Return the pipeline with every pruning done in steps.

        A pass with the option ``progress``, together with the approximate passes that follow it, is repeated: at 1/k,
        2/k, … of the way it goes here, each time followed by the passes of ``between``.

        Args:
            steps: how many, k.
            between: what runs after each step, also after the last one.
        """
        made: list[Pass] = []
        rest = list(self.passes)
        while rest:
            each = rest.pop(0)
            progress = getattr(each, "progress", None)
            if progress is None:
                made.append(each)
                continue
            after = list(takewhile(lambda p: p.preserves is Preserves.APPROXIMATE, rest))
            del rest[: len(after)]
            for step in range(1, steps + 1):
                part = replace(each, progress=progress * step / steps)  # type: ignore[call-arg]  # it has the option
                made += [part, *after, *(between or ())]
        return Pipeline(made)

    def to_toml(self) -> str:
        """Return the TOML form."""
        tables = []
        for each in self.passes:
            call = each.call()
            tables.append("\n".join(["[[pass]]", f'name = "{call.name}"', *options.toml_lines(call.options), ""]))
        return "\n".join(tables)

    def __str__(self) -> str:
        """Return the textual form."""
        return ",".join(map(str, self.passes))

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __getitem__(self, index: Any) -> Any:
        """Return one pass, or for a slice a pipeline."""
        found = self.passes[index]
        return Pipeline(found) if isinstance(index, slice) else found

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline((*self.passes, *other.passes))


def _made(name: str, table: Any, position: int) -> Pass:
    where = f"pass {position + 1}, {name}" if position else name
    made = options.decode(find_pass(name), table, where)
    assert isinstance(made, Pass)
    return made


def _worded(value: Any) -> Any:
    """TOML has no word for none, so the string "none" is read as one."""
    if isinstance(value, dict):
        return {key: _worded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_worded(each) for each in value]
    return Word(value) if value == "none" else value
