"""Prune ONNX files with graphopt and with onnxsim, the same files in the same run, and compare what comes out.

    python -m benchmarks.onnx_pruning [NAME …] [--exporter E …] [--sparsity F] [--json FILE]

onnxsim removes a share of the channels of every chain that it recognises (``structured``), attention heads besides
(``heads``), and both after it simplified the file (``simplified``). graphopt is given the multiply-adds that the most
far-reaching sound file of these has left (``same``), and half of the original's (``half``).

Of each file the table says whether it loads and runs, on two batch sizes; the share of the multiply-adds and of the
parameters that is left; and masked equality: the largest difference of its outputs, relative to their largest value,
to those of the original in which every parameter of a removed index is zero. Which indices were removed is read off
the files alike for all: a cut initializer's entries are found again in the initializer of the same name before.
"not derivable" says why that was not possible. A LayerNormalization over removed indices is replaced in the original
by one over the kept ones; other means over removed indices are not, so a file with such a one may read as different.

Multiply-adds are counted on the shapes that tensors have when ONNX Runtime runs the file, by one formula for all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.onnx_lossless import Feeds, difference
from tests.zoo import ZOO
from tests.zoo.onnx_files import EXPORTERS, ExportError, exported, feeds

Row = dict[str, Any]
Array = np.ndarray[Any, Any]
Keep = dict[str, dict[int, Array]]
"""Kept indices by initializer and dimension, of those that were cut."""

BATCHES = (2, 3)
VOTES = 15
PEER = ("onnxsim structured", "onnxsim heads", "onnxsim simplified")
OURS = ("graphopt same", "graphopt half")
EXACT = 1e-4
"""The largest difference to the masked original that counts as equal, in float32."""


class NotDerivableError(Exception):
    """Say why a file does not show which indices were removed."""


# --- counting


def macs(model: Any, inputs: Feeds) -> int:
    """Count the multiply-adds of convolutions and matrix products on the shapes that a run shows."""
    shapes = _shapes(model, inputs)
    return sum(_macs_of(node, shapes) for node in model.graph.node)


def _macs_of(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention"):
        return 0
    first, second = (shapes[name] for name in node.input[:2])
    result = shapes[node.output[0]]
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "MatMul":
        return math.prod(result) * first[-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(result) * first[0 if transposed else 1]
    if node.op_type == "Attention":  # scores and their product with the values, each of query by key by width
        return math.prod(first) * second[-2] + math.prod(result) * second[-2]
    letters = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for term, name in zip(letters.split("->")[0].split(","), node.input, strict=True):
        sizes |= dict(zip(term, shapes[name], strict=True))
    return math.prod(sizes.values())


def _shapes(model: Any, inputs: Feeds) -> dict[str, tuple[int, ...]]:
    import onnx

    wanted = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention")
    ]
    initializers = {each.name: tuple(each.dims) for each in model.graph.initializer}
    names = {name for node in wanted for name in [*node.input[:2], node.output[0]]} - set(initializers)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    fed = {value.name for value in watched.graph.input}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - known - fed))
    run = _session(watched)
    outputs = [output.name for output in run.get_outputs()]
    arrays = run.run(outputs, {value.name: inputs[value.name] for value in run.get_inputs()})
    shapes = {name: array.shape for name, array in zip(outputs, arrays, strict=True)}
    return initializers | shapes | {name: array.shape for name, array in inputs.items()}


def _session(model: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def parameters(model: Any) -> int:
    """Count the entries of floating-point initializers, and of constants in nodes."""
    return sum(array.size for array in _arrays(model).values() if array.dtype.kind == "f")


def _arrays(model: Any) -> dict[str, Array]:
    from onnx import numpy_helper

    found = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


# --- the masked original


def removed(before: Any, after: Any) -> Keep:
    """Find which indices of each initializer are left, by the values of those of the same name.

    Raises:
        NotDerivableError: An initializer is not there under its name, or its values do not tell.
    """
    old, new = _arrays(before), _arrays(after)
    keep: Keep = {}
    for name, array in sorted(new.items(), key=lambda item: -item[1].ndim):
        if array.dtype.kind != "f" or array.size <= 1:
            continue
        if name not in old or old[name].ndim != array.ndim:
            raise NotDerivableError(f"no initializer {name} of {array.ndim} dimensions before")
        if old[name].shape != array.shape:
            # A bias may hold a value twice; it then goes as a weight does.
            as_others = [kept for dims in keep.values() for kept in dims.values() if array.shape == kept.shape]
            fits = (kept for kept in as_others if array.ndim == 1 and _selects(old[name], kept, array))
            first = next(fits, None)
            keep[name] = _kept(name, old[name], array) if first is None else {0: first}
    return keep


def _selects(old: Array, kept: Array, new: Array) -> bool:
    return int(kept.max()) < len(old) and np.array_equal(old[kept], new)


def _kept(name: str, old: Array, new: Array) -> dict[int, Array]:
    """Look up some entries of every slice of the smaller array in the larger one; most of them tell its place."""
    order = np.argsort(old, axis=None)
    values = old.ravel()[order]
    axes = []
    for dim, (size, before) in enumerate(zip(new.shape, old.shape, strict=True)):
        if size == before:
            axes.append(np.arange(size))
            continue
        slices = np.moveaxis(new, dim, 0).reshape(size, -1)
        some = slices[:, np.linspace(0, slices.shape[1] - 1, min(VOTES, slices.shape[1])).astype(int)]
        found = np.minimum(np.searchsorted(values, some), len(values) - 1)
        if (values[found] != some).all():
            raise NotDerivableError(f"{name} holds values that it did not hold before")
        places = np.unravel_index(order[found], old.shape)[dim]
        axes.append(np.array([np.bincount(place).argmax() for place in places]))
    if not np.array_equal(old[np.ix_(*axes)], new):
        raise NotDerivableError(f"{name} is no selection of rows and columns of what it was")
    return {dim: axis for dim, axis in enumerate(axes) if old.shape[dim] != new.shape[dim]}


def masked(model: Any, keep: Keep) -> Any:
    """Put zeros in place of every parameter of a removed index; norms over them see the kept ones alone."""
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {each.name: each for each in result.graph.initializer}
    tensors |= {
        node.output[0]: node.attribute[0].t
        for node in result.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for name, dims in keep.items():
        array = numpy_helper.to_array(tensors[name]).copy()
        for dim, kept in dims.items():
            gone = np.setdiff1d(np.arange(array.shape[dim]), kept)
            np.moveaxis(array, dim, 0)[gone] = 0
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    nodes = [part for node in result.graph.node for part in _over_kept(node, keep, result.graph)]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _over_kept(node: Any, keep: Keep, graph: Any) -> Iterable[Any]:
    """Write a LayerNormalization whose scale was cut as one over the kept indices."""
    import onnx
    from onnx import helper, numpy_helper

    if node.op_type != "LayerNormalization" or not keep.get(node.input[1]):
        return [node]
    scale = next(each for each in graph.initializer if each.name == node.input[1])
    kept, size = keep[scale.name][0], scale.dims[0]
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    mask = np.zeros(size, np.float32)
    mask[kept] = 1
    stem = f"{node.output[0]}/kept"
    constants = {"mask": mask, "mean": mask / len(kept), "epsilon": np.float32(epsilon), "axis": np.array([-1])}
    for key, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{stem}/{key}"))

    def step(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        names = [each if each in node.input or each in node.output else f"{stem}/{each}" for each in inputs]
        return helper.make_node(kind, names, [output if output in node.output else f"{stem}/{output}"], **attributes)

    x, result = node.input[0], node.output[0]
    return [
        step("Mul", [x, "mean"], "parts"),
        step("ReduceSum", ["parts", "axis"], "average", keepdims=1),
        step("Sub", [x, "average"], "all_centred"),
        step("Mul", ["all_centred", "mask"], "centred"),
        step("Mul", ["centred", "centred"], "squares"),
        step("Mul", ["squares", "mean"], "shares"),
        step("ReduceSum", ["shares", "axis"], "variance", keepdims=1),
        step("Add", ["variance", "epsilon"], "positive"),
        step("Sqrt", ["positive"], "deviation"),
        step("Div", ["centred", "deviation"], "normal"),
        step("Mul", ["normal", node.input[1]], "scaled"),
        step("Add", ["scaled", node.input[2]], result) if len(node.input) > 2 else step("Identity", ["scaled"], result),
    ]


# --- pruning


def by_onnxsim(variant: str, model: Any, sparsity: float) -> tuple[Any, Any]:
    """Prune a copy with onnxsim; return the file that was pruned, which may be a simplified one, and the result."""
    import onnx
    import onnxsim

    before = onnx.ModelProto()
    before.CopyFrom(model)
    if variant == "simplified":
        before, _ = onnxsim.simplify(before)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    after = onnxsim.apply_structured_pruning(after, sparsity=sparsity)
    if variant in ("heads", "simplified"):
        after = onnxsim.apply_attention_head_pruning(after, sparsity=sparsity)
    return before, after


def by_graphopt(source: Path, flops: float) -> tuple[Any, Keep]:
    """Prune a file with graphopt to a share of its multiply-adds; return the result, and what its plan says is left."""
    import graphopt
    from graphopt.targets.onnx import OnnxTarget
    from tests.zoo import quiet

    with quiet():
        result = graphopt.optimize(
            source, target=OnnxTarget(channel_multiple=1), budget=graphopt.Budget(flops=flops), verify="final"
        )
    return result.onnx, {name: dict(dims) for name, dims in result.plan.keep.items()}


def judged(row: Row, before: Any, after: Any, keep: Keep | str, inputs: Sequence[Feeds]) -> None:
    """Run a pruned file and its masked original, and write down the figures."""
    row["parameters"] = parameters(after)
    try:
        run = _session(after)
        names = [output.name for output in run.get_outputs()]
        found = [run.run(names, {v.name: each[v.name] for v in run.get_inputs()}) for each in inputs]
        row["macs"] = macs(after, inputs[0])
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the file is the finding
        row["broken"] = " ".join(str(error).split())[:160]
        return
    if isinstance(keep, str):
        row["masked"] = keep
        return
    row["cut"] = len(keep)
    reference = _session(masked(before, keep))
    row["difference"] = max(
        difference(reference.run(names, each), outputs) for each, outputs in zip(inputs, found, strict=True)
    )


def measure(name: str, exporter: Any, variant: str, sparsity: float, flops: float) -> Row:
    """Prune one file in one way."""
    import onnx

    source = exported(name, exporter)
    inputs = [feeds(name, source, batch=batch) for batch in BATCHES]
    model = onnx.load(str(source))
    row: Row = {"model": name, "exporter": exporter, "variant": variant, "broken": ""}
    row |= {"original_macs": macs(model, inputs[0]), "original_parameters": parameters(model)}
    keep: Keep | str
    start = time.perf_counter()
    try:
        if variant in PEER:
            before, after = by_onnxsim(variant.split()[1], model, sparsity)
        else:
            before = model
            after, keep = by_graphopt(source, flops)
    except Exception as error:  # noqa: BLE001  # why a tool fails is the finding
        row["broken"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return row
    row["seconds"] = time.perf_counter() - start
    if variant in PEER:
        try:
            keep = removed(before, after)
        except NotDerivableError as error:
            keep = f"not derivable: {error}"
    judged(row, before, after, keep, inputs)
    return row


def alone(*arguments: Any) -> Row:
    """Measure in a process of its own: a file that ends its process ends no more than that."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:
            name, exporter, variant, *_ = arguments
            return {"model": name, "exporter": exporter, "variant": variant, "broken": "the process died"}


def pruned(name: str, exporter: Any, sparsity: float, half: float) -> list[Row]:
    """Prune one file in every way."""
    rows = [alone(name, exporter, variant, sparsity, half) for variant in PEER]
    sound = [row["macs"] / row["original_macs"] for row in rows if not row["broken"]]
    same = min(sound, default=1.0)
    if same < 1:
        rows.append(alone(name, exporter, OURS[0], sparsity, same))
    rows.append(alone(name, exporter, OURS[1], sparsity, half))
    return rows


# --- printing


def equality(row: Row) -> str:
    """Say whether a file equals its masked original."""
    if row["broken"]:
        return ""
    if "difference" not in row:
        return str(row["masked"])[:48]
    if not row["cut"]:
        return "nothing cut"
    return f"{row['difference']:.0e}" + ("" if row["difference"] <= EXACT else " [red]differs")


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each file and way, and a line of totals for each way."""
    table = Table("model", "exporter", "by", "runs", "macs", "parameters", "masked equality", "seconds")
    for row in rows:
        if row["broken"]:
            table.add_row(row["model"], row["exporter"], row["variant"], f"[red]no: {row['broken'][:70]}")
            continue
        table.add_row(
            row["model"],
            row["exporter"],
            row["variant"],
            "yes",
            f"{row['macs'] / row['original_macs']:.3f}",
            f"{row['parameters'] / row['original_parameters']:.3f}",
            equality(row),
            f"{row['seconds']:.2f}",
        )
    console.print(table)
    totals = Table("by", "runs", "of them cut", "equal to masked", "macs", "parameters", "seconds", title="medians")
    for variant in (*PEER, *OURS):
        own = [row for row in rows if row["variant"] == variant]
        sound = [row for row in own if not row["broken"]]
        if not sound:
            totals.add_row(variant, f"0 of {len(own)}")
            continue
        cut = [row for row in sound if row["parameters"] < row["original_parameters"]]
        totals.add_row(
            variant,
            f"{len(sound)} of {len(own)}",
            str(len(cut)),
            str(sum(row.get("difference", math.inf) <= EXACT for row in cut)),
            f"{statistics.median(row['macs'] / row['original_macs'] for row in sound):.3f}",
            f"{statistics.median(row['parameters'] / row['original_parameters'] for row in sound):.3f}",
            f"{statistics.median(row['seconds'] for row in sound):.2f}",
        )
    console.print(totals)


def main() -> None:
    """Read the command line, prune, print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--exporter", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of channels that onnxsim removes")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the multiply-adds that graphopt keeps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=170)
    rows: list[Row] = []
    for name in options.names:
        for exporter in options.exporter:
            try:
                exported(name, exporter)
            except ExportError as error:
                console.print(f"{name} is refused by the {exporter} exporter: {error}", markup=False)
                continue
            rows += pruned(name, exporter, options.sparsity, options.flops)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print_rows(rows, console)


if __name__ == "__main__":
    main()
