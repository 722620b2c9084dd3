"""Tell the kinds of model apart and capture each."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.capture import modes, onnx
from graphopt.capture.archive import load
from graphopt.capture.build import build, user_inputs, varies
from graphopt.capture.export import StandIns, UndecidableError, is_hollow, run_export, without_cache, working_copy
from graphopt.capture.inputs import (
    BATCH,
    Dynamic,
    Inputs,
    dynamic_dimensions,
    find_inputs,
    leaf_names,
    normalise,
    widen,
)
from graphopt.capture.tensors import Owner
from graphopt.dialects.onnx.facts import is_onnx
from graphopt.errors import CaptureError
from graphopt.graph import Graph, TraceModule

_WRAPPERS: Final = {
    "DataParallel": "pass model.module",
    "DistributedDataParallel": "pass model.module",
    "FullyShardedDataParallel": "gather the parameters and pass the plain module",
}
_PICKLED: Final = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_NO_PICKLES: Final = (
    "pickles run code when they are read and are not loaded: build the model in Python, load its weights with "
    "model.load_state_dict(torch.load(path, weights_only=True)), and pass the model"
)


def capture(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic: str | Mapping[str, Any] | None = BATCH,
) -> Graph:
    """Turn a model into a graph that owns its tensors and can be trained: of ATen operators, or of those of ONNX.

    The model itself is not touched: not its tensors, not its mode, not its attributes. The graph is in evaluation mode
    whatever mode the model was in; ``graph.training`` says which that was. Convert a model (``model.double()``) before
    it is captured: types that its code computes are built in.

    A varying dimension of size 1 is captured at another size, so a model that treats a batch of one in a way of its
    own is captured as it treats larger ones.

    Args:
        model: an ``nn.Module`` (also an ``fx.GraphModule``), a :class:`~graphopt.graph.TraceModule` from an earlier
            capture, a ``torch.export.ExportedProgram``, or the path of one saved as ``.pt2``; an
            ``onnx.ModelProto``, an ``onnx_graphsurgeon.Graph``, or the path of an ``.onnx`` file.
        example_inputs: a tensor; a tuple of positional inputs; a dict of keyword inputs; or a pair ``(tuple, dict)`` of
            both. Inputs may be nested. Not needed where the model carries or describes its inputs: programs, traces,
            Lightning, timm and Hugging Face models.
        dynamic: which input dimensions may vary from call to call. ``"batch"``: dimension 0 of every tensor. A mapping
            ``{input: {dimension: name}}``, say ``{"input_ids": {1: "sequence"}}``: these besides; ``{input: None}``
            keeps an input fixed. ``None``: nothing varies. Inputs are named as in ``forward``, their parts after a dot.
            What the model's code fixes all the same is named in ``graph.notes``. Of an ONNX model, the file says it.

    Raises:
        CaptureError: if there are no example inputs, or the model cannot be captured; the message says what to do.
    """
    with torch.inference_mode(mode=False):  # tensors that are made in inference mode could not be trained
        if onnx.is_onnx(model):
            return onnx.read(model, example_inputs, dynamic)
        if isinstance(model, str | os.PathLike):
            return _from_program(load(_checked_path(Path(model))), example_inputs, dynamic)
        if isinstance(model, ExportedProgram):
            return _from_program(model, example_inputs, dynamic)
        if isinstance(model, TraceModule):
            return _from_trace(model, example_inputs, dynamic)
        if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
            return _from_module(_unwrapped(model), example_inputs, dynamic)
        raise CaptureError(_refusal(model))


def _from_module(model: nn.Module, example_inputs: Any, dynamic: Any) -> Graph:
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, nn.UninitializedParameter)]
    if lazy:
        raise CaptureError(f"{lazy[0]} has no shape yet: call the model once on real inputs, then capture it")
    inputs = _owned(find_inputs(model) if example_inputs is None else normalise(example_inputs))
    tensors = _tensors(model)
    training = model.training
    stand_ins = StandIns()
    with working_copy(model, stand_ins) as duplicate, without_cache(duplicate, inputs) as notes:
        duplicate.eval()
        program, exported_with, found = _export(duplicate, inputs, dynamic, stand_ins)
        notes += found
        owner = Owner([*tensors.values(), *_constants(program)])
        owned = {name: owner.own(tensor) for name, tensor in tensors.items()}
        module = build(program, owned, _transient(model), owner.own, inputs).module
        if isinstance(model, TraceModule):
            notes += modes.carry(model, module)
        else:
            notes += modes.mark(module, duplicate, exported_with)
    return _finish(module, type(model).__name__, inputs, notes, training=training)


def _from_program(program: ExportedProgram, example_inputs: Any, dynamic: Any) -> Graph:
    if isinstance(dynamic, Mapping):
        raise CaptureError(
            "an exported program has its dynamic dimensions already: pass dynamic_shapes to torch.export.export, or "
            "pass the model"
        )
    if example_inputs is not None:
        inputs = normalise(example_inputs)
    elif program.example_inputs is not None:
        inputs = program.example_inputs
    else:
        raise CaptureError("the exported program carries no example inputs: pass example_inputs")
    inputs = _owned(inputs)
    _check_nesting(program, inputs)
    transient = frozenset(program.graph_signature.non_persistent_buffers)
    tensors = {**program.state_dict, **{name: program.constants[name] for name in transient}}
    owner = Owner([*tensors.values(), *_constants(program)])
    owned = {name: owner.own(tensor) for name, tensor in tensors.items()}
    built = build(program, owned, transient, owner.own, inputs)
    notes = modes.mark_program(built.module, built.owner_types)
    names = [node.name for node in user_inputs(program)]
    wanted = dynamic_dimensions(dynamic, names, inputs)
    notes += _static_notes(program, names, wanted, "the program was exported so")
    return _finish(built.module, "ExportedProgram", inputs, notes, training=False)


def _from_trace(model: TraceModule, example_inputs: Any, dynamic: Any) -> Graph:
    known: Inputs | None = model.meta.get("example_inputs")
    inputs = known if example_inputs is None else normalise(example_inputs)
    if inputs is None:
        raise CaptureError("the traced module carries no example inputs: pass example_inputs")
    if known is not None and dynamic == BATCH and _sizes(inputs) == _sizes(known):
        tensors = _tensors(model)
        owner = Owner(tensors.values())
        module = model.replica(owner.own).eval()
        return _finish(
            module, type(model).__name__, _owned(inputs), list(model.meta.get("notes", ())), training=model.training
        )
    if is_onnx(model):
        raise CaptureError(
            "the model was read from an ONNX file for inputs of other sizes: read the file again with these inputs"
        )
    return _from_module(model, inputs, dynamic)


def _export(
    model: nn.Module, inputs: Inputs, dynamic: Any, stand_ins: StandIns
) -> tuple[ExportedProgram, Inputs, list[str]]:
    """Export with as many of the wanted dimensions varying as the model allows; return the inputs it used, too."""
    names = leaf_names(model, inputs)
    wanted = dynamic_dimensions(dynamic, names, inputs)
    leaves = pytree.tree_leaves(inputs)
    varying: Dynamic = wanted
    why = "the model's code fixes it"
    while True:
        widened = widen(inputs, varying)
        try:
            program = run_export(model, widened, varying, stand_ins)
        except UndecidableError:
            raise
        except CaptureError as error:
            if not varying:
                raise
            varying, why = {}, f"with varying sizes, {error}"
            continue
        # A dimension of size 1 was exported with another size, so it must not become static at that.
        fixed = [(i, d) for i, d in _static(program, varying) if leaves[i].shape[d] == 1]
        if not fixed:
            return program, widened, [*_range_notes(program, names), *_static_notes(program, names, wanted, why)]
        varying = {i: frozenset(d for d in dimensions if (i, d) not in fixed) for i, dimensions in varying.items()}


def _static(program: ExportedProgram, wanted: Dynamic) -> Iterator[tuple[int, int]]:
    for position, node in enumerate(user_inputs(program)):
        for dimension in sorted(wanted.get(position, ())):
            if not varies(node.meta["val"].shape[dimension]):
                yield position, dimension


def _static_notes(program: ExportedProgram, names: list[str], wanted: Dynamic, why: str) -> list[str]:
    values: list[Any] = [node.meta.get("val") for node in user_inputs(program)]
    return [
        f"dimension {dimension} of input {names[position]} is fixed at {values[position].shape[dimension]}: {why}"
        for position, dimension in _static(program, wanted)
    ]


def _range_notes(program: ExportedProgram, names: list[str]) -> list[str]:
    notes = []
    seen: set[Any] = set()
    for name, node in zip(names, user_inputs(program), strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if value is not None:
                notes.append(f"input {name} is fixed at {value!r}")
            continue
        sizes: list[Any] = list(value.shape)
        for dimension, size in enumerate(sizes):
            expression = size.node.expr if varies(size) else None
            allowed = program.range_constraints.get(expression)
            if allowed is None or expression in seen:
                continue
            seen.add(expression)
            if allowed.lower > 2 or allowed.upper < 2**31:
                upper = f" to {allowed.upper}" if allowed.upper < 2**31 else " up"
                notes.append(
                    f"dimension {dimension} of input {name}: the graph follows the way the model takes for sizes from "
                    f"{allowed.lower}{upper}"
                )
    return notes


def _finish(module: TraceModule, name: str, inputs: Inputs, notes: list[str], *, training: bool) -> Graph:
    """Settle the names of shared tensors, and write into the module what a later capture of it needs."""
    type(module).__name__ = name
    tensors = _tensors(module)
    canonical: dict[int, str] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in tensors:
            node.target = canonical.setdefault(id(tensors[node.target]), node.target)
    aliases = {
        name: canonical[id(tensor)] for name, tensor in tensors.items() if canonical.get(id(tensor), name) != name
    }
    kept = module.state_dict(keep_vars=True)
    unread = [name for name in kept if id(tensors[name]) not in canonical and not name.endswith("num_batches_tracked")]
    if unread:
        note = f"the graph does not read {modes.listed(unread)}; kept as in the original"
        notes = [*(each for each in notes if each != note), note]
    module.recompile()
    module.meta.update(example_inputs=inputs, notes=list(notes), training=training)
    return Graph(module, inputs, aliases, notes)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under every name it has, in the order of ``state_dict``."""
    return {
        f"{path}.{name}".removeprefix("."): tensor
        for path, part in model.named_modules(remove_duplicate=False)
        for name, tensor in chain(part._parameters.items(), part._buffers.items())
        if tensor is not None
    }


def _transient(model: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{path}.{name}".removeprefix(".")
        for path, part in model.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
        if part._buffers.get(name) is not None
    )


def _constants(program: ExportedProgram) -> list[torch.Tensor]:
    return [value for value in program.constants.values() if isinstance(value, torch.Tensor)]


def _owned(inputs: Inputs) -> Inputs:
    leaves, spec = pytree.tree_flatten(inputs)
    owned = [_owned_leaf(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(owned, spec)  # type: ignore[no-any-return]


def _owned_leaf(leaf: torch.Tensor) -> torch.Tensor:
    """Copy an input; zeros take the place of one that has no values."""
    if is_hollow(leaf):
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
    return leaf.detach().clone()


def _sizes(inputs: Inputs) -> tuple[list[Any], pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten(inputs)
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec


def _check_nesting(program: ExportedProgram, inputs: Inputs) -> None:
    expected, found = program.call_spec.in_spec, pytree.tree_structure(inputs)
    if expected is not None and expected != found:
        raise CaptureError(
            f"the exported program takes inputs nested as {expected}; example_inputs are nested as {found}"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    name = type(model).__name__
    if name in _WRAPPERS:
        raise CaptureError(f"the model is wrapped in {name}: {_WRAPPERS[name]}")
    original = model._modules.get("_orig_mod") if name == "OptimizedModule" else None
    return model if original is None else original


def _checked_path(path: Path) -> Path:
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        if not path.is_file():
            raise CaptureError(f"there is no file {path}")
        return path
    if suffix in _PICKLED:
        raise CaptureError(f"{path} is a pickle by its name; {_NO_PICKLES}")
    if suffix == ".safetensors":
        raise CaptureError(
            f"{path} holds weights but no model: build the model in Python, load them, and pass the model"
        )
    raise CaptureError(
        f"{str(path)!r} is no model that can be read: pass an nn.Module, or the path of an .onnx or .pt2 file. A "
        "pretrained model is loaded with its own library first, say transformers.AutoModel.from_pretrained or "
        "timm.create_model"
    )


def _refusal(model: Any) -> str:
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return "TorchScript cannot be captured: pass the nn.Module that was scripted or traced"
    if inspect.isclass(model) and issubclass(model, nn.Module):
        return f"{model.__name__} is a class: pass an instance, {model.__name__}(…)"
    if type(model).__module__.partition(".")[0] in ("onnx_ir", "onnxscript"):
        return "pass the path of the .onnx file, or the onnx.ModelProto (onnx_ir.to_proto(model))"
    if isinstance(model, Mapping):
        return "a state dict holds weights but no model: build the model in Python, load it, and pass the model"
    if callable(model):
        return (
            f"{getattr(model, '__name__', type(model).__name__)} is a function: wrap it in the forward of an nn.Module"
        )
    return (
        f"a {type(model).__name__} cannot be captured: pass an nn.Module, a torch.export.ExportedProgram, an "
        "onnx.ModelProto, or the path of an .onnx or .pt2 file"
    )
