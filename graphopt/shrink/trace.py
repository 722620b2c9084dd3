"""Watch a module run: what its code reads, what each of its calls gives, and whether that is what a graph computes.

What may live here: the fingerprints of tensors, the run of a graph that leaves a fingerprint for each node, and the two
ways of watching a module: :class:`Recording`, which learns from the user's module which graph node each call stands
for, and :class:`Following`, which holds a changed copy against the changed graph and stops at the first difference.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphopt.graph import Graph

__all__ = ["DivergenceError", "Event", "Fingerprint", "Following", "Line", "Recording", "node_fingerprints"]

Key = tuple[str, int, int]
"""A call in a module's own code: the module's qualified name, its how-manieth run, the how-manieth call in it."""

RESULT = -1
"""Stands in a :data:`Key` for what the module returns."""

CLOSE = 1e-4
"""How far, relative to their norm, values may be apart that are the same up to round-off."""

STEP = 1e-6
"""How far a call counts that the user's module did not make."""

MOST_WORDS = 200
"""How much is quoted of an error."""

_PERIOD = 65521
_HUGE = 1e30


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Tell tensors apart by shape, norm, and the product with one fixed random vector."""

    shape: tuple[int, ...]
    norm: float
    product: float

    def matches(self, other: Fingerprint) -> bool:
        """Say whether both are of one tensor, up to round-off."""
        allowed = CLOSE * max(self.norm, other.norm) + 1e-30
        return (
            self.shape == other.shape
            and abs(self.norm - other.norm) <= allowed
            and abs(self.product - other.product) <= allowed
        )


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Return the fingerprint of a tensor of any type; what is not finite counts as huge."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    flat = torch.nan_to_num(values.reshape(-1).double(), nan=-_HUGE, posinf=_HUGE, neginf=-_HUGE).clamp_(-_HUGE, _HUGE)
    rows, rest = divmod(flat.numel(), _PERIOD)
    weights = _weights(flat.device)
    found = float(flat[rows * _PERIOD :] @ weights[:rest])
    if rows:
        sums = flat[: rows * _PERIOD].reshape(rows, _PERIOD) @ weights
        found += float(sums @ weights[1 : rows + 1])
    return Fingerprint(tuple(tensor.shape), float(flat.norm()), found)


_WEIGHTS: dict[torch.device, torch.Tensor] = {}


def _weights(device: torch.device) -> torch.Tensor:
    if device not in _WEIGHTS:
        generator = torch.Generator().manual_seed(0)
        _WEIGHTS[device] = torch.randn(_PERIOD, generator=generator, dtype=torch.float64).to(device)
    return _WEIGHTS[device]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a result; those of objects that are no containers are not looked for."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _fingerprints(value: Any) -> list[Fingerprint]:
    return [fingerprint(t) for t in _tensors(value) if t.layout is torch.strided]


# -- the graph ------------------------------------------------------------------------------------------------------


def node_fingerprints(graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Fingerprint]]:
    """Run a graph and return the fingerprints of each node's result, by the node's name."""
    found: dict[str, list[Fingerprint]] = {}

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                found[n.name] = _fingerprints(result)
            return result

    leaves = [_own(leaf) for leaf in pytree.tree_leaves((args, dict(kwargs)))]
    with torch.no_grad():
        Watched(graph.module).run(*leaves, enable_io_processing=False)
    return found


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


# -- the module -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """What one call gave in the user's module.

    ``position`` counts all calls of the run; ``nodes`` has, for each tensor of the result, the nodes that compute it
    (none where the graph does not hold it: it is not needed for the outputs, or only while tracing).
    """

    function: str
    position: int
    nodes: tuple[tuple[tuple[str, int], ...], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of code."""

    file: str
    number: int

    @property
    def text(self) -> str:
        """The line itself."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        return f"{self.file}:{self.number} (`{self.text}`)"


@dataclass(eq=False)
class DivergenceError(Exception):
    """Say where a changed copy left the graph.

    Attributes:
        key: The call.
        position: How far the run had come; the further, the more of it is right.
        until: Up to where in the user's run a number that was read may be to blame.
        function: What was called; empty where the code broke off between two calls.
        shape: The shape that the call gave; empty where it gave none.
        sizes: The integers that a call which broke off was given.
        error: What it, or the code, said.
        nodes: The nodes that hold what was wanted.
        line: The line of code.
        stack: The modules that were running, innermost first.
    """

    key: Key
    position: float
    until: float
    function: str = ""
    shape: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    error: str = ""
    nodes: tuple[tuple[str, int], ...] = ()
    line: Line | None = None
    stack: tuple[str, ...] = ()


class _Watch(TorchFunctionMode):
    """Follow modules in and out, and give every call of a torch function, made by a module's own code, a key."""

    def __init__(self, paths: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.paths = paths
        self.stack: list[list[Any]] = [["", 0, 0]]
        self.runs: dict[str, int] = {}
        self.hooks: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self.call(func, args, dict(kwargs or {}))
        if not isinstance(result, torch.Tensor) and not isinstance(result, list | tuple):
            return result
        tensors = _tensors(result)
        if tensors:
            path, run, count = self.stack[-1]
            self.stack[-1][2] += 1
            self.happened((path, run, count), _name(func), tensors)
        return result

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call."""
        return func(*args, **kwargs)

    def happened(self, key: Key, function: str, tensors: list[torch.Tensor]) -> None:
        """Learn what a call gave."""
        raise NotImplementedError

    @contextlib.contextmanager
    def over(self, module: nn.Module) -> Iterator[None]:
        """Watch everything within the block; ``module`` is the root."""
        for part in self.paths:
            self.hooks.append(part.register_forward_pre_hook(self._entered, prepend=True))
            self.hooks.append(part.register_forward_hook(self._left))
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for hook in self.hooks:
                hook.remove()

    def _entered(self, module: nn.Module, args: Any) -> None:
        path = self.paths[module]
        run = self.runs[path] = self.runs.get(path, -1) + 1
        self.stack.append([path, run, 0])

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        path, run, _ = self.stack[-1]
        with torch._C.DisableTorchFunction():
            self.happened((path, run, RESULT), "return", _tensors(output))
        self.stack.pop()


class Recording(_Watch):
    """Learn from the user's module, and the graph captured of it, which nodes each call stands for, and what is read.

    Attributes:
        events: Every call, by key.
        reads: For each attribute of each object that was read, ``(id of the object, name)``, when.
    """

    def __init__(self, paths: Mapping[nn.Module, str], graph: Mapping[str, Sequence[Fingerprint]]) -> None:
        super().__init__(paths)
        self.events: dict[Key, Event] = {}
        self.reads: dict[tuple[int, str], list[int]] = {}
        self._by_shape: dict[tuple[int, ...], list[tuple[str, int, Fingerprint]]] = {}
        for name, prints in graph.items():
            for index, each in enumerate(prints):
                self._by_shape.setdefault(each.shape, []).append((name, index, each))

    def happened(self, key: Key, function: str, tensors: list[torch.Tensor]) -> None:
        """Look up which nodes computed what a call gave."""
        with torch._C.DisableTorchFunction():
            nodes = tuple(self._nodes(fingerprint(t)) for t in tensors)
        self.events[key] = Event(function, len(self.events), nodes)

    def _nodes(self, found: Fingerprint) -> tuple[tuple[str, int], ...]:
        return tuple((n, i) for n, i, each in self._by_shape.get(found.shape, ()) if each.matches(found))

    @contextlib.contextmanager
    def reading(self, objects: Mapping[int, Any], names: Mapping[int, frozenset[str]]) -> Iterator[None]:
        """Note each time when one of these attributes of these objects is read."""
        original: list[tuple[Any, type]] = []
        for key, each in objects.items():
            kind = type(each)
            try:
                each.__class__ = _noticing(kind, self._noticed(key, names[key]))
            except TypeError:  # its class lays out memory in a way of its own
                self.reads |= {(key, name): [0] for name in names[key]}
                continue
            original.append((each, kind))
        try:
            yield
        finally:
            for each, kind in original:
                each.__class__ = kind

    def _noticed(self, key: int, names: frozenset[str]) -> Callable[[str], None]:
        def noticed(name: str) -> None:
            if name in names:
                self.reads.setdefault((key, name), []).append(len(self.events))

        return noticed


def _noticing(kind: Any, notice: Callable[[str], None]) -> type:
    """Return a class like ``kind`` whose instances say which of their attributes are read."""

    def read(self: Any, name: str) -> Any:
        notice(name)
        return kind.__getattribute__(self, name)

    body = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type = type(kind)(kind.__name__, (kind,), body)
    return made


class Following(_Watch):
    """Run a changed copy, and stop at the first call that gives something else than the changed graph.

    A module whose code makes other calls than the user's did is followed by what it returns alone.

    Attributes:
        finished: The runs of modules that returned what they should.
    """

    def __init__(
        self,
        paths: Mapping[nn.Module, str],
        events: Mapping[Key, Event],
        graph: Mapping[str, Sequence[Fingerprint]],
    ) -> None:
        super().__init__(paths)
        self.events = events
        self.graph = graph
        self.position = -1.0
        self.astray: dict[tuple[str, int], float] = {}
        self.finished: set[tuple[str, int]] = set()
        self._attempted: DivergenceError | None = None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and remember it if it breaks off."""
        try:
            return func(*args, **kwargs)
        except Exception:
            path, run, count = self.stack[-1]
            key = (path, run, count)
            event = self.events.get(key) if (path, run) not in self.astray else None
            nodes = event.nodes[0] if event is not None and event.function == _name(func) and event.nodes else ()
            at = self._reached(key)
            self._attempted = DivergenceError(key, at, at, _name(func), sizes=_sizes(args, kwargs), nodes=nodes)
            raise

    def happened(self, key: Key, function: str, tensors: list[torch.Tensor]) -> None:
        """Compare what a call gave with the graph.

        Raises:
            DivergenceError: it is something else.
        """
        path, run, count = key
        event = self.events.get(key)
        if (path, run) in self.astray and count != RESULT:
            return
        if event is None or event.function != function:
            self.astray[path, run] = self.position if event is None else event.position
            return
        for tensor, nodes in zip(tensors, event.nodes, strict=False):
            if nodes:
                with torch._C.DisableTorchFunction():
                    found = fingerprint(tensor)
                if not any(found.matches(self.graph[name][index]) for name, index in nodes):
                    raise self._diverged(key, event, found, nodes)
        self.position = max(self.position, event.position)
        if count == RESULT:
            self.finished.add((path, run))

    def _diverged(
        self, key: Key, event: Event, found: Fingerprint, nodes: tuple[tuple[str, int], ...]
    ) -> DivergenceError:
        at = float(event.position)
        line = _line_of(sys._getframe())
        return DivergenceError(key, at, at, event.function, found.shape, nodes=nodes, line=line, stack=self._paths())

    def failed(self, error: Exception) -> DivergenceError:
        """Return where the copy's own code broke off."""
        if isinstance(error, DivergenceError):
            return error
        path, run, count = self.stack[-1]
        found = self._attempted
        if found is None:
            at = self._reached((path, run, count))
            found = DivergenceError((path, run, count), at, at)
        last = self.events.get((path, run, RESULT))
        if last is not None and (path, run) in self.astray:
            found.until = last.position
        found.error = " ".join(str(error).split())[:MOST_WORDS]
        found.line = _last_line(error.__traceback__)
        found.stack = self._paths()
        return found

    def _reached(self, key: Key) -> float:
        """Return how far the run has come; every call that a module makes in a way of its own is a little step."""
        path, run, count = key
        astray = self.astray.get((path, run))
        return self.position + 0.5 if astray is None else max(self.position, astray) + STEP * count

    def _paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path, _, _ in reversed(self.stack)))


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _sizes(args: Any, kwargs: Any) -> tuple[int, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if type(leaf) is int)


# -- lines ----------------------------------------------------------------------------------------------------------


def _own_code(file: str) -> bool:
    return file.startswith("<") or "/graphopt/shrink/" in file or "/torch/" in file


def _line_of(frame: FrameType | None) -> Line | None:
    """Return the innermost line of the user's code, or of a library other than torch."""
    while frame is not None:
        if not _own_code(frame.f_code.co_filename):
            return Line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def _last_line(trace: TracebackType | None) -> Line | None:
    found: Line | None = None
    while trace is not None:
        if not _own_code(trace.tb_frame.f_code.co_filename):
            found = Line(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found
