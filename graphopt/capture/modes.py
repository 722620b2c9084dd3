"""Find what differs between training and evaluation, and write it where :class:`TraceModule` switches it.

A graph is captured in evaluation mode. Most operators that know the mode are called by a module of ``torch.nn`` made
for that (a batch norm, a dropout): whether that module would be in training mode says what the operator would be told.
Where a model calls such an operator by itself, or calls attention, whose dropout is a number, the model is traced
once more, in training mode, and the calls are compared in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from graphopt.capture.export import quiet
from graphopt.capture.inputs import Inputs
from graphopt.graph import MODE, OWNER, Call, TensorSpec, TraceModule, find_attribute, spec_of

FLAGS: Final = ("training", "train", "use_input_stats")
"""Arguments by which an operator is told the mode."""

aten = torch.ops.aten
ATTENTION: Final = aten.scaled_dot_product_attention.default
BATCH_NORM: Final = aten.batch_norm.default

_SWITCHING: Final = (_NormBase, _DropoutNd, nn.RNNBase, nn.RReLU)
"""Modules of torch.nn that hand their own mode to the operator they call."""

Site = tuple[fx.Node, str]
"""A node and its argument that evaluation switches off."""


def mark(module: TraceModule, original: nn.Module, inputs: Inputs) -> list[str]:
    """Mark every mode-dependent argument of ``module``, as training ``original`` would switch it.

    Args:
        module: the graph, captured in evaluation mode; marked in place.
        original: the captured model or a working copy of it; is put in training mode.
        inputs: the inputs the graph was exported with.

    Returns:
        Sentences about what training does in the original and will not do in the graph.
    """
    original.train()
    parts = dict(original.named_modules(remove_duplicate=False))
    notes = list(_not_carried(module, parts))
    sites = list(_sites(module.graph))
    values = {site: value for site in sites if (value := _by_owner(site, parts)) is not None}
    open_sites = [site for site in sites if site not in values]
    if open_sites and not (all(node.target is ATTENTION for node, _ in open_sites) and not _drops(parts.values())):
        traced, reason = _by_trace(open_sites, original, inputs)
        values.update(traced)
        if reason:
            notes.append(reason)
    for site in sites:
        _set(module, site, values.get(site, _default(site, parts)))
    return notes


def mark_program(module: TraceModule, owner_types: Mapping[fx.Node, str]) -> list[str]:
    """Mark every mode-dependent argument of a graph whose model is not at hand.

    Each operator that was told "evaluation" would be told "training" by a model in training mode. One that was told
    "training" by a module of ``torch.nn`` shows that the program was exported in training mode; it is switched.

    Args:
        module: the graph; marked in place.
        owner_types: qualified class name of the module that called each operator.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        if _is_counter(node):
            # The step of a batch counter: the module counts by itself, and in training only.
            counter = node.args[0]
            module.graph.erase_node(node)
            if not counter.users:
                module.graph.erase_node(counter)
    told = [(node, argument, value) for node in module.graph.nodes for argument, value in _arguments(node)]
    trained = [(node, argument) for node, argument, value in told if value and not _statistics_missing(node)]
    if not any(owner_types.get(node, "").startswith("torch.nn.modules.") for node, _ in trained):
        trained = []
    for node, argument in trained:
        value = Call(node)[argument]
        Call(node)[argument] = type(value)(0)
        _set(module, (node, argument), value)
    for node, argument, value in told:
        if value is False:
            _set(module, (node, argument), True)
    if not trained:
        return []
    return [f"the program was exported in training mode: {len(trained)} operators were switched to evaluation"]


def carry(source: TraceModule, target: TraceModule) -> list[str]:
    """Copy what nodes of ``source`` know about modes and owners to its export anew, ``target``."""
    pairs = (_calls(source), _calls(target))
    if [node.target for node in pairs[0]] != [node.target for node in pairs[1]]:
        return ["training mode could not be carried over to the new capture: the graph changed on the way"]
    for old, new in zip(*pairs, strict=True):
        new.meta.update({key: old.meta[key] for key in (MODE, OWNER) if key in old.meta})
    target.meta["counters"] = dict(source.meta.get("counters", {}))
    return []


def _calls(module: TraceModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    call = Call(node)
    if node.target is ATTENTION:
        yield "dropout_p", call["dropout_p"]
    for flag in FLAGS:
        if call.has(flag):
            yield flag, call[flag]


def _sites(graph: fx.Graph) -> Iterator[Site]:
    for node in graph.nodes:
        for argument, value in _arguments(node):
            if not value:
                yield node, argument


def _set(module: TraceModule, site: Site, value: Any) -> None:
    node, argument = site
    call = Call(node)
    now = call[argument]
    if value == now:
        return
    node.meta[MODE] = {**node.meta.get(MODE, {}), call.key(argument): (now, value)}
    counter = f"{node.meta.get(OWNER, '')}.num_batches_tracked".removeprefix(".")
    if node.target is BATCH_NORM and find_attribute(module, counter) is not None:
        counters = module.meta.setdefault("counters", {})
        counters[counter] = counters.get(counter, 0) + 1


def _by_owner(site: Site, parts: Mapping[str, nn.Module]) -> Any:
    """Return the value in training where the owner's type settles it, else None."""
    node, argument = site
    part = parts.get(node.meta.get(OWNER, ""))
    if argument == "dropout_p":
        return (float(part.dropout) if part.training else 0.0) if isinstance(part, nn.MultiheadAttention) else None
    return part.training if isinstance(part, _SWITCHING) else None


def _default(site: Site, parts: Mapping[str, nn.Module]) -> Any:
    node, argument = site
    if argument == "dropout_p":
        return 0.0
    part = parts.get(node.meta.get(OWNER, ""))
    return part is None or part.training


def _drops(parts: Any) -> bool:
    """Say whether any module, or its configuration, holds a dropout probability above zero."""
    for part in parts:
        for holder in (part, getattr(part, "config", None), getattr(part, "cfg", None)):
            for name, value in getattr(holder, "__dict__", {}).items():
                if (name == "p" or "drop" in name) and isinstance(value, int | float) and value > 0:
                    return True
    return False


def _by_trace(sites: Sequence[Site], original: nn.Module, inputs: Inputs) -> tuple[dict[Site, Any], str | None]:
    """Trace ``original`` in training mode and read the arguments of the calls that correspond to ``sites``."""
    state = dict(original.named_parameters(remove_duplicate=False)) | dict(
        original.named_buffers(remove_duplicate=False)
    )

    def call(state: dict[str, torch.Tensor], inputs: Inputs) -> Any:
        # Only the calls count; the results are not returned, since they may be of types that cannot be traced.
        torch.func.functional_call(original, state, *inputs)
        return ()

    try:
        with quiet(), torch.no_grad():
            traced = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(state, inputs)
    except Exception as error:  # noqa: BLE001  # whatever the model's own code raises in training mode
        return {}, (
            f"in training mode the model could not be traced ({type(error).__name__}): dropout that it applies by "
            "functions is switched with the module that calls it, and attention dropout stays off"
        )
    found: dict[Site, Any] = {}
    mismatched: set[str] = set()
    for target in {node.target for node, _ in sites}:
        wanted = [site for site in sites if site[0].target is target]
        # Calls that were settled by their owner are not asked for here, but do occur in the trace.
        graph = wanted[0][0].graph
        here = list(graph.find_nodes(op="call_function", target=target))
        there = list(traced.graph.find_nodes(op="call_function", target=target))
        if [_shape(node) for node in here] != [_shape(node) for node in there]:
            mismatched.add(str(target))
            continue
        partner = dict(zip(here, there, strict=True))
        for node, argument in wanted:
            found[node, argument] = Call(partner[node])[argument]
    reason = f"in training the original calls {', '.join(sorted(mismatched))} at other places than in evaluation"
    return found, reason if mismatched else None


def _shape(node: fx.Node) -> tuple[int, int] | None:
    # Rank and last size: the trace and the graph may differ in the size of the batch, wherever it stands.
    spec, value = spec_of(node), node.meta.get("val")
    shape = spec.shape if isinstance(spec, TensorSpec) else getattr(value, "shape", ())
    return (len(shape), int(shape[-1])) if shape else None


def _not_carried(module: TraceModule, parts: Mapping[str, nn.Module]) -> Iterator[str]:
    owners: dict[str, set[Any]] = {}
    for node in module.graph.nodes:
        owners.setdefault(node.meta.get(OWNER, ""), set()).add(node.target)
    inner = [
        node
        for body in module.children()
        if isinstance(body, fx.GraphModule)
        for node in body.graph.nodes
        if any(value is False for _, value in _arguments(node))
    ]
    if inner:
        yield f"{len(inner)} operators inside branches or loops stay in evaluation mode in training"
    averaging = [
        name for name, part in parts.items() if isinstance(part, _NormBase) and name in owners and part.momentum is None
    ]
    if averaging:
        yield f"cumulative averages of batch norms (momentum=None) do not move in training: {listed(averaging)}"
    weighted = [
        name
        for name, part in parts.items()
        if isinstance(part, nn.MultiheadAttention)
        and part.dropout > 0
        and owners.get(name, {ATTENTION}).isdisjoint({ATTENTION})
    ]
    if weighted:
        yield f"attention that returns its weights (need_weights=True) has no dropout in training: {listed(weighted)}"
    paths = [
        name
        for name, part in parts.items()
        if not isinstance(part, _DropoutNd)
        and isinstance(probability := getattr(part, "drop_prob", None), int | float)
        and probability > 0
    ]
    if paths:
        yield f"stochastic depth is not applied in training: {listed(paths)}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Join the first names and count the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_counter(node: fx.Node) -> bool:
    counter = node.args[0]
    return (
        isinstance(counter, fx.Node)
        and counter.op == "get_attr"
        and str(counter.target).endswith("num_batches_tracked")
        and not node.users
    )


def _statistics_missing(node: fx.Node) -> bool:
    call = Call(node)
    return call.has("running_mean") and call["running_mean"] is None
