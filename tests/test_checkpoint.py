"""Checkpoints read and cut piece by piece: what is read, what is written, and under which names."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt import checkpoint as module
from graphopt.checkpoint import Checkpoint, Weights, spelled
from graphopt.errors import PipelineError
from graphopt.plan import Plan


def written(folder: Path, *shards: dict[str, Tensor]) -> Path:
    """Write a checkpoint of several files with an index, and return the folder."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        safetensors.torch.save_file(shard, folder / f"part-{number}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def several_types() -> dict[str, Tensor]:
    return {
        "a": torch.arange(12.0).reshape(4, 3),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(7),
        "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "empty": torch.zeros(0, 3),
        "wide": torch.randn(2, 3, 4, dtype=torch.float64),
    }


def test_a_checkpoint_is_a_mapping_of_its_tensors(tmp_path: Path) -> None:
    state = several_types()
    found = Checkpoint.open(written(tmp_path / "in", {n: state[n] for n in ("a", "half")}, {"wide": state["wide"]}))
    assert set(found) == {"a", "half", "wide"}
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert found.entries["half"].dtype == "BF16"
    assert found.entries["wide"].shape == (2, 3, 4)
    assert Checkpoint.open(found) is found


def test_what_is_written_is_read_by_others(tmp_path: Path) -> None:
    """All types and ranks, cut along one, several or no dimensions, read back with the format's own library."""
    state = several_types()
    cuts = {
        "a": {0: np.array([1, 3]), 1: np.array([0, 2])},
        "half": {0: np.array([0, 4])},
        "wide": {1: np.array([2]), 2: np.array([0, 1, 3])},
        "bytes": {1: np.array([1])},
    }
    checkpoint = Checkpoint.open(written(tmp_path / "in", state))
    files = checkpoint.write_cut(tmp_path / "out", cuts)
    assert [f.name for f in files] == ["part-0.safetensors", "model.safetensors.index.json"]
    found = safetensors.torch.load_file(files[0])
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        for dim, kept in cuts.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.from_numpy(kept))
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    total = sum(t.numel() * t.element_size() for t in found.values())
    assert json.loads(files[1].read_text())["metadata"] == {"total_size": total}
    with safetensors.safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 5),
    block=st.integers(1, 400),
    data=st.data(),
)
def test_blocks_of_any_size_make_up_what_is_kept(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, block: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    tensor = torch.randn(rows, columns)
    safetensors.torch.save_file({"w": tensor}, folder / "model.safetensors")
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))), dtype=np.int64)
    across = np.array(sorted(data.draw(st.sets(st.integers(0, columns - 1), min_size=1))), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        blocks = list(Checkpoint.open(folder).blocks("w", {0: kept, 1: across}))
    assert torch.equal(torch.cat(blocks), tensor[kept][:, across])
    assert max(map(len, blocks)) <= max(1, block // (8 * columns))


def test_no_more_than_a_block_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of a hundred blocks, cut into a new file, no read brings more than one."""
    monkeypatch.setattr(module, "BLOCK", 800)
    read: list[int] = []
    rows = Checkpoint.rows

    def watched(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        found = rows(self, name, start, stop)
        read.append(found.numel() * 8)
        return found

    monkeypatch.setattr(Checkpoint, "rows", watched)
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a whole tensor was read"))
    safetensors.torch.save_file({"w": torch.randn(1000, 10)}, tmp_path / "model.safetensors")
    Checkpoint.open(tmp_path).write_cut(tmp_path / "out", {"w": {1: np.arange(5)}})
    assert max(read) <= 800
    assert sum(read) == 1000 * 10 * 8


def test_the_file_of_a_folder_is_the_one_that_is_called_model(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"other": torch.ones(2)}, tmp_path / "plan.safetensors")
    assert list(Checkpoint.open(tmp_path)) == ["w"]


@pytest.mark.parametrize(
    ("names", "held", "expected"),
    [
        (["model.a", "head"], {"model.a", "head"}, {"model.a": "model.a", "head": "head"}),
        (["model.a.b", "model.c", "head"], {"a.b", "c"}, {"model.a.b": "a.b", "model.c": "c"}),
        (["a.b", "c"], {"model.a.b", "model.c"}, {"a.b": "model.a.b", "c": "model.c"}),
        (["a", "missing"], {"a"}, {"a": "a"}),
        (["x.a", "x.b"], {"a", "x.b"}, {"x.b": "x.b"}),
    ],
)
def test_names_may_begin_in_another_way(names: list[str], held: set[str], expected: dict[str, str]) -> None:
    assert spelled(names, held) == expected


def test_weights_follow_successive_cuts(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    safetensors.torch.save_file({"model.w": tensor}, tmp_path / "model.safetensors")
    weights = Weights.bind(Checkpoint.open(tmp_path), {"w": (torch.empty(6, 4, dtype=torch.float64), ["w"])})
    assert torch.equal(weights["w"], tensor.double())
    later = weights.sliced({"w": {0: np.array([1, 2, 5])}}).sliced({"w": {0: np.array([0, 2]), 1: np.array([3])}})
    assert torch.equal(later["w"], tensor.double()[[1, 5]][:, [3]])
    assert torch.equal(weights["w"], tensor.double())


def test_what_does_not_fit_the_model_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"layer.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(PipelineError, match=r"has no layer.wait, .* the nearest name it has is layer.weight"):
        Weights.bind(checkpoint, {"layer.wait": (torch.empty(2), ["layer.wait"])})
    with pytest.raises(
        PipelineError, match=r"layer.weight has shape \(2,\) in the checkpoint, and \(3,\) in the model"
    ):
        Weights.bind(checkpoint, {"layer.weight": (torch.empty(3), ["layer.weight"])})
    assert len(Weights.bind(checkpoint, {"x": (torch.empty(2), ["x"])}, spare=["x"])) == 0


def mixture(layer: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return a router's weight and each of four experts' by itself."""
    state = {f"{layer}.gate.weight": torch.randn(4, 3)}
    for number in range(4):
        for part in parts:
            shape = (3, 5) if part.startswith(("down", "w2")) else (5, 3)
            state[f"{layer}.experts.{number}.{part}.weight"] = torch.randn(shape)
    return state


@pytest.mark.parametrize(
    ("layer", "parts"),
    [("model.0.block_sparse_moe", ("w1", "w3", "w2")), ("model.0.mlp", ("gate_proj", "up_proj", "down_proj"))],
)
def test_experts_that_are_written_one_by_one_are_read_and_cut_together(
    tmp_path: Path, layer: str, parts: tuple[str, ...]
) -> None:
    """Those that go are not written, the others are numbered anew, and the index follows."""
    state = mixture(layer, parts)
    names = list(state)
    checkpoint = Checkpoint.open(written(tmp_path / "in", *({n: state[n] for n in names[i::2]} for i in range(2))))
    gate, up, down = (torch.stack([state[f"{layer}.experts.{e}.{part}.weight"] for e in range(4)]) for part in parts)
    wanted = {
        "model.0.mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "model.0.mlp.experts.down_proj": down,
        "model.0.mlp.gate.weight": state[f"{layer}.gate.weight"],
    }
    weights = Weights.bind(checkpoint, {name: (tensor, [name]) for name, tensor in wanted.items()})
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())
    experts, hidden, width = np.array([1, 3]), np.array([0, 2, 3]), np.array([0, 2])
    keep = {
        "model.0.mlp.experts.gate_up_proj": {0: experts, 1: np.concatenate([hidden, hidden + 5]), 2: width},
        "model.0.mlp.experts.down_proj": {0: experts, 1: width, 2: hidden},
        "model.0.mlp.gate.weight": {0: experts, 1: width},
    }
    plan = Plan({n: dict(dims) for n, dims in keep.items()}, {n: tuple(t.shape) for n, t in wanted.items()})
    plan.apply_files(tmp_path / "in", tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    assert {name for name in found if ".experts." in name} == {
        f"{layer}.experts.{number}.{part}.weight" for number in (0, 1) for part in parts
    }
    after = Weights.bind(found, {name: (torch.empty(plan.shape_after(name)), [name]) for name in wanted})
    expected = plan.apply(wanted)
    assert all(torch.equal(after[name], expected[name]) for name in wanted)
    assert all(torch.equal(weights.sliced(keep)[name], expected[name]) for name in wanted)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: entry.file.name for name, entry in found.entries.items()}


def test_experts_that_are_no_stack_are_left_alone(tmp_path: Path) -> None:
    """Of other sizes, with a number left out, or with a part that is missing."""
    whole = mixture("a.mlp", ("gate_proj", "up_proj", "down_proj"))
    for broken in (
        {**whole, "a.mlp.experts.2.up_proj.weight": torch.randn(6, 3)},
        {name: tensor for name, tensor in whole.items() if ".1." not in name},
        {name: tensor for name, tensor in whole.items() if "2.up_proj" not in name},
    ):
        safetensors.torch.save_file(broken, tmp_path / "model.safetensors")
        assert "a.mlp.experts.gate_up_proj" not in Checkpoint.open(tmp_path)
