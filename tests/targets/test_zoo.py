"""Lower every model of the zoo, whole and halved, and run the files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.graph import Graph
from graphopt.rewrite import rewrite
from graphopt.targets.onnx import OnnxTarget
from tests.zoo import ZOO

pytestmark = pytest.mark.zoo


def halved(graph: Graph) -> Graph:
    """Return the graph with a random half of the indices of every group, all groups at once."""
    typing = infer(graph)
    rng = np.random.default_rng(0)
    keep = {group.atom: np.sort(rng.permutation(group.size)[: max(1, group.size // 2)]) for group in typing.groups}
    return rewrite(typing, keep)


@pytest.mark.parametrize("name", ZOO)
def test_files_compute_what_the_graphs_do(name: str, tmp_path: Path) -> None:
    zoo = ZOO[name]
    whole = capture(zoo.build(), zoo.inputs())
    for graph in (whole, halved(whole)):
        lowered = OnnxTarget().lower(graph, tmp_path)
        assert lowered.notes == ()
        assert [check.inputs for check in lowered.checks] == ["example", "twice the batch", "batch of one"]
        assert all(check.difference.equal for check in lowered.checks), [str(check) for check in lowered.checks]
