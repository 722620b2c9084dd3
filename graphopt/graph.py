"""Hold one model in the ATen dialect: a ``torch.fx.GraphModule`` and the facts that passes need about it.

What may live here: the graph container, the type of a value (:class:`TensorSpec`), the module class that can
train, and the reading view of one operator (:class:`Call`). Nothing here knows axes, costs or passes.

Nodes carry plain, immutable facts, so that copying a graph copies references:

``node.meta["spec"]``
    what the node yields, as :data:`Spec`. It replaces fake tensors: it is cheap to rewrite when sizes change, and it
    needs no shape environment.
``node.meta["owner"]``
    the fully qualified name of the module of the original whose ``forward`` called the operator ("" is the root).
``node.meta["train_arguments"]``
    the arguments that differ in training, see :class:`TraceModule`.
``node.meta["fixed"]``
    on an input that is no tensor: the value that capture saw and built in.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen

from graphopt.checkpoint import Weights
from graphopt.errors import PipelineError

SPEC: Final = "spec"
MODE: Final = "train_arguments"
OWNER: Final = "owner"
FIXED: Final = "fixed"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describe a tensor value.

    ``shape`` holds one integer a dimension: its size, or for a dynamic dimension the size it had in the example
    inputs. ``dynamic`` says which dimensions may change from call to call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: tuple[bool, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe a real tensor; all its dimensions are static."""
        return cls(tuple(tensor.shape), tensor.dtype, (False,) * tensor.dim())

    def resized(self, shape: tuple[int, ...]) -> TensorSpec:
        """Return the same type with other sizes."""
        return replace(self, shape=shape)

    def __str__(self) -> str:
        sizes = ", ".join(f"{n}?" if d else str(n) for n, d in zip(self.shape, self.dynamic, strict=True))
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


Spec = TensorSpec | int | float | bool | None | tuple["Spec", ...]
"""What a node yields: a tensor, a symbolic number by its example value, nothing, or several of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Say what positions of a tensor's dimension stand for in the input model: ``positions`` of a tensor's ``dim``.

    Of a dimension that is several tensors' one after the other, each is a source; at the others' positions it has -1.
    ``shape`` is the shape of that tensor in the input model, or, once indices were removed, in what is left of it.
    """

    tensor: str
    shape: tuple[int, ...]
    dim: int
    positions: npt.NDArray[np.int64]

    def at(self, positions: npt.NDArray[np.int64]) -> Source:
        """Return what some of the positions stand for."""
        return replace(self, positions=self.positions[positions])


Sources = dict[int, tuple[Source, ...]]
"""What each dimension of a tensor stands for; a dimension that is not in it stands for nothing."""


class TraceModule(fx.GraphModule):
    """A captured model: runs like any module, and switches between training and evaluation.

    Capture records evaluation mode. A node whose arguments differ in training (batch norm, dropout, attention
    dropout) carries them in ``node.meta["train_arguments"]`` as ``{argument: (eval value, train value)}``, where the
    argument is a position or, for keyword arguments, a name; :meth:`train` puts the right ones in place.
    ``meta["counters"]`` maps the name of a batch counter (``num_batches_tracked``) to the number of steps a call
    in training mode advances it by.

    A call is refused with :class:`ValueError` where it differs from what the graph was specialised to: the size of a
    static input dimension, or the value of an input that is no tensor. The graph would compute something else than
    the original.

    Code is generated at the first call after an edit, not at every edit: a chain of passes pays for it once. Tensors
    that the graph does not read are kept, here and in copies. Moving the module to another device moves the
    tensors that the graph itself creates, too.
    """

    def train(self, mode: bool = True) -> Self:
        """Switch every mode-dependent argument; returns self, as ``nn.Module.train`` does."""
        changed = False
        for node in self.graph.nodes:
            for key, values in node.meta.get(MODE, {}).items():
                wanted = values[1 if mode else 0]
                if isinstance(key, int):
                    if node.args[key] != wanted:
                        node.update_arg(key, wanted)
                        changed = True
                elif node.kwargs.get(key) != wanted:
                    node.update_kwarg(key, wanted)
                    changed = True
        if changed:
            self.recompile()
        super().train(mode)
        return self

    def recompile(self) -> None:  # type: ignore[override]  # there is no code yet that could be returned
        """Forget the generated code; the next call generates it anew."""
        cls = type(self)
        if "forward" in vars(cls):
            del cls.forward
        codegen = self._graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            self._in_spec = codegen.pytree_info.in_spec
            self._out_spec = codegen.pytree_info.out_spec

    def _generated(self) -> Self:
        if "forward" not in vars(type(self)):
            super().recompile()
        return self

    @property
    def forward(self) -> Any:  # type: ignore[override]  # found here until generated, then on the instance's own class
        """The generated function."""
        return vars(type(self._generated()))["forward"].__get__(self)

    @property
    def code(self) -> str:
        """The generated Python text."""
        return super(TraceModule, self._generated()).code

    def __str__(self) -> str:
        return super(TraceModule, self._generated()).__str__()

    def enter(self, *inputs: Any) -> None:
        """Start a call: refuse inputs the graph was not made for, advance the batch counters (generated code calls it).

        Args:
            inputs: the leaves of the call's inputs, in the order of the graph's placeholders.
        """
        for node, value in zip(self.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if FIXED in node.meta:
                _check_fixed(node, value)
            elif isinstance(spec := node.meta.get(SPEC), TensorSpec):
                _check_tensor(node, spec, value)
        if self.training:
            for name, steps in self.meta.get("counters", {}).items():
                counter = find_attribute(self, name)
                if counter is not None:  # a batch norm that was folded away counts no more
                    counter.add_(steps)

    def replica(self, tensor: Callable[[torch.Tensor], torch.Tensor] | None = None) -> TraceModule:
        """Copy the structure; ``tensor`` says what takes the place of each tensor (by default, the tensor itself)."""
        with without_collection():
            graph = fx.Graph()
            values: dict[fx.Node, fx.Node] = {}
            graph.output(graph.graph_copy(self.graph, values)).meta = dict(self.graph.output_node().meta)
            graph.set_codegen(self.graph._codegen)
            module = TraceModule(nn.Module(), fx.Graph(), type(self).__name__)
            _replicate(self, module, tensor)
            module.graph = graph
        module.meta = {k: v.copy() if isinstance(v, dict | list) else v for k, v in self.meta.items()}
        return module

    def __copy__(self) -> TraceModule:
        return self.replica()

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceModule:
        module = memo[id(self)] = self.replica(lambda tensor: copy.deepcopy(tensor, memo))
        return module

    def __reduce__(self) -> Any:
        raise TypeError(
            "a captured model cannot be pickled: save module.state_dict(), or the whole of it with "
            "torch.export.save(torch.export.export(module, inputs), path)"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = next(chain(self.parameters(), self.buffers()), None)
        old = before.device if before is not None else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = next(chain(self.parameters(), self.buffers()), None)
        if old is not None and after is not None and after.device != old:
            self._move_created(old, after.device)
        return self

    def _move_created(self, old: torch.device, new: torch.device) -> None:
        def moved(value: Any) -> Any:
            return new if isinstance(value, torch.device) and value == old else value

        changed = False
        for node in self.graph.nodes:
            args, kwargs = tuple(map(moved, node.args)), {k: moved(v) for k, v in node.kwargs.items()}
            if args != node.args or kwargs != node.kwargs:
                node.args, node.kwargs, changed = args, kwargs, True
        if changed:
            self.recompile()


class TraceCodeGen(_PyTreeCodeGen):
    """Generate a function with the original's signature and nested results, which starts with ``self.enter``."""

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        """Unpack the inputs into the graph's placeholders and hand them to :meth:`TraceModule.enter`."""
        names = [variable.split(":")[0].split("#")[0].strip() for variable in free_vars]
        bindings = super().gen_var_bindings(fn_args, free_vars, expanded_def)
        return f"{bindings}\n    self.enter({', '.join(names)})"


def _check_fixed(node: fx.Node, value: Any) -> None:
    fixed = node.meta[FIXED]
    if value is not fixed and (type(value) is not type(fixed) or value != fixed):
        raise ValueError(
            f"input {node.name} was captured as {fixed!r}, which is built into the graph; found {value!r}: "
            "capture the model again with this value"
        )


def _check_tensor(node: fx.Node, spec: TensorSpec, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"input {node.name} must be a tensor as it was at capture ({spec}); found {type(value).__name__}"
        )
    if value.dim() != len(spec.shape):
        raise ValueError(f"input {node.name} must have {len(spec.shape)} dimensions as at capture; found {value.dim()}")
    for dimension, (size, captured, dynamic) in enumerate(zip(value.shape, spec.shape, spec.dynamic, strict=True)):
        if not dynamic and size != captured:
            raise ValueError(
                f"input {node.name} was captured with size {captured} in dimension {dimension}, which is built into "
                f"the graph; found {size}: capture the model again with this dimension named in `dynamic`, "
                "or with inputs of this size"
            )


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument position of an operator's schema."""

    name: str
    position: int
    default: Any
    has_default: bool
    keyword_only: bool
    by_position: bool = False
    """Whether a call can give it by its position alone, as the inputs of ONNX operators."""


@lru_cache(maxsize=4096)
def _schema(target: Any) -> dict[str, Argument]:
    arguments = target._schema.arguments
    return {
        a.name: Argument(
            a.name,
            i,
            a.default_value if a.has_default_value() else None,
            a.has_default_value(),
            a.kwarg_only,
            getattr(a, "by_position", False),
        )
        for i, a in enumerate(arguments)
    }


class Call:
    """Read and edit one operator call by the names of its schema, never by position."""

    __slots__ = ("node",)

    def __init__(self, node: fx.Node) -> None:
        """View ``node``, which must call an ATen (or other schema-bearing) operator."""
        self.node = node

    @property
    def name(self) -> str:
        """The operator as ``namespace.name.overload``."""
        return str(self.node.target)

    def has(self, name: str) -> bool:
        """Say whether the operator's schema has an argument of this name."""
        return name in _schema(self.node.target)

    def key(self, name: str) -> int | str:
        """Return where the argument stands in this call: its position, or its name if it is given (or left) by name."""
        argument = _schema(self.node.target)[name]
        return argument.position if not argument.keyword_only and argument.position < len(self.node.args) else name

    def __getitem__(self, name: str) -> Any:
        argument = _schema(self.node.target)[name]
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        if not argument.keyword_only and argument.position < len(self.node.args):
            return self.node.args[argument.position]
        return argument.default

    def __setitem__(self, name: str, value: Any) -> None:
        argument = _schema(self.node.target)[name]
        if not argument.keyword_only and argument.position < len(self.node.args):
            self.node.update_arg(argument.position, value)
        elif argument.by_position:
            missing = [None] * (argument.position - len(self.node.args))
            self.node.args = (*self.node.args, *missing, value)
        else:
            self.node.update_kwarg(name, value)

    def leave_out(self, name: str) -> None:
        """Take an argument out of the call that it may lack."""
        argument = _schema(self.node.target)[name]
        if name in self.node.kwargs:
            self.node.kwargs = {key: value for key, value in self.node.kwargs.items() if key != name}
        elif argument.position == len(self.node.args) - 1:
            args = self.node.args[:-1]
            while argument.by_position and args and args[-1] is None:
                args = args[:-1]
            self.node.args = args
        elif argument.position < len(self.node.args):
            self.node.update_arg(argument.position, argument.default)

    def spec(self, name: str) -> TensorSpec:
        """Return the type of a tensor argument."""
        return tensor_spec(self[name])

    @property
    def out(self) -> TensorSpec:
        """The type of the result, for operators that return one tensor."""
        return tensor_spec(self.node)


def spec_of(node: fx.Node) -> Spec:
    """Return what ``node`` yields."""
    return node.meta.get(SPEC)


def tensor_spec(node: Any) -> TensorSpec:
    """Return the type of a node that yields one tensor."""
    spec = node.meta.get(SPEC) if isinstance(node, fx.Node) else None
    if not isinstance(spec, TensorSpec):
        raise TypeError(f"{node} does not yield a tensor but {spec}")
    return spec


def hint(value: Any) -> int:
    """Return the integer behind a size: itself, or the example value of a symbolic one."""
    if isinstance(value, fx.Node):
        found = value.meta.get(SPEC)
        if isinstance(found, bool) or not isinstance(found, int):
            raise TypeError(f"{value} does not yield an integer but {found}")
        return found
    return operator.index(value)


@dataclass
class Graph:
    """One model in one dialect.

    ``module`` holds the operators as nodes and the tensors under their original fully qualified names (``get_attr``
    targets). ``example_inputs`` is ``(args, kwargs)``, as the model was called. ``aliases`` maps every further name
    of a shared tensor to the name the graph uses. ``notes`` are plain sentences about the capture, for the report.
    ``sources`` says of each tensor that a pass made what it stands for in the input model, so that plans can speak of
    the input model's tensors; a tensor that is not in it is the input model's own. ``weights`` reads the values of
    tensors that are not in memory: those are on the meta device, and the graph is ``hollow``.
    """

    module: TraceModule
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sources: dict[str, Sources] = field(default_factory=dict)
    weights: Weights | None = None

    @property
    def hollow(self) -> list[str]:
        """The names of the tensors that the graph reads and whose values are not in memory; such a graph cannot run."""
        return [name for name, tensor in self.tensors().items() if tensor.is_meta]

    @property
    def transient(self) -> frozenset[str]:
        """The names of the buffers that no state dict holds."""
        return frozenset(
            f"{path}.{name}".removeprefix(".")
            for path, part in self.module.named_modules()
            for name in part._non_persistent_buffers_set
        )

    @property
    def nodes(self) -> fx.graph._node_list:
        """The nodes, in execution order."""
        return self.module.graph.nodes

    def clone(self) -> Graph:
        """Copy the structure; the tensors are shared, so never edit one in place."""
        module = self.module.replica()
        aliases, notes, sources = dict(self.aliases), list(self.notes), dict(self.sources)
        return Graph(module, self.example_inputs, aliases, notes, sources, self.weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the graph reads, by the name the graph uses, in order of first use."""
        found: dict[str, torch.Tensor] = {}
        for node in self.nodes:
            if node.op == "get_attr" and node.target not in found:
                value = get_attribute(self.module, node.target)
                if isinstance(value, torch.Tensor):
                    found[node.target] = value
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of that name."""
        value = get_attribute(self.module, name)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is not a tensor but {type(value).__name__}")
        return value

    def value(self, name: str) -> torch.Tensor:
        """Return the tensor of that name with its values, read from the checkpoint where they are not in memory.

        Raises:
            PipelineError: they are not there either.
        """
        tensor = self.tensor(name)
        if not tensor.is_meta:
            return tensor
        if self.weights is None or name not in self.weights:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise PipelineError(
                f"the {kind} {name} has no values, in memory or in a checkpoint: "
                + (
                    "give optimize(…, checkpoint=PATH) the files that hold it, or load it into the model"
                    if kind == "parameter"
                    else "build the model within graphopt.without_weights(), which makes buffers as usual"
                )
            )
        return self.weights[name]

    def stands_for(self, name: str, dim: int) -> tuple[Source, ...]:
        """Return what the positions of a tensor's dimension stand for in the input model."""
        if name in self.sources:
            return self.sources[name].get(dim, ())
        shape = tuple(self.tensor(name).shape)
        return (Source(name, shape, dim, np.arange(shape[dim], dtype=np.int64)),)

    def layer_of(self, name: str) -> str:
        """Return the layer that reads a tensor first, where the tensor's own name does not say it; "" where it does.

        Exporters to ONNX give weights that they folded or transposed a number for a name.
        """
        for node in self.module.graph.find_nodes(op="get_attr", target=name):
            for reader in node.users:
                owner = str(reader.meta.get(OWNER) or "")
                return "" if "." in name or name.startswith(owner) else owner
        return ""

    def names(self, canonical: str) -> list[str]:
        """Return every name of one tensor: the graph's first, then its aliases."""
        return [canonical, *(alias for alias, name in self.aliases.items() if name == canonical)]

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` in place of the tensor of that name, and of all its aliases."""
        for each in self.names(name):
            set_tensor(self.module, each, tensor)

    def text(self) -> str:
        """Print the graph, a line a node, with types: the form golden tests and dumps use."""
        return "\n".join(_lines(self.module.graph))

    @property
    def training(self) -> bool:
        """The mode the original was in when it was captured; the graph itself is always captured in evaluation mode."""
        return bool(self.module.meta.get("training", False))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)


def get_attribute(module: nn.Module, name: str) -> Any:
    """Follow a dotted name from ``module``."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def find_attribute(module: nn.Module, name: str) -> Any:
    """Follow a dotted name from ``module``; returns None where it leads nowhere."""
    try:
        return get_attribute(module, name)
    except AttributeError:
        return None


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register ``tensor`` under a dotted name, as a parameter or a buffer as its type says; makes missing modules."""
    *path, last = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if isinstance(tensor, nn.Parameter):
        module._buffers.pop(last, None)
        module.register_parameter(last, tensor)
    else:
        persistent = last not in module._non_persistent_buffers_set
        module._parameters.pop(last, None)
        module.__dict__.pop(last, None)
        module.register_buffer(last, tensor, persistent=persistent)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause the collection of garbage, around or as a decorator of what makes many objects and no garbage.

    Copying, typing and rewriting make tens of thousands of objects; looking among all objects of a process for garbage
    in between would take longer than the work.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _replicate(source: nn.Module, target: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    # Writes the dictionaries that register_* would, without their checks: a large model has a thousand modules.
    def replaced(found: dict[str, Any]) -> dict[str, Any]:
        if tensor is None:
            return dict(found)
        return {name: None if value is None else tensor(value) for name, value in found.items()}

    of, to = vars(source), vars(target)
    to["_parameters"] = replaced(of["_parameters"])
    to["_buffers"] = replaced(of["_buffers"])
    to["_non_persistent_buffers_set"] = set(of["_non_persistent_buffers_set"])
    to["training"] = of["training"]
    for name, child in of["_modules"].items():
        if child is None or isinstance(child, fx.GraphModule):  # the body of a higher-order operator
            to["_modules"][name] = child
        else:
            part = to["_modules"][name] = nn.Module()
            _replicate(child, part, tensor)


def _lines(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op == "output":
            yield f"return {_format(node.args[0])}"
            continue
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function":
            target = str(node.target) if hasattr(node.target, "_schema") else target
            rest = [_format(a) for a in node.args] + [f"{k}={_format(v)}" for k, v in node.kwargs.items()]
            target = f"{target}({', '.join(rest)})"
        elif node.op == "get_attr":
            target = f"@{target}"
        else:
            target = f"{node.op} {target}"
        yield f"%{node.name}: {_format_spec(spec_of(node))} = {target}"


def _format(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_format(v)}" for k, v in value.items()) + "}"
    return str(value)


def _format_spec(spec: Spec) -> str:
    if isinstance(spec, tuple):
        return "(" + ", ".join(_format_spec(s) for s in spec) + ")"
    return str(spec) if isinstance(spec, TensorSpec) else type(spec).__name__ if spec is not None else "None"
