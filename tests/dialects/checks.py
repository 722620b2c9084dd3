"""Check one module as an adversary: every group alone and all together, against two references.

The first reference is that of ``graphopt.verify``: the typed graph with its parameters masked. It shares the typing
with the rewrite, so a missing tie could hide in both. The second, for groups that are not normalised over, is the
module itself: a copy whose parameters are set to zero at the group's places, run by torch, with other inputs too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.axes.algebra import Atom, Axis, Concat, Indices, Product, index_at, leaves, resolve
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs

__all__ = ["EXACT", "Checked", "check", "draw", "groups_of", "prepared", "reasons", "text", "typed", "zeroed"]

EXACT = 1e-10
"""Largest relative difference in float64 that counts as none."""

NOISE = 1e-13
"""Largest absolute difference that counts as none: what remains where a norm subtracts all there is."""


@dataclass(frozen=True)
class Checked:
    """What was checked: the typing, and how many prunings were compared with each reference."""

    typing: Typing
    masked: int
    independent: int


def prepared(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``module`` in float64 and evaluation mode, with parameters and statistics that are nowhere special.

    Parameters are drawn around zero, their spread falling with the fan-in, so that values neither vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5 + 0.01)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return module


def typed(module: nn.Module, *inputs: Any, **options: Any) -> Typing:
    """Capture ``module``, made ready, and infer its axes."""
    return infer(capture(prepared(module), inputs, **options))


def groups_of(typing: Typing) -> dict[str, Group]:
    """Return the groups by name."""
    return {g.name: g for g in typing.groups}


def reasons(typing: Typing, tensor: str, dim: int) -> set[str]:
    """Return why factors of a dimension cannot go."""
    return {leaf.frozen.text for leaf in leaves(typing.tensors[tensor][dim]) if leaf.frozen is not None}


def text(typing: Typing) -> str:
    """Write the groups with their places, and the frozen dimensions with their reasons, but for inputs and outputs.

    A group is a letter; a place that is more than the group is written out, frozen factors as their size.
    """
    letters = {g.atom: chr(ord("a") + i) for i, g in enumerate(typing.groups)}

    def spell(axis: Axis) -> str:
        axis = resolve(axis)
        if isinstance(axis, Product):
            return "*".join(map(spell, axis.factors)) or "1"
        if isinstance(axis, Concat):
            return "(" + "|".join(map(spell, axis.parts)) + ")"
        return letters.get(axis, str(axis.size)) if isinstance(axis, Atom) else "?"

    lines = []
    for group in typing.groups:
        places = [f"{p}={spell(p.axis)}" if resolve(p.axis) is not group.atom else str(p) for p in group.places]
        norm = f", normalised over by {', '.join(group.normalised)}" if group.normalised else ""
        lines.append(f"{letters[group.atom]}: {group.size} {group.role}{norm}: {' '.join(places)}")
    for place, reason in typing.frozen():
        if reason.text not in ("a dimension of the model's input", "a dimension of the model's output"):
            lines.append(f"{place} is fixed: {reason.text}")
    return "\n".join(lines)


def draw(groups: Iterable[Group], rng: np.random.Generator, *, single: bool = False) -> dict[Atom, Indices]:
    """Draw what each group keeps, uneven in number and place; ``single`` keeps one index of each."""
    keep = {}
    for group in groups:
        if group.least == group.size:
            continue
        count = group.least if single else int(rng.integers(group.least, group.size))
        keep[group.atom] = np.sort(rng.permutation(group.size)[:count])
    return keep


def zeroed(module: nn.Module, typing: Typing, keep: Mapping[Atom, Indices]) -> nn.Module:
    """Return a copy of ``module`` whose parameters are zero at the removed indices of ``keep``.

    It reads the groups' places alone, by :func:`index_at`, and so shares no code with slicing or masking.
    """
    duplicate = copy.deepcopy(module)
    parameters = dict(duplicate.named_parameters(remove_duplicate=False))
    for group in typing.groups:
        if group.atom not in keep:
            continue
        for place in group.places:
            if place.tensor in parameters:
                index = index_at(place.axis, group.atom)
                removed = (index >= 0) & ~np.isin(index, keep[group.atom])
                with torch.no_grad():
                    parameters[place.tensor].index_fill_(place.dim, torch.from_numpy(np.flatnonzero(removed)), 0)
    return duplicate


def check(
    module: nn.Module, inputs: Sequence[Any], others: Sequence[Sequence[Any]] = (), *, seed: int = 0, **options: Any
) -> Checked:
    """Prune every group of ``module`` alone and all together, and compare with both references.

    Args:
        module: any module; its parameters are drawn anew.
        inputs: what it is captured with.
        others: further inputs, say of another batch size, with which module and rewritten graph must agree too.
        seed: of the parameters and of what is kept.
        options: of ``capture``.
    """
    module = prepared(module, seed)
    graph = capture(module, tuple(inputs), **options)
    text, state = graph.text(), {name: t.clone() for name, t in graph.tensors().items()}
    typing = infer(graph)
    rng = np.random.default_rng(seed)
    calls = [tuple(inputs), *map(tuple, others)]
    exact = [g for g in typing.groups if not g.normalised]
    alone = [draw([g], rng, single=rng.random() < 0.2) for g in typing.groups]
    together = [draw(some, rng, single=single) for some in (exact, typing.groups) if some for single in (False, True)]
    independent = 0
    for number, keep in enumerate(alone + together):
        joint = number >= len(alone)
        pruned = rewrite(typing, keep)
        names = ", ".join(f"{g.name}: {keep[g.atom].tolist()}" for g in typing.groups if g.atom in keep)
        # What is pruned alone is compared on the last inputs only: that is where most time goes.
        for call in calls if joint else calls[-1:]:
            found = [evaluate(pruned, call, {}, double=True)]
            if joint:
                found.append(pruned.run(*_own(call)))
            expected = {"masked graph": masked_outputs(typing, keep, call, {}, double=True)}
            if not any(g.normalised for g in typing.groups if g.atom in keep):
                independent += 1
                with torch.no_grad():
                    expected["zeroed module"] = zeroed(module, typing, keep)(*_own(call))
            for reference, values in expected.items():
                for each in found:
                    _agree(values, each, lambda: f"{reference}; {names}\n{pruned.text()}")  # noqa: B023  # called here
    assert graph.text() == text, "the typed graph was changed"
    assert all(torch.equal(t, state[name]) for name, t in graph.tensors().items()), "a tensor was changed"
    return Checked(typing, len(alone) + len(together), independent)


def _agree(expected: Any, found: Any, what: Callable[[], str]) -> None:
    gap = difference(expected, found, double=True)
    assert gap.relative <= EXACT or _noise(expected, found), f"{gap} ({what()})"
    assert all(t.isfinite().all() for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)), "not finite"


def _noise(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(a.shape == b.shape and bool(((a - b).abs() <= NOISE).all()) for a, b in pairs)


def _own(call: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, Tensor) else x for x in call]
