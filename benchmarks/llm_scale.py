"""Measure what large language models take that are never in memory: seconds, and the most memory a process held.

    python -m benchmarks.llm_scale [CASE …] [--gigabytes 2] [--json FILE]

Each case runs in a process of its own, whose peak resident memory (``ru_maxrss``, which includes Python, torch and
transformers: about 0.4 GB) the system counts:

- ``llama-7b``: Llama-7B-shaped (32 layers, width 4096, 11008 in between, 32 heads, 32000 tokens), captured, typed and
  planned to half its multiply-adds, without a checkpoint and so by chance.
- ``mixtral-16``: Mixtral-shaped (32 layers, width 4096, 14336 in each of 16 experts), to half its parameters.
- ``checkpoint``: a Llama-shaped checkpoint of random bfloat16 weights in shards of half a gigabyte, scored by squared
  magnitude and pruned to half the multiply-adds; then its plan alone applied once more.
- ``calibration``: the same, scored by the fluctuation of inputs on four batches of 32 tokens, which run through the
  model layer by layer.

The checkpoint is written shard by shard beside the temporary files, and deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

SHARD = 500_000_000
"""Bytes of a shard."""
TOKENS = 2048
"""Tokens of the example input."""


class Stages:
    """Measure stages by name: seconds on the clock, and of the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure one stage."""
        clock, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - clock
        self.processor[name] = time.process_time() - processor


def llama_7b(stages: Stages) -> dict[str, Any]:
    """Plan a Llama of seven billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    return planned(stages, lambda: LlamaForCausalLM(config), {"flops": 0.5})


def mixtral_16(stages: Stages) -> dict[str, Any]:
    """Plan a Mixtral of sixteen experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(num_hidden_layers=32, num_local_experts=16)
    return planned(stages, lambda: MixtralForCausalLM(config), {"params": 0.5})


def planned(stages: Stages, build: Callable[[], Any], budget: dict[str, float]) -> dict[str, Any]:
    """Capture, type and price a model, then plan it from the captured graph."""
    import torch

    import graphopt
    from graphopt.capture import capture
    from graphopt.cost import CostModel
    from graphopt.dialects.aten import infer

    with stages("build"), graphopt.without_weights():
        model = build()
    with stages("capture"):
        graph = capture(model, (torch.zeros(1, TOKENS, dtype=torch.long),))
    with stages("type"):
        typing = infer(graph)
    with stages("price"):
        before = CostModel(typing).cost()
    with stages("plan and rewrite"):
        pipeline = "prune-channels{importance=random constraints.normalised=together}"
        result = graphopt.optimize(graph, budget=graphopt.Budget(**budget), pipeline=pipeline)
    roles: dict[str, int] = {}
    for group in typing.groups:
        roles[group.role] = roles.get(group.role, 0) + 1
    after = result.report.after
    return {
        "nodes": len(graph.nodes),
        "groups": roles,
        "parameters": [before.params, after.params],
        "macs": [before.macs, after.macs],
        "tensors shrunk": len(result.plan),
    }


def tiny_llama(gigabytes: float) -> Any:
    """Return the configuration of a Llama whose bfloat16 weights take about so much."""
    from transformers import LlamaConfig

    width, between, words = 2048, 5504, 32000
    layer = 4 * width * width + 3 * width * between + 2 * width
    layers = ceil((gigabytes * 1e9 / 2 - 2 * words * width) / layer)
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=between,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=words,
    )


def hollow_llama(gigabytes: float) -> Any:
    """Build that Llama without weights."""
    import torch
    from transformers import LlamaForCausalLM

    import graphopt

    with graphopt.without_weights():
        model: Any = LlamaForCausalLM(tiny_llama(gigabytes))
    return model.to(torch.bfloat16)


def write(folder: Path, gigabytes: float) -> None:
    """Write random weights, a shard in memory at a time, with an index."""
    import safetensors.torch
    import torch

    parameters = dict(hollow_llama(gigabytes).named_parameters())
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters.items():
        if size and size + 2 * parameter.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * parameter.numel()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        state = {
            name: torch.randn(parameters[name].shape, generator=generator).mul_(0.02).to(torch.bfloat16)
            for name in names
        }
        safetensors.torch.save_file(state, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(stages: Stages, folder: Path, gigabytes: float, pipeline: str, **options: Any) -> dict[str, Any]:
    """Prune the checkpoint to half its multiply-adds."""
    import torch

    import graphopt

    model = hollow_llama(gigabytes)
    with stages("optimize"):
        result = graphopt.optimize(
            model,
            (torch.zeros(1, 32, dtype=torch.long),),
            checkpoint=folder,
            budget=graphopt.Budget(flops=0.5),
            pipeline=pipeline,
            output=folder / "pruned",
            **options,
        )
    with stages("apply the plan alone"):
        result.plan.apply_files(folder, folder / "again")
    return {
        "bytes": [sum(f.stat().st_size for f in path.glob("model-*")) for path in (folder, folder / "pruned")],
        "shards": len(list(folder.glob("model-*.safetensors"))),
        "macs": [result.report.before.macs, result.report.after.macs],
    }


def checkpoint(stages: Stages, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Score by squared magnitude."""
    return prune(stages, folder, gigabytes, "prune-channels")


def calibration(stages: Stages, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Score by the fluctuation of inputs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(32000, (1, 32), generator=generator) for _ in range(4)]
    pipeline = "prune-channels{importance=input-fluctuation}"
    return prune(stages, folder, gigabytes, pipeline, calibration=tokens)


PLANS: dict[str, Callable[[Stages], dict[str, Any]]] = {"llama-7b": llama_7b, "mixtral-16": mixtral_16}
FILES: dict[str, Callable[[Stages, Path, float], dict[str, Any]]] = {
    "checkpoint": checkpoint,
    "calibration": calibration,
}


def run_case(name: str, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Run one case in this process; return what it measured."""
    from tests.torchvision_ops import declare_missing_operators

    declare_missing_operators()
    import transformers  # noqa: F401  # what a user's process holds, too

    stages = Stages()
    if name == "write":
        write(folder, gigabytes)
        return {}
    facts = PLANS[name](stages) if name in PLANS else FILES[name](stages, folder, gigabytes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": stages.seconds, "processor": stages.processor, "peak_bytes": peak, **facts}


def alone(name: str, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.llm_scale", "--inside", name, str(folder), str(gigabytes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the cases, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join((*PLANS, *FILES))}; all by default")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = set(options.cases) - {*PLANS, *FILES}
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join((*PLANS, *FILES))}")
    results: dict[str, Any] = {}
    for name in options.cases or [*PLANS, *FILES]:
        with tempfile.TemporaryDirectory(prefix="llm-scale-") as scratch:
            if name in FILES:
                alone("write", Path(scratch), options.gigabytes)
            results[name] = alone(name, Path(scratch), options.gigabytes)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict[str, Any]) -> None:
    """Print one row a stage."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "stage", "seconds", "of the processor", "peak memory")
    for name, found in results.items():
        for stage, seconds in found["seconds"].items():
            table.add_row(name, stage, f"{seconds:.2f}", f"{found['processor'][stage]:.2f}", "")
        totals = (f"{sum(found[kind].values()):.2f}" for kind in ("seconds", "processor"))
        table.add_row(name, "all", *totals, f"{found['peak_bytes'] / 1e9:.2f} GB", end_section=True)
    console = Console()
    console.print(table)
    for name, found in results.items():
        facts = {key: value for key, value in found.items() if key not in ("seconds", "processor", "peak_bytes")}
        console.print(f"{name}: {facts}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print(json.dumps(run_case(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))))
    else:
        main()
