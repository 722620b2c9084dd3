"""Find the numbers that a module's attributes must hold for its own code to compute what a cut graph computes.

What may live here: the first guess, and the search that corrects it. Nothing is known of any architecture. The user's
module is run once beside the graph captured of it, so that each call of its code is known to be certain nodes. A copy
with cut tensors and guessed attributes then runs beside the cut graph. At the first call that gives something else,
the attributes read last before it are the suspects; each is tried with the sizes that its old value became nearby,
until the run gets further. What cannot be found this way is written into the code.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, product
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.axes.groups import Group
from graphopt.axes.infer import atoms_of
from graphopt.graph import Graph
from graphopt.shrink import sites
from graphopt.shrink.layers import KNOWN
from graphopt.shrink.sites import Site
from graphopt.shrink.sizes import Sizes
from graphopt.shrink.trace import DivergenceError, Event, Fingerprint, Following, Key, Recording, node_fingerprints

__all__ = ["Search", "running"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Choice = dict[Site, int]
"""The numbers that differ from the user's."""

MOST_SUSPECTS: Final = 10
"""How many of the numbers read last are tried alone."""

MOST_PAIRED: Final = 5
"""How many of them are tried two at a time."""

MOST_VALUES: Final = 4
"""How many sizes are tried for one number."""

MOST_RUNS: Final = 40
"""How many runs one call may take to be set right."""


@contextlib.contextmanager
def running(module: nn.Module) -> Iterator[nn.Module]:
    """Lend a copy in evaluation mode that shares the module's tensors and has made none of its caches yet."""
    held = (leaf for part in module.modules() for value in vars(part).values() for leaf in pytree.tree_leaves(value))
    duplicate = copy.deepcopy(module, {id(leaf): leaf for leaf in held if isinstance(leaf, torch.Tensor)})
    duplicate.train()
    duplicate.eval()
    with torch.no_grad():
        yield duplicate


def owned(inputs: Inputs) -> Inputs:
    """Copy inputs, for a model may write into them."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)  # type: ignore[no-any-return]


@dataclass
class Search:
    """Search for one module.

    Args:
        small: a copy of the user's module with cut tensors and settled layers; it is not changed.
        settled: names of attributes of ``small``'s layers, by qualified name, that are right already.
        typed: the sizes before and after.
        context: around each run, given the copy that runs.
    """

    small: nn.Module
    settled: Mapping[str, frozenset[str]]
    sizes: Sizes
    cut: Graph
    inputs: Inputs
    context: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
    choice: Choice = field(default_factory=dict)
    runs: int = 0
    _events: Mapping[Key, Event] = field(default_factory=dict)
    _reads: dict[Site, list[int]] = field(default_factory=dict)
    _expected: Mapping[str, Sequence[Fingerprint]] = field(default_factory=dict)
    _finished: set[tuple[str, int]] = field(default_factory=set)
    _useful: dict[tuple[type, tuple[Any, ...]], int] = field(default_factory=dict)

    def learn(self, module: nn.Module) -> None:
        """Run the user's module beside its graph, and the cut graph."""
        args, kwargs = self.inputs
        graph = node_fingerprints(self.sizes.typing.graph, args, kwargs)
        self._expected = node_fingerprints(self.cut, args, kwargs)
        changed = self.sizes.changed()
        with running(module) as duplicate, self.context(duplicate):
            recording = Recording({part: path for path, part in duplicate.named_modules()}, graph)
            found = {
                site: _reader(part, site)
                for part, path in recording.paths.items()
                for site in self._numbers(path, part, changed)
            }
            objects = {id(each): each for each, _ in found.values()}
            names: dict[int, set[str]] = {}
            for each, name in found.values():
                names.setdefault(id(each), set()).add(name)
            with (
                recording.reading(objects, {key: frozenset(each) for key, each in names.items()}),
                recording.over(duplicate),
            ):
                copied = owned(self.inputs)
                duplicate(*copied[0], **copied[1])
        self._events = recording.events
        self._reads = {site: recording.reads.get((id(each), name), []) for site, (each, name) in found.items()}
        self.choice = {site: new for site in self._reads if (new := self._guess(site)) is not None}

    def _numbers(self, path: str, part: nn.Module, changed: frozenset[int]) -> Iterator[Site]:
        settled = self.settled.get(path, frozenset())
        if settled and isinstance(part, tuple(KNOWN)):
            # Strides, paddings and the like of torch's layers are no sizes of tensors.
            settled |= {name for kind in type(part).__mro__ for name in getattr(kind, "__constants__", ())}
            settled |= {"_reversed_padding_repeated_twice"}
        return (site for site in sites.find(path, part, changed) if site.way[0] not in settled)

    def _guess(self, site: Site) -> int | None:
        """Return what a number most likely becomes; None where that is not clear."""
        if isinstance(site.old, bool):
            return None
        near = self.sizes.tensors(site.path)
        read = bool(self._reads[site])
        if read:
            near |= self.sizes.calls(site.path)
        found = {new for old, new in near if old == site.old}
        changed = found - {site.old}
        if read:
            return changed.pop() if len(changed) == 1 else None
        plain = not any(isinstance(step, str) and step.startswith(".") for step in site.way)
        return changed.pop() if plain and len(changed) == 1 and len(found) == 1 else None

    # -- searching --

    def solve(self) -> DivergenceError | None:
        """Correct the choice until the copy computes what the graph does; return where that failed."""
        found = self.attempt(self.choice)
        while found is not None:
            better = self._better(found)
            if better is None:
                return found
            self.choice, found = better
        return None

    def attempt(self, choice: Choice) -> DivergenceError | None:
        """Run a copy with these numbers; return where it left the graph, or None."""
        self.runs += 1
        with running(self.small) as duplicate:
            parts = dict(duplicate.named_modules())
            for site, number in choice.items():
                sites.put(parts[site.path], site, number)
            following = Following({part: path for path, part in parts.items()}, self._events, self._expected)
            self._finished = following.finished
            args, kwargs = owned(self.inputs)
            with self.context(duplicate):
                try:
                    with following.over(duplicate):
                        duplicate(*args, **kwargs)
                except Exception as error:  # noqa: BLE001  # whatever the model's own code raises on a wrong size
                    return following.failed(error)
        return None

    def _better(self, found: DivergenceError) -> tuple[Choice, DivergenceError | None] | None:
        for change in islice(self._changes(found), MOST_RUNS):
            choice = {
                site: n for site, n in (self.choice | change).items() if n != site.old or type(n) is not type(site.old)
            }
            after = self.attempt(choice)
            if after is None or (after.position > found.position and self._in_order(change, found, after)):
                for site in change:
                    role = (site.kind, site.way)
                    self._useful[role] = self._useful.get(role, 0) + 1
                return self._everywhere(choice, change, after)
        return None

    def _in_order(self, change: Choice, found: DivergenceError, after: DivergenceError) -> bool:
        """Say whether a switch made a module compute what it should, or get further; not just skip what went wrong."""
        module = found.key[:2]
        switched = any(isinstance(site.old, bool) for site in change)
        return not switched or module in self._finished or after.key[:2] == module

    def _everywhere(
        self, choice: Choice, change: Choice, after: DivergenceError | None
    ) -> tuple[Choice, DivergenceError | None]:
        """Give back to all modules of the class what one had to be given back, if that does no harm."""
        if after is None:
            return choice, after
        roles = {(s.kind, s.way, s.old) for s, n in change.items() if n == s.old and not isinstance(s.old, bool)}
        wider = {s: n for s, n in choice.items() if (s.kind, s.way, s.old) not in roles}
        if len(wider) == len(choice):
            return choice, after
        then = self.attempt(wider)
        return (wider, then) if then is None or then.position >= after.position else (choice, after)

    def _changes(self, found: DivergenceError) -> Iterator[Choice]:
        """Yield what could set a call right: single numbers first, then two at a time, then switches."""
        suspects = self._suspects(found)
        numbers = [s for s in suspects if not isinstance(s.old, bool)]
        switches = [s for s in suspects if isinstance(s.old, bool)]
        values = {site: self._values(site, found) for site in numbers[:MOST_SUSPECTS]}
        useful = [s for s in switches if (s.kind, s.way) in self._useful and s not in self.choice]
        yield from ({site: _flipped(self._current(site))} for site in useful)
        for site, candidates in values.items():
            yield from ({site: value} for value in candidates)
        others = (s for s in switches[:MOST_SUSPECTS] if s not in useful and s not in self.choice)
        yield from ({site: _flipped(self._current(site))} for site in others)
        for one, two in combinations(list(values)[:MOST_PAIRED], 2):
            yield from ({one: a, two: b} for a, b in product(values[one], values[two]))

    def _suspects(self, found: DivergenceError) -> list[Site]:
        """Return the numbers read before a call: those of a kind that helped before first, then the last read."""
        limit = found.until + 0.5
        last = {site: max((t for t in times if t <= limit), default=-1) for site, times in self._reads.items()}
        read = [site for site, time in last.items() if time >= 0]
        on_stack = set(found.stack)
        return sorted(read, key=lambda s: (s.path not in on_stack, (s.kind, s.way) not in self._useful, -last[s]))

    def _values(self, site: Site, found: DivergenceError) -> list[int]:
        nodes = {name for name, _ in found.nodes}
        at = [node for node in self.sizes.typing.graph.nodes if node.name in nodes]
        operands = [operand for node in at for operand in node.all_input_nodes]
        here = [self.sizes.of(self.sizes.typing.values[node]) for node in [*at, *operands]]
        near = [self.sizes.tensors(site.path), self.sizes.calls(site.path), self.sizes.within(site.path)]
        values = {new: None for pairs in [*here, *near] for old, new in sorted(pairs) if old == site.old}
        values.setdefault(site.old)
        values.pop(self._current(site), None)
        return list(values)[:MOST_VALUES]

    def _current(self, site: Site) -> int:
        return self.choice.get(site, site.old)

    # -- for refusals --

    def wanted(self, found: DivergenceError) -> list[tuple[int, ...]]:
        """Return the shapes that the cut graph has at a call."""
        return sorted({self._expected[name][index].shape for name, index in found.nodes})

    def blamed(self, found: DivergenceError) -> list[Group]:
        """Return the groups to leave whole for a call to be right: those it computes with, or those of its module."""
        typing, cut = self.sizes.typing, self.sizes.new
        names = {name for name, _ in found.nodes}
        at = [node for node in typing.graph.nodes if node.name in names]
        at += [operand for node in at for operand in node.all_input_nodes]
        atoms = {atom for node in at for atom in atoms_of(typing.values[node]) if atom in cut}
        if not atoms:
            near = [axes for name, axes in typing.tensors.items() if _near(name, found.key[0])]
            atoms = {atom for axes in near for atom in atoms_of(axes) if atom in cut}
        return [group for group in typing.groups if group.atom in atoms]


def _flipped(switch: int) -> int:
    return not switch


def _near(tensor: str, path: str) -> bool:
    """Say whether a tensor is a module's own, or one of its parts'."""
    owner = tensor.rpartition(".")[0]
    return path in (owner, owner.rpartition(".")[0])


def _reader(part: nn.Module, site: Site) -> tuple[Any, str]:
    """Return the object, and the name of its attribute, that code reads to get at a site's number."""
    holder, name, value = part, str(site.way[0]), vars(part)[site.way[0]]
    for step in site.way[1:]:
        if isinstance(step, str) and step.startswith("."):
            holder, name = value, step[1:]
            value = vars(value)[name]
        else:
            value = value[step]
    return holder, name
