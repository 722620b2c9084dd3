"""Remember what was kept of the input model's tensors, so that it can be looked at, saved, composed and applied again.

What may live here: the plan, its file, and what it remembers of the run that made it. A plan speaks of tensors by their
names in the *input* model; it knows neither graphs nor groups once it is made.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar, overload

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from graphopt.axes.algebra import Atom, Indices, kept_positions, leaves
from graphopt.axes.infer import Typing
from graphopt.checkpoint import Checkpoint, open_file, spelled
from graphopt.errors import PipelineError
from graphopt.graph import Source

__all__ = ["Origin", "Plan"]

FORMAT: Final = "graphopt-plan"
VERSION: Final = "1"

Kept = dict[str, dict[int, Indices]]
AnyModule = TypeVar("AnyModule", bound=nn.Module)
Shrink = Callable[[nn.Module, Kept, Any, nn.Module | None], nn.Module]
"""Makes the smaller copy of a module, from what is kept of its tensors, example inputs, and a reference."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Remember the run that made a plan; nothing of it is saved, and neither model is kept alive by it.

    Attributes:
        inputs: What the run's promises were checked on, ``(args, kwargs)``.
        result: The smaller model that the run gave.
        stamps: Where each tensor of the input model was in memory, and how often it had been written to: a module with
            the same stamps is the input model as it was.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    result: weakref.ref[nn.Module]
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], result: nn.Module) -> Origin:
        """Remember a run on ``model``."""
        return cls(inputs, weakref.ref(result), _stamps(model) if isinstance(model, nn.Module) else {})

    def result_for(self, module: nn.Module) -> nn.Module | None:
        """Return the smaller model, if it still exists and ``module`` is the input model, not written to since."""
        result = self.result()
        if result is None or not self.stamps or _stamps(module) != self.stamps:
            return None
        devices = {t.device for part in (module, result) for t in part.state_dict().values()}
        return result if len(devices) <= 1 else None


@dataclass(frozen=True, eq=False)
class Plan:
    """Which indices of the input model's tensors are left.

    Attributes:
        keep: ``{name of the input model's tensor: {dimension: kept indices}}``, int64, sorted; tensors and dimensions
            that lost nothing are not in it. A shared tensor stands under each of its names.
        shapes: The shapes that these tensors had in the input model.
        aliases: Further names of shared tensors among them, with the name that stands for each.
        transient: Those among them that no state dict and no checkpoint holds: the model makes them when it is built.
        origin: The run that made it; None for a plan that was loaded, composed or copied to another process.
    """

    keep: Kept = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    transient: frozenset[str] = frozenset()
    origin: Origin | None = field(default=None, repr=False)

    shrink: ClassVar[Shrink]
    """How modules are cut. It takes capturing and rewriting, which stand above plans: ``graphopt.shrink`` sets it."""

    @classmethod
    def of(cls, typing: Typing, keep: Mapping[Atom, Indices]) -> Plan:
        """Translate the kept indices of groups of ``typing`` into those of the input model's tensor dimensions.

        A tensor that a pass made speaks for those it was made of (:attr:`~graphopt.graph.Graph.sources`). Of a tensor
        that several others stand for, what any of them keeps is kept.
        """
        graph = typing.graph
        found = cls.direct(typing, keep)
        if not graph.sources:
            return found
        kept: dict[tuple[str, int], Indices] = {}
        left: dict[tuple[str, int], Indices] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, axes in typing.tensors.items():
            for dim in range(len(axes)):
                for source in graph.stands_for(name, dim):
                    place = (source.tensor, source.dim)
                    shapes[source.tensor] = source.shape
                    everything = np.arange(source.shape[source.dim], dtype=np.int64)
                    mine = source.positions[found.keep.get(name, {}).get(dim, slice(None))]
                    kept[place] = np.union1d(kept.get(place, everything[:0]), mine[mine >= 0])
                    left[place] = np.setdiff1d(left.get(place, everything), source.positions)
        result: Kept = {}
        for (tensor, dim), indices in kept.items():
            indices = np.union1d(indices, left[tensor, dim])
            if len(indices) < shapes[tensor][dim]:
                result.setdefault(tensor, {})[dim] = indices
        aliases = {alias: name for name in result for alias in graph.names(name)[1:]}
        result |= {alias: result[name] for alias, name in aliases.items()}
        transient = frozenset(name for name in graph.transient if name in result)
        return cls(result, {name: shapes[aliases.get(name, name)] for name in result}, aliases, transient)

    @classmethod
    def direct(cls, typing: Typing, keep: Mapping[Atom, Indices]) -> Plan:
        """Translate the kept indices of groups of ``typing`` into those of the typed graph's own tensors."""
        kept: Kept = {}
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        for tensor, axes in typing.tensors.items():
            dims = {
                dim: kept_positions(axis, keep)
                for dim, axis in enumerate(axes)
                if any(leaf in keep and len(keep[leaf]) < leaf.size for leaf in leaves(axis))
            }
            if dims:
                for name in typing.graph.names(tensor):
                    kept[name] = dims
                    shapes[name] = tuple(axis.size for axis in axes)
                    if name != tensor:
                        aliases[name] = tensor
        transient = frozenset(name for name in typing.graph.transient if name in kept)
        return cls(kept, shapes, aliases, transient)

    def after(self, source: Source) -> Source:
        """Return what a source is once the plan was carried out: some of its positions gone, the others closed up."""
        if source.tensor not in self.keep:
            return source
        kept = self.keep[source.tensor].get(source.dim)
        positions = source.positions
        if kept is not None:
            positions = np.where(positions < 0, -1, np.searchsorted(kept, positions))
        return replace(source, shape=self.shape_after(source.tensor), positions=positions)

    def then(self, later: Plan) -> Plan:
        """Compose with a plan for the model that this one leaves; the result speaks of this one's input model.

        Raises:
            PipelineError: ``later`` was made for other shapes.
        """
        keep = {name: dict(dims) for name, dims in self.keep.items()}
        shapes = dict(self.shapes)
        for name, dims in later.keep.items():
            if name in self.shapes and self.shape_after(name) != later.shapes[name]:
                raise PipelineError(
                    f"the plans do not follow each other: the first leaves {name} with shape {self.shape_after(name)}, "
                    f"the second was made for {later.shapes[name]}; compose plans in the order in which they were made"
                )
            shapes.setdefault(name, later.shapes[name])
            mine = keep.setdefault(name, {})
            for dim, indices in dims.items():
                mine[dim] = mine[dim][indices] if dim in mine else indices
        return Plan(keep, shapes, self.aliases | later.aliases, self.transient | later.transient)

    def shape_after(self, name: str) -> tuple[int, ...]:
        """Return the shape that the plan leaves to a tensor it names."""
        dims = self.keep[name]
        return tuple(len(dims[d]) if d in dims else n for d, n in enumerate(self.shapes[name]))

    def __len__(self) -> int:
        """Count the tensors that lose something."""
        return len(self.keep)

    def __str__(self) -> str:
        if not self.keep:
            return "nothing is removed"
        lines = (f"{name}: {list(self.shapes[name])} -> {list(self.shape_after(name))}" for name in self.keep)
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            self.shapes == other.shapes
            and self.aliases == other.aliases
            and self.transient == other.transient
            and self.keep.keys() == other.keep.keys()
            and all(_same(dims, other.keep[name]) for name, dims in self.keep.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "origin": None}  # the run stays in its process

    # -- applying --

    @overload
    def apply(
        self, target: AnyModule, example_inputs: Any = None, *, reference: nn.Module | None = None
    ) -> AnyModule: ...

    @overload
    def apply(self, target: Mapping[str, torch.Tensor], *, strict: bool = True) -> dict[str, torch.Tensor]: ...

    def apply(
        self,
        target: nn.Module | Mapping[str, torch.Tensor],
        example_inputs: Any = None,
        *,
        reference: nn.Module | None = None,
        strict: bool = True,
    ) -> nn.Module | dict[str, torch.Tensor]:
        """Return a module, in its own class, or a state dict of the input model without what the plan removes.

        Of a *state dict*, tensors that the plan does not shrink are passed through. Sliced tensors are new and
        contiguous; those that were one tensor in ``target`` are one in the result.

        Of a *module* a deep copy is returned; the module itself is not changed. Parameters and buffers are sliced,
        shared ones stay shared, and the numbers that the module and its layers keep as attributes (``out_channels``,
        ``groups``, ``num_heads``, ``head_dim``, split sizes, ...) follow, wherever the module's own code needs them to:
        the copy is run beside the pruned graph, call by call, and the number that was read last before a difference
        is set right. Numbers that are no sizes, such as an attention's scale, stay what they were. Where a fused
        attention has no argument for its scale and the class has a switch to do without it, that is used. So the
        result computes, to round-off, what the pruned graph of the module does; it is compared with it, and that with
        the module whose removed indices are masked. Parameters of the result have the names that they had; the
        state dict that the plan makes of the module's can be loaded into it.

        The *values* are those of ``reference``, where it has all of the result's parameters and buffers under their
        names, which takes along what a pass, or fine-tuning, did to them. Without one they are those of
        ``optimize(...).module`` as it is now, as long as it exists and ``target`` is the very model that was
        optimised, not written to since; otherwise they are the module's own.

        Args:
            target: the input model or another of its architecture, or a state dict of one.
            example_inputs: for a module, as for :func:`graphopt.optimize`; not needed for the plan that it returned.
            reference: for a module, the smaller model to take values from and to compare with.
            strict: for a state dict, refuse one that lacks tensors which the plan shrinks.

        Raises:
            PlanError: the module cannot be copied; the plan is another model's; or the module's code has a size written
                into it. The message says in which module and line, and which size is wanted there.
            CaptureError: the module could not be captured.
            PipelineError: a tensor of a state dict is missing (``strict``), or has another shape than in the model.
        """
        if isinstance(target, nn.Module):
            return self._applied(target, example_inputs, reference)
        if example_inputs is not None or reference is not None:
            raise PipelineError("example_inputs and reference are for modules; a state dict needs neither")
        return self._sliced_all(target, strict)

    def _applied(self, module: nn.Module, example_inputs: Any, reference: nn.Module | None) -> nn.Module:
        if self.origin is not None:
            example_inputs = self.origin.inputs if example_inputs is None else example_inputs
            reference = self.origin.result_for(module) if reference is None else reference
        return Plan.shrink(module, self.keep, example_inputs, reference)

    def _sliced_all(self, state: Mapping[str, torch.Tensor], strict: bool) -> dict[str, torch.Tensor]:
        missing = self.keep.keys() - state.keys() - self.transient
        if strict and missing:
            raise PipelineError(
                f"the state dict has no {sorted(missing)[0]} (and {len(missing) - 1} more that the plan shrinks): "
                "apply the plan to a state dict of the model it was made for, or pass strict=False for a part of one"
            )
        made: dict[tuple[object, ...], str] = {}
        result: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            if name not in self.keep:
                result[name] = tensor
                continue
            # What holds no memory, as on the meta device, is at no address.
            place = tensor.data_ptr() or id(tensor)
            twin = made.setdefault((tensor.device, place, tensor.shape, tensor.stride()), name)
            shared = twin != name and _same(self.keep[twin], self.keep[name])
            result[name] = result[twin] if shared else self._sliced(name, tensor)
        return result

    def _sliced(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._check_shape(name, tuple(tensor.shape), self.shapes[name])
        found = tensor.detach()
        for dim, indices in self.keep[name].items():
            found = found.index_select(dim, torch.from_numpy(indices).to(tensor.device))
        return found

    @staticmethod
    def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise PipelineError(
                f"{name} has shape {found}, the plan was made for {wanted}: apply it to the model it was made for"
            )

    def apply_files(self, source: str | os.PathLike[str] | Checkpoint, directory: str | os.PathLike[str]) -> list[Path]:
        """Prune a safetensors checkpoint, a block of one tensor in memory at a time, and write it to ``directory``.

        The checkpoint may hold the tensors under names with another beginning, as one of a model's trunk does.

        Args:
            source: a ``.safetensors`` file, the ``.safetensors.index.json`` of a sharded checkpoint, or a folder that
                holds one of the two.
            directory: where the shards are written under their names, with the index rewritten. Made if need be.

        Returns:
            The files written, the index last.

        Raises:
            PipelineError: the source is no such checkpoint, or its tensors do not fit the plan; nothing is written.
        """
        checkpoint = Checkpoint.open(source)
        spelling = spelled(self.keep, checkpoint)
        # A file keeps one name of a shared tensor; that one is enough.
        present = {self.aliases.get(name, name) for name in spelling}
        wanted = (name for name in self.keep if name not in self.transient)
        absent = [name for name in wanted if self.aliases.get(name, name) not in present]
        if absent:
            raise PipelineError(
                f"the checkpoint {source} has no {absent[0]}, which the plan shrinks; nothing was written"
            )
        for name, held in spelling.items():
            self._check_shape(held, checkpoint.shape(held), self.shapes[name])
        cuts = {held: self.keep[name] for name, held in spelling.items()}
        return checkpoint.write_cut(Path(directory), cuts)

    # -- the file --

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a safetensors file, in one step."""
        arrays = {f"{dim}:{name}": indices for name, dims in self.keep.items() for dim, indices in dims.items()}
        facts = {"shapes": json.dumps(self.shapes), "aliases": json.dumps(self.aliases)}
        if self.transient:
            facts["transient"] = json.dumps(sorted(self.transient))
        metadata = {"format": FORMAT, "version": VERSION, **facts}
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            scratch.write_bytes(safetensors.numpy.save(arrays, metadata))
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote; nothing is unpickled.

        Raises:
            PipelineError: the file is no plan, or one that contradicts itself.
        """
        with open_file(Path(path)) as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise PipelineError(
                f"{path} is a safetensors file, but no plan of version {VERSION}: its format is "
                f"{metadata.get('format')!r}, version {metadata.get('version')!r}; save the plan again with Plan.save"
            )
        try:
            shapes = {str(n): tuple(int(s) for s in shape) for n, shape in json.loads(metadata["shapes"]).items()}
            keep: Kept = {name: {} for name in shapes}
            for key, indices in arrays.items():
                dim, _, name = key.partition(":")
                keep[name][_dimension(dim)] = _checked(indices, shapes[name][_dimension(dim)])
            aliases = {str(further): str(name) for further, name in json.loads(metadata["aliases"]).items()}
            transient = frozenset(map(str, json.loads(metadata.get("transient", "[]"))))
            if not transient <= keep.keys():
                raise ValueError("a tensor that no checkpoint holds must be one that the plan shrinks")
            if not all(further in keep and _same(keep[further], keep[name]) for further, name in aliases.items()):
                raise ValueError("a shared tensor must keep the same indices under each of its names")
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise PipelineError(
                f"the plan in {path} contradicts itself ({error}); save it again with Plan.save"
            ) from error
        return cls(keep, shapes, aliases, transient)


def _stamps(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a module is and how often it was written to."""
    tensors = model.state_dict(keep_vars=True).items()
    return {name: (t.data_ptr(), t._version) for name, t in tensors if isinstance(t, torch.Tensor) and t.data_ptr()}


def _dimension(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is no dimension")
    return int(text)


def _checked(row: torch.Tensor, size: int) -> Indices:
    if row.dim() != 1 or row.dtype != torch.int64 or not len(row):
        raise ValueError("kept indices must be a row of int64")
    indices: Indices = row.numpy()
    if indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any():
        raise ValueError("kept indices must be sorted, unique and in range")
    return indices


def _same(a: Mapping[int, Indices], b: Mapping[int, Indices]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(indices, b[d]) for d, indices in a.items())
