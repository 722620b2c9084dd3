"""Read safetensors checkpoints piece by piece, so that no more of one is in memory than is being looked at.

What may live here: finding a checkpoint's files, reading tensors and runs of rows, the names under which a checkpoint
holds a graph's tensors, and writing a checkpoint anew without some indices. Nothing here knows graphs or groups.

A file is opened for every read and closed after it: what a reader maps into memory counts as the process's own for as
long as it stays mapped.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor

from graphopt.errors import PipelineError, nearest_name

__all__ = ["Checkpoint", "Weights", "open_file", "spelled"]

INDEX: Final = ".safetensors.index.json"
USUAL: Final = "model.safetensors"
BLOCK: Final = 1 << 25
"""How many bytes of a tensor are read at a time."""

Indices = npt.NDArray[np.int64]
Cuts = Mapping[str, Mapping[int, Indices]]
"""Kept indices by tensor and dimension."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor stands, and what it is; ``dtype`` is the format's own word, such as ``BF16``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor that a checkpoint holds in pieces: entry e of its first dimension is ``rows[e]``, one after another.

    Libraries write every expert of a mixture by itself, and compute with all of them in one tensor.
    """

    rows: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]


EXPERT: Final = re.compile(r"(?P<layer>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>.+)")
STACKS: Final = (
    ("gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
    ("gate_up_proj", ("w1.weight", "w3.weight")),
    ("down_proj", ("down_proj.weight",)),
    ("down_proj", ("w2.weight",)),
)
"""The tensors that stand for all experts of a layer, and the parts of which a single expert's are written."""
RENAMED: Final = ((".mlp.", ".block_sparse_moe."),)
"""Parts of names that a library writes in another way than its modules are called."""


@dataclass(frozen=True)
class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors checkpoint by name, each read when it is asked for and held by the caller alone.

    A tensor that is written in pieces (:class:`Stack`) can be read, looked up and cut under its own name, too.

    Attributes:
        shards: The files, in order.
        index: The file that says which shard holds what; None where there is one file.
        entries: What is known of each tensor without reading it.
        stacks: Tensors that are written in pieces, which are entries.
    """

    shards: tuple[Path, ...]
    index: Path | None
    entries: Mapping[str, Entry] = field(repr=False)
    stacks: Mapping[str, Stack] = field(repr=False, default_factory=dict)

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
        """Read the headers of a checkpoint.

        Args:
            source: a ``.safetensors`` file, the ``.safetensors.index.json`` of a sharded checkpoint, or a folder that
                holds one of the two. One that is open already is returned.

        Raises:
            PipelineError: it is no such checkpoint.
        """
        if isinstance(source, Checkpoint):
            return source
        shards, index = _shards(Path(source))
        entries: dict[str, Entry] = {}
        for shard in shards:
            with open_file(shard) as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    entries[name] = Entry(shard, part.get_dtype(), tuple(part.get_shape()))
        return cls(tuple(shards), index, entries, _stacks(entries))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, written whole or in pieces."""
        return self.stacks[name].shape if name in self.stacks else self.entries[name].shape

    def __getitem__(self, name: str) -> Tensor:
        if name in self.stacks:
            return torch.cat(list(self.blocks(name)))
        with open_file(self.entries[name].file) as file:
            found: Tensor = file.get_tensor(name).clone()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.stacks

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some positions of the first dimension."""
        with open_file(self.entries[name].file) as file:
            found: Tensor = file.get_slice(name)[start:stop].clone()
        return found

    def blocks(self, name: str, cuts: Mapping[int, Indices] | None = None) -> Iterator[Tensor]:
        """Read a tensor a block of rows at a time, of each only what ``cuts`` keeps; one of no dimensions whole."""
        shape, cuts = self.shape(name), cuts or {}
        if name in self.stacks:
            for parts in self._cut_rows(self.stacks[name], cuts):
                pieces = [block for part, own in parts.items() for block in self.blocks(part, own)]
                yield torch.cat(pieces).unsqueeze(0)
            return
        if not shape:
            yield self[name]
            return
        step = max(1, BLOCK // max(1, 8 * prod(shape[1:])))
        others = {dim: torch.from_numpy(kept) for dim, kept in cuts.items() if dim > 0}
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            kept = None if 0 not in cuts else _between(cuts[0], start, stop)
            if kept is not None and not len(kept):
                continue
            found = self.rows(name, start, stop)
            if kept is not None:
                found = found.index_select(0, torch.from_numpy(kept - start))
            for dim, indices in others.items():
                found = found.index_select(dim, indices)
            yield found

    def _cut_rows(self, stack: Stack, cuts: Mapping[int, Indices]) -> Iterator[dict[str, dict[int, Indices]]]:
        """Yield, for each entry that stays, what stays of its pieces."""
        for number in cuts.get(0, range(stack.shape[0])):
            start = 0
            parts: dict[str, dict[int, Indices]] = {}
            for part in stack.rows[number]:
                stop = start + self.entries[part].shape[0]
                own = {dim - 1: kept for dim, kept in cuts.items() if dim > 1}
                parts[part] = own | ({0: _between(cuts[1], start, stop) - start} if 1 in cuts else {})
                start = stop
            yield parts

    def _in_pieces(self, cuts: Cuts) -> tuple[dict[str, Mapping[int, Indices]], dict[str, str | None]]:
        """Say what cuts of stacks mean for their pieces: what stays of each, and what it is called then; None if gone.

        Experts are numbered anew.
        """
        found = {name: dims for name, dims in cuts.items() if name not in self.stacks}
        names: dict[str, str | None] = {}
        for name, dims in cuts.items():
            if name not in self.stacks:
                continue
            for parts in self._cut_rows(self.stacks[name], dims):
                found |= parts
            layer = name.rpartition(".")[0]
            for held in self.entries if 0 in dims else ():
                match = EXPERT.fullmatch(held)
                if match is not None and match["layer"] == layer:
                    place = np.flatnonzero(dims[0] == int(match["number"]))
                    names[held] = f"{layer}.{place[0]}.{match['leaf']}" if len(place) else None
        return found, names

    def write_cut(self, directory: Path, cuts: Cuts) -> list[Path]:
        """Write the checkpoint to a folder, its tensors without what ``cuts`` removes; return the files, index last.

        Files keep their names, their metadata and their order; none is there unless all are. Pieces of entries that go
        are not written, and the others numbered anew.
        """
        cuts, names = self._in_pieces(cuts)
        directory.mkdir(parents=True, exist_ok=True)
        total = 0
        with tempfile.TemporaryDirectory(dir=directory, prefix=".graphopt-") as scratch:
            stage = Path(scratch)
            for shard in self.shards:
                total += self._write_shard(shard, stage / shard.name, cuts, names)
            files = [shard.name for shard in self.shards]
            if self.index is not None:
                content = json.loads(self.index.read_text())
                content["metadata"] = {**content.get("metadata", {}), "total_size": total}
                places = {names.get(name, name): file for name, file in content["weight_map"].items()}
                content["weight_map"] = {name: file for name, file in places.items() if name is not None}
                (stage / self.index.name).write_text(json.dumps(content, indent=2) + "\n")
                files.append(self.index.name)
            for file in files:
                (stage / file).replace(directory / file)
        return [directory / file for file in files]

    def _write_shard(self, source: Path, target: Path, cuts: Cuts, names: Mapping[str, str | None]) -> int:
        """Write one file of the format: the header's length, the header, the tensors; return the tensors' bytes.

        Elements of many bytes come first, so that every tensor is aligned to its own.
        """
        with open_file(source) as file:
            metadata = file.metadata()
        held = [n for n, entry in self.entries.items() if entry.file == source and names.get(n, n) is not None]
        sizes = {name: self._item_bytes(name) for name in held}
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        end = 0
        held.sort(key=lambda name: (-sizes[name], name))
        for name in held:
            shape = [len(cuts.get(name, {}).get(dim, range(size))) for dim, size in enumerate(self.entries[name].shape)]
            start, end = end, end + prod(shape) * sizes[name]
            header[names.get(name) or name] = {
                "dtype": self.entries[name].dtype,
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in held:
                for block in self.blocks(name, cuts.get(name)):
                    out.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written = out.tell() - 8 - len(text)
        if written != end:
            raise PipelineError(f"{source} changed while it was read: {written} bytes of {end}; nothing was written")
        return end

    def _item_bytes(self, name: str) -> int:
        shape = self.entries[name].shape
        sample = self.rows(name, 0, 0) if shape else self[name]
        return sample.element_size()


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """The values of a graph's tensors that are not in memory: read from a checkpoint when they are asked for.

    Attributes:
        checkpoint: Where they stand.
        names: Under which name the checkpoint holds each, by the graph's name.
        dtypes: The graph's type of each.
        cuts: What passes have kept of each since.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    cuts: Cuts = field(default_factory=dict)

    @classmethod
    def bind(
        cls, checkpoint: Checkpoint, tensors: Mapping[str, tuple[Tensor, Sequence[str]]], spare: Collection[str] = ()
    ) -> Weights:
        """Find the tensors of a graph in a checkpoint.

        Args:
            checkpoint: the checkpoint.
            tensors: each tensor with all its names, by the graph's name for it.
            spare: the graph's names of those that need not be there.

        Raises:
            PipelineError: the checkpoint does not hold a tensor under any of its names, or in another shape.
        """
        spelling = spelled([each for _, names in tensors.values() for each in names], checkpoint)
        found: dict[str, str] = {}
        for name, (tensor, names) in tensors.items():
            here = next((spelling[each] for each in names if each in spelling), None)
            if here is None and name in spare:
                continue
            if here is None:
                nearest = nearest_name(name, checkpoint)
                hint = f"; the nearest name it has is {nearest}" if nearest else ""
                raise PipelineError(
                    f"the checkpoint {checkpoint.shards[0].parent} has no {name}, which the model reads{hint}: give "
                    "the checkpoint of this model, saved with the names and the layout that its class has"
                )
            shape = checkpoint.shape(here)
            if shape != tuple(tensor.shape):
                raise PipelineError(
                    f"{here} has shape {shape} in the checkpoint, and {tuple(tensor.shape)} in the model: give the "
                    "checkpoint of this model"
                )
            found[name] = here
        return cls(checkpoint, found, {name: tensors[name][0].dtype for name in found})

    def __getitem__(self, name: str) -> Tensor:
        blocks = list(self.blocks(name))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Read a tensor a block of rows at a time, in the graph's type."""
        held, cuts = self.names[name], self.cuts.get(name)
        if not prod(self.checkpoint.shape(held)):
            yield self.checkpoint[held].to(self.dtypes[name])
            return
        for block in self.checkpoint.blocks(held, cuts):
            yield block.to(self.dtypes[name])

    def sliced(self, cuts: Cuts) -> Weights:
        """Return the same weights without what ``cuts``, which speaks of them as they are now, removes."""
        merged = {name: dict(dims) for name, dims in self.cuts.items()}
        for name, dims in cuts.items():
            mine = merged.setdefault(name, {})
            for dim, kept in dims.items():
                mine[dim] = mine[dim][kept] if dim in mine else kept
        return replace(self, cuts=merged)


def spelled(names: Iterable[str], held: Collection[str]) -> dict[str, str]:
    """Return, for each name that a checkpoint holds, how it writes it.

    A checkpoint of a model's trunk leaves out the first part of the names (``model.``), one of a larger model puts
    something in front of all of them. Of such changes the one that finds most names is made; none where none is needed.
    Parts that are always written in another way are looked for in both.
    """
    wanted = list(dict.fromkeys(names))
    changes: dict[tuple[str, str], None] = {("", ""): None}
    if any(name not in held for name in wanted):
        for name in wanted:
            if "." in name:
                changes[name[: name.index(".") + 1], ""] = None
        longest = max(wanted, key=len)
        for name in held:
            if name.endswith(f".{longest}"):
                changes["", name.removesuffix(longest)] = None
    best: dict[str, str] = {}
    for dropped, added in changes:
        written = {name: added + name.removeprefix(dropped) for name in wanted}
        for called, spelling in RENAMED:
            other = {name: text.replace(called, spelling) for name, text in written.items() if text not in held}
            written |= {name: text for name, text in other.items() if text in held}
        found = {name: text for name, text in written.items() if text in held}
        if len(found) > len(best):
            best = found
    return best


def _stacks(entries: Mapping[str, Entry]) -> dict[str, Stack]:
    """Find the tensors that are written expert by expert."""
    layers: dict[str, dict[str, list[str]]] = {}
    for name in sorted(entries, key=lambda name: (len(name), name)):
        match = EXPERT.fullmatch(name)
        if match is not None:
            layers.setdefault(match["layer"], {}).setdefault(match["leaf"], []).append(name)
    found: dict[str, Stack] = {}
    for layer, leaves in layers.items():
        for stacked, parts in STACKS:
            if f"{layer}.{stacked}" in entries or not all(part in leaves for part in parts):
                continue
            count = len(leaves[parts[0]])
            rows = tuple(tuple(f"{layer}.{number}.{part}" for part in parts) for number in range(count))
            shapes = {tuple(entries[part].shape for part in row if part in entries) for row in rows}
            if len(shapes) == 1 and len(shape := shapes.pop()) == len(parts) and all(len(s) == 2 for s in shape):
                found[f"{layer}.{stacked}"] = Stack(rows, (count, sum(s[0] for s in shape), shape[0][1]))
    return found


def open_file(path: Path) -> Any:
    """Open a safetensors file for reading.

    Raises:
        PipelineError: it is none, or cannot be read.
    """
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise PipelineError(f"cannot read {path} as a safetensors file: {error}") from error


def _between(kept: Indices, start: int, stop: int) -> Indices:
    low, high = np.searchsorted(kept, [start, stop])
    return kept[low:high]


def _shards(source: Path) -> tuple[list[Path], Path | None]:
    """Return the shards of a checkpoint, and its index where it has one; only files beside the index count."""
    if source.is_dir():
        found = sorted(source.glob(f"*{INDEX}")) or sorted(source.glob(USUAL)) or sorted(source.glob("*.safetensors"))
        if len(found) != 1:
            raise PipelineError(
                f"{source} holds {len(found)} checkpoints; name the .safetensors file or the {INDEX} to prune"
            )
        source = found[0]
    if not source.name.endswith(INDEX):
        return [source], None
    try:
        names = sorted({str(name) for name in json.loads(source.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PipelineError(f"{source} is no index of a sharded checkpoint: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise PipelineError(f"the index {source} points outside its folder: {name!r}")
    return [source.parent / name for name in names], source
