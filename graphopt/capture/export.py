"""Run ``torch.export`` without touching the model, and say in plain words why it failed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, ShapesCollection, register_dataclass
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree

from graphopt.capture.inputs import Dynamic, Inputs
from graphopt.errors import CaptureError

_LIBRARY: Final = Path(torch.__file__).parent
_HERE: Final = Path(__file__).parent
_STANDARD: Final = Path(traceback.__file__).parent
_CHATTY: Final = ("torch.fx", "torch.export", "torch._export", "torch._dynamo", "torch._subclasses.fake_tensor")


class UndecidableError(CaptureError):
    """Say that a model decides by the values of tensors, so that no choice of dynamic dimensions makes it a graph."""


@contextlib.contextmanager
def working_copy(model: nn.Module, stand_ins: StandIns) -> Iterator[nn.Module]:
    """Lend a copy of ``model`` that can be switched, traced and thrown away.

    The copy has its own modules and attributes and the model's tensors, or what stands in for those that have no
    values. A model that cannot be copied is lent itself, and gets back every attribute of its modules afterwards; it
    must have all of its values.
    """
    duplicate = _structural_copy(model, stand_ins)
    if duplicate is None and stand_ins.used:
        raise CaptureError(
            f"{type(model).__name__} has parameters without values, and cannot be copied (copy.deepcopy fails): give "
            "it values, as model.to_empty(device='cpu') does"
        )
    if duplicate is not None:
        yield duplicate
        return
    kept = [(part, _attributes(part)) for part in model.modules()]
    try:
        yield model
    finally:
        for part, attributes in kept:
            vars(part).clear()
            vars(part).update(attributes)


def _structural_copy(model: nn.Module, stand_ins: StandIns) -> nn.Module | None:
    memo: dict[int, Any] = {id(tensor): stand_ins.of(tensor) for tensor in _held_tensors(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001  # whatever the attributes of a model raise when they are copied
        return None


def _held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for part in model.modules():
        for value in vars(part).values():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


@contextlib.contextmanager
def without_cache(model: nn.Module, inputs: Inputs) -> Iterator[list[str]]:
    """Have a Hugging Face model return no key-value cache, unless ``inputs`` say something about it.

    A cache is of a type that no graph can return; and as a result it would fix the heads which it holds.

    Yields:
        A sentence for the report where this changes what the model returns.
    """
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    if "use_cache" in inputs[1] or "past_key_values" not in inspect.signature(model.forward).parameters:
        caching = []
    for config in caching:
        config.use_cache = False
    try:
        yield ["config.use_cache counts as False: the graph returns no key-value cache"] if caching else []
    finally:
        for config in caching:
            config.use_cache = True


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {
        name: value.copy() if name in ("_parameters", "_buffers", "_modules") else value
        for name, value in vars(part).items()
    }


class StandIns:
    """Tensors that a model without values is traced with: they hold nothing, and say they are on the CPU.

    So what the model's code makes beside its parameters (positions, masks) is made on the CPU, and the graph runs as it
    is once its parameters are given values.
    """

    def __init__(self) -> None:
        self._mode: FakeTensorMode | None = None
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def used(self) -> bool:
        """Whether anything had to be stood in for."""
        return bool(self._made)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``tensor``, or what stands in for it: the same for the same tensor."""
        if not is_hollow(tensor):
            return tensor
        if id(tensor) not in self._made:
            with self.mode:
                like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            made = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
            self._made[id(tensor)] = tensor, made
        return self._made[id(tensor)][1]

    @property
    def mode(self) -> FakeTensorMode:
        """The mode that all of them belong to; an export takes its symbols from it, so each needs one of its own."""
        if self._mode is None:
            shapes = ShapeEnv(tracked_fakes=[], trace_asserts=True)
            self._mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True, export=True)
        return self._mode

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Let an export find the mode."""
        if not self.used:
            yield
            return
        self.mode.shape_env = ShapeEnv(tracked_fakes=[], trace_asserts=True)
        with tracing(TracingContext(self.mode)):
            yield


def is_hollow(tensor: torch.Tensor) -> bool:
    """Say whether a tensor has a shape and a type, but no values: on the meta device, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def run_export(
    model: nn.Module, inputs: Inputs, dynamic: Dynamic, stand_ins: StandIns | None = None
) -> ExportedProgram:
    """Export ``model`` in the mode it is in; every input dimension in ``dynamic`` varies unless the model fixes it.

    Raises:
        CaptureError: if the model cannot be exported; the cause is chained.
    """
    args, kwargs = inputs
    shapes = ShapesCollection()
    for position, leaf in enumerate(pytree.tree_leaves(inputs)):
        if isinstance(leaf, torch.Tensor) and dynamic.get(position):
            shapes[leaf] = dict.fromkeys(dynamic[position], Dim.AUTO)
        elif _is_dataclass(leaf):
            _register(leaf)
    hook = model.register_forward_hook(lambda _module, _args, output: _register(output))
    try:
        around = contextlib.nullcontext() if stand_ins is None else stand_ins.tracing()
        with quiet(), torch.enable_grad(), _full_precision(model), _unfused_encoder(), _without_line_numbers(), around:
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs), strict=False
            )
    except Exception as error:  # torch.export raises whatever the model's own code raises
        undecidable = any(isinstance(cause, GuardOnDataDependentSymNode) for cause in _causes(error))
        raise (UndecidableError if undecidable else CaptureError)(in_plain_words(model, error)) from error
    finally:
        hook.remove()


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _register(value: Any) -> None:
    """Teach pytrees every dataclass in ``value``, so that it comes back as what it was."""
    for leaf in pytree.tree_leaves(value):
        if _is_dataclass(leaf) and type(leaf) not in pytree.SUPPORTED_NODES:
            register_dataclass(type(leaf), serialized_type_name=f"{type(leaf).__module__}.{type(leaf).__qualname__}")
            for field in dataclasses.fields(leaf):
                _register(getattr(leaf, field.name))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's logging and warnings: they are repeated in the error, or say nothing about the result."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_line_numbers() -> Iterator[None]:
    # The graph does not keep them, and to collect them for every node is a tenth of the time of an export.
    before = fx_config.do_not_emit_stack_traces
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    # An autocast around the call that captures is no part of the model.
    with contextlib.ExitStack() as stack:
        for device in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _unfused_encoder() -> Iterator[None]:
    # Where no parameter needs a gradient, nn.TransformerEncoderLayer is one fused operator, which could not train.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def in_plain_words(model: nn.Module, error: BaseException) -> str:
    """Say why ``model`` does not export, at which line of its code, and what can be done."""
    name, where = type(model).__name__, _place(error)
    if any(isinstance(cause, GuardOnDataDependentSymNode) for cause in _causes(error)):
        return (
            f"{name} makes a decision or a size from the values of a tensor{where}. A graph has one way through and "
            "sizes that follow from the input sizes: decide by shapes or attributes, compute both sides and choose "
            "with torch.where, or leave this part out of forward"
        )
    message = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    if "Cache" in message and "not a known type" in message:
        return f"{name} returns a key-value cache, which no graph can hold{where}: pass use_cache=False"
    if "not a known type" in message or "Unsupported" in message or "nsupported input type" in message:
        return (
            f"{name} takes or returns a value that has no tensors a graph could see{where}: {message}. Return tensors, "
            "tuples, dicts or dataclasses, or register the type with torch.utils._pytree.register_pytree_node"
        )
    return (
        f"{name} cannot be exported{where}: {type(error).__name__}: {message}. Check that the model runs on these "
        "inputs in evaluation mode; `torch.export.export(model, args, kwargs, strict=False)` shows the whole error"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """Return the last line that is neither Python's, torch's nor ours, as ``" at file:line (`code`)"``."""
    for cause in _causes(error):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            path = Path(frame.filename)
            if frame.filename.startswith("<") or path.parent == _STANDARD:
                continue
            if not (path.is_relative_to(_LIBRARY) or path.is_relative_to(_HERE)):
                return f" at {frame.filename}:{frame.lineno} (`{frame.line}`)"
    return ""
