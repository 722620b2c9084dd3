"""Run one optimizer of ONNX files in a process of its own: `python -m benchmarks.onnx_optimizers NAME IN OUT`.

Prints a line of JSON: the seconds from opening the file to having written the other, imports left out, and by how many
bytes the process grew at most. `optimize_apart` starts such a process; the benchmarks of ONNX files share it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def graphopt(source: Path, result: Path) -> None:
    """Run the lossless passes, prove each, and run what was written in ONNX Runtime, as is the default."""
    _graphopt(source, result, checked=True)


def graphopt_unchecked(source: Path, result: Path) -> None:
    """Run the lossless passes and prove nothing, as the others do."""
    _graphopt(source, result, checked=False)


def _graphopt(source: Path, result: Path, *, checked: bool) -> None:
    import graphopt
    from graphopt.targets.onnx import OnnxTarget
    from tests.zoo import quiet

    folder = result.parent / "graphopt"
    with quiet():
        target = OnnxTarget(check=checked)
        graphopt.optimize(source, target=target, output=folder, verify="each" if checked else "off")
    for name in ("model.onnx", "model.onnx.data"):
        if (folder / name).exists():
            (folder / name).replace(result.parent / name)


def onnxsim(source: Path, result: Path) -> None:
    """Run onnx-simplifier with its defaults."""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(str(source))
    onnx.save(model, str(result))


def onnxscript(source: Path, result: Path) -> None:
    """Run onnxscript's optimizer with its defaults."""
    import onnx
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(str(source))), str(result))


def onnxoptimizer(source: Path, result: Path) -> None:
    """Run onnxoptimizer's fusing and eliminating passes until nothing changes."""
    import onnx
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    onnx.save(onnxoptimizer.optimize(onnx.load(str(source)), passes, fixed_point=True), str(result))


def ort_basic(source: Path, result: Path) -> None:
    """Let ONNX Runtime write what it optimizes on its basic level, in standard operators."""
    _onnxruntime(source, result, "ORT_ENABLE_BASIC")


def ort_extended(source: Path, result: Path) -> None:
    """Let ONNX Runtime write what it optimizes on its extended level, in operators of its own."""
    _onnxruntime(source, result, "ORT_ENABLE_EXTENDED")


def _onnxruntime(source: Path, result: Path, level: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(result)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


OPTIMIZERS: dict[str, Callable[[Path, Path], None]] = {
    "graphopt": graphopt,
    "graphopt-unchecked": graphopt_unchecked,
    "onnxsim": onnxsim,
    "onnxscript": onnxscript,
    "onnxoptimizer": onnxoptimizer,
    "ort-basic": ort_basic,
    "ort-extended": ort_extended,
}
_OURS = ("onnx", "onnxruntime", "torch", "graphopt", "graphopt.targets.onnx", "onnx_graphsurgeon", "tests.zoo")
_IMPORTS = {
    "graphopt": _OURS,
    "graphopt-unchecked": _OURS,
    "onnxsim": ("onnx", "onnxsim"),
    "onnxscript": ("onnx", "onnxscript.optimizer"),
    "onnxoptimizer": ("onnx", "onnxoptimizer"),
    "ort-basic": ("onnxruntime",),
    "ort-extended": ("onnxruntime",),
}


@dataclass(frozen=True)
class Run:
    """What an optimizer took for a file, or why it gave none."""

    seconds: float = float("nan")
    peak_bytes: float = float("nan")
    failure: str = ""


def optimize_apart(name: str, source: Path, result: Path, *, timeout: float = 600) -> Run:
    """Run an optimizer in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.onnx_optimizers", name, str(source), str(result)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Run(failure=f"not done after {timeout:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        told = done.stderr.strip().splitlines()
        return Run(failure=(told[-1] if told else f"exit status {done.returncode}")[:160])
    return Run(**json.loads(lines[-1]))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Import, optimize, and print what it took."""
    name, source, result = sys.argv[1:]
    for module in _IMPORTS[name]:
        __import__(module)
    before = _resident_bytes()
    start = time.perf_counter()
    OPTIMIZERS[name](Path(source), Path(result))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak - before}))


if __name__ == "__main__":
    main()
