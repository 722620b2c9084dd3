"""Cut a module in its own class: tensors, then attributes, then the proof.

What may live here: the order of events, what is refused before the search and after it, and the words of refusals.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.axes.algebra import Indices
from graphopt.capture import capture
from graphopt.capture.export import is_hollow, without_cache
from graphopt.dialects import infer
from graphopt.errors import PlanError
from graphopt.graph import Graph
from graphopt.rewrite import rewrite
from graphopt.shrink import layers, sites
from graphopt.shrink.search import Inputs, Search, owned, running
from graphopt.shrink.sizes import Kept, Sizes, kept_atoms
from graphopt.shrink.trace import DivergenceError
from graphopt.verify import ROUNDING, difference, masked_equivalence

__all__ = ["follow", "shrink"]

BIASED: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that run with a bias as they do without one."""


def shrink(module: nn.Module, kept: Kept, example_inputs: Any, reference: nn.Module | None = None) -> nn.Module:
    """Return a copy of ``module``, of its own class, without what is not kept.

    The copy computes what the cut graph of the module computes, which computes what the module does with removed
    indices masked; both are checked.

    Args:
        module: the module; it is not changed.
        kept: ``{name of a parameter or buffer: {dimension: kept indices}}``.
        example_inputs: as for :func:`~graphopt.capture.capture`.
        reference: a module whose tensors the copy takes over, and with which it is compared.

    Raises:
        PlanError: the module cannot be copied, is not the one that the plan was made for, or its code cannot follow.
        CaptureError: the module could not be captured.
    """
    small = _copied(module)  # refuses before the work of capturing is done
    return _followed(module, small, kept, capture(module, example_inputs), reference)


def follow(module: nn.Module, kept: Kept, graph: Graph, reference: nn.Module | None = None) -> nn.Module:
    """Do what :func:`shrink` does for a module that ``graph`` was captured of."""
    return _followed(module, _copied(module), kept, graph, reference)


def _followed(module: nn.Module, small: nn.Module, kept: Kept, graph: Graph, reference: nn.Module | None) -> nn.Module:
    typing = infer(graph)
    keep = kept_atoms(typing, kept, _names(module))
    cut = rewrite(typing, keep)
    found = masked_equivalence(typing, keep, cut)
    if not found.equal:
        raise PlanError(
            f"without what the plan removes, the graph of {_kind(module)} does not compute what it does when that is "
            f"masked ({found}): the example inputs amplify round-off, or the plan is another model's"
        )
    settled = _cut(small, kept)
    inputs = graph.example_inputs
    search = Search(small, settled, Sizes(typing, keep), cut, inputs, lambda part: without_cache(part, inputs))
    search.learn(module)
    left = search.solve()
    if left is not None:
        raise _refusal(module, search, left)
    parts = dict(small.named_modules())
    for site, number in search.choice.items():
        sites.put(parts[site.path], site, number)
    if reference is not None:
        _take_over(small, reference)
    _prove(small, cut.module if reference is None else reference, inputs)
    small.train(module.training)
    for path, part in module.named_modules():
        parts[path].training = part.training
    return small


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module, in evaluation mode and without what it keeps between calls."""
    if isinstance(module, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise PlanError(f"{_kind(module)} is no class of your own, but a graph: result.module is what replaces it")
    hollow = [name for name, tensor in module.state_dict().items() if is_hollow(tensor)]
    if hollow:
        raise PlanError(
            f"{_kind(module)} cannot be run, for {hollow[0]} has no values: apply the plan to its files "
            "(plan.apply_files) or state dict, or give it values first"
        )
    try:
        small = copy.deepcopy(module)
    except Exception as error:
        raise PlanError(
            f"{_kind(module)} cannot be copied, so it cannot be given back in its own class: copy.deepcopy says "
            f"{type(error).__name__}: {error}. Use result.module, or make the module copyable (no tensors with "
            "history, locks or open files among its attributes)"
        ) from error
    # Modules that keep what they computed from their weights forget it when the mode changes.
    small.train()
    small.eval()
    return small


def _names(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules(remove_duplicate=False):
        for name in (*part._parameters, *part._buffers, *vars(part)):
            yield f"{path}.{name}".removeprefix(".")


def _cut(small: nn.Module, kept: Kept) -> dict[str, frozenset[str]]:
    """Cut every tensor of a copy in place of its former self, once each, and settle the layers they belong to."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    cuts: dict[int, dict[str, Mapping[int, Indices]]] = {}
    places = [
        (f"{path}.{name}".removeprefix("."), part, table, name)
        for path, part in small.named_modules(remove_duplicate=False)
        for table in (part._parameters, part._buffers, vars(part))
        for name, tensor in table.items()
        if isinstance(tensor, torch.Tensor)
    ]
    for full, _, table, name in places:
        if full in kept and id(table[name]) not in made:
            made[id(table[name])] = (table[name], _sliced(full, table[name], kept[full]))
    dims = {id(table[name]): kept[full] for full, _, table, name in places if full in kept}
    for _, part, table, name in places:
        tensor = table[name]
        if id(tensor) in made:  # under every name that a shared tensor has
            cuts.setdefault(id(part), {})[name] = dims[id(tensor)]
            table[name] = made[id(tensor)][1]
    return {path: layers.update(part, cuts.get(id(part), {})) for path, part in small.named_modules()}


def _sliced(name: str, tensor: torch.Tensor, dims: Mapping[int, Indices]) -> torch.Tensor:
    found = tensor.detach()
    for dim, indices in dims.items():
        found = found.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if not isinstance(tensor, nn.Parameter):
        return found
    return nn.Parameter(found, requires_grad=tensor.requires_grad)


def _take_over(small: nn.Module, reference: nn.Module) -> None:
    """Give a copy the values of a reference, all of them or none, and the biases that passes gave to its layers."""
    wanted, there = dict(small.named_parameters()) | dict(small.named_buffers()), reference.state_dict(keep_vars=True)
    there |= dict(reference.named_buffers())
    if not all(name in there and there[name].shape == tensor.shape for name, tensor in wanted.items()):
        return
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(there[name])
    for path, part in small.named_modules():
        bias = there.get(f"{path}.bias")
        if bias is not None and isinstance(part, BIASED) and part.bias is None:
            part.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def _prove(small: nn.Module, reference: nn.Module, inputs: Inputs) -> None:
    with running(small) as duplicate, without_cache(duplicate, inputs):
        args, kwargs = owned(inputs)
        found = duplicate(*args, **kwargs)
    was = {part: part.training for part in reference.modules()}
    reference.eval()
    try:
        with torch.no_grad():
            args, kwargs = owned(inputs)
            expected = reference(*args, **kwargs)
    finally:
        for part, mode in was.items():
            part.training = mode
    apart = difference(_leaves(expected), _leaves(found), double=_double(small))
    if not apart.relative <= ROUNDING:
        raise PlanError(
            f"{_kind(small)} with the plan applied does not compute what the smaller model does: {apart}. Passes gave "
            "that model values that this class has no place for, as where batch norms were folded: optimize for the "
            "target 'torch', which leaves layers as they are, or use result.module"
        )


def _leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _double(module: nn.Module) -> bool:
    return any(p.dtype == torch.float64 for p in module.parameters())


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _refusal(module: nn.Module, search: Search, left: DivergenceError) -> PlanError:
    """Say where the code cannot follow, what is wanted there, and what to do."""
    path = left.key[0]
    part = f"{path or 'its own forward'} ({_kind(module.get_submodule(path))})"
    place = f" at {left.line}" if left.line is not None else ""
    wanted = search.wanted(left)
    call = f"{left.function} " if left.function else ""
    if left.shape in wanted:
        what = (
            f"{call}gives other values than in the pruned graph: it derives a number, such as an attention's scale, "
            "from a size that changed"
        )
    else:
        found = f"with sizes {left.sizes}" if left.sizes else f"gives shape {left.shape}" if left.shape else "fails"
        what = f"{call}{found}" + (f", and shape {' or '.join(map(str, wanted))} is wanted" if wanted else "")
    cause = f" ({left.error})" if left.error else ""
    exclude = sorted({_pattern(str(group.places[0]), path) for group in search.blamed(left)})
    instead = f", or keep the class by keeping whole {', '.join(exclude)} (constraints.exclude)" if exclude else ""
    return PlanError(
        f"{_kind(module)} cannot be given back in its own class: {part} has a size written into its code{place}: "
        f"{what}{cause}. Use result.module, which computes it{instead}",
        module=path,
        code=left.line.text if left.line is not None else "",
        exclude=exclude,
    )


def _pattern(place: str, path: str) -> str:
    """Return a pattern for a dimension, and its like in modules whose names differ from ``path`` by numbers."""
    parts = place.split(".")
    depth = len(path.split(".")) if path else 0
    return ".".join([*(re.sub(r"\d+", "*", part) for part in parts[:depth]), *parts[depth:]])
