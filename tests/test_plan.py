"""Plans: composed, saved, loaded and applied to checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.dialects.aten import infer
from graphopt.errors import GraphOptError, PipelineError
from graphopt.graph import Graph
from graphopt.plan import Plan
from graphopt.rewrite import rewrite


class Tied(nn.Module):
    """A residual perceptron whose classifier's weight is its embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module")
def module() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture(scope="module")
def graph(module: Tied) -> Graph:
    return capture(module, (torch.randint(11, (5,)),))


@pytest.fixture
def typing(graph: Graph) -> Typing:
    return infer(graph)


def kept(typing: Typing, seed: int) -> dict[Atom, Indices]:
    rng = np.random.default_rng(seed)
    return {
        g.atom: np.sort(rng.choice(g.size, int(rng.integers(1, g.size)), replace=False)).astype(np.int64)
        for g in typing.groups
    }


def test_a_plan_names_every_dimension_that_loses_indices(typing: Typing) -> None:
    hidden = next(g for g in typing.groups if g.size == 12)
    indices = np.array([1, 4, 11])
    plan = Plan.of(typing, {hidden.atom: indices})
    assert {name: sorted(dims) for name, dims in plan.keep.items()} == {
        "up.weight": [0],
        "up.bias": [0],
        "down.weight": [1],
    }
    assert all(np.array_equal(i, indices) and i.dtype == np.int64 for dims in plan.keep.values() for i in dims.values())
    assert plan.shapes["down.weight"] == (8, 12)
    assert plan.shape_after("down.weight") == (8, 3)
    assert str(plan).splitlines()[0] == "up.weight: [12, 8] -> [3, 8]"
    assert len(plan) == 3


def test_a_shared_tensor_stands_under_each_of_its_names(typing: Typing) -> None:
    width = next(g for g in typing.groups if g.size == 8)
    plan = Plan.of(typing, {width.atom: np.array([0, 7])})
    assert plan.keep["embed.weight"][1].tolist() == [0, 7]
    assert plan.keep["head.weight"][1].tolist() == [0, 7]
    assert plan.keep["norm.running_mean"][0].tolist() == [0, 7]


def test_what_keeps_all_its_indices_is_not_in_the_plan(typing: Typing) -> None:
    plan = Plan.of(typing, {g.atom: np.arange(g.size) for g in typing.groups})
    assert plan == Plan()
    assert len(plan) == 0
    assert str(plan) == "nothing is removed"


@pytest.mark.parametrize("seed", range(3))
def test_applying_a_plan_prunes_the_state_dict_as_the_rewrite_does(module: Tied, typing: Typing, seed: int) -> None:
    keep = kept(typing, seed)
    state = Plan.of(typing, keep).apply(module.state_dict())
    expected = rewrite(typing, keep).tensors()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert state[name].is_contiguous()
    assert state["head.weight"] is state["embed.weight"]
    assert state.keys() == module.state_dict().keys()
    assert torch.equal(state["norm.num_batches_tracked"], module.state_dict()["norm.num_batches_tracked"])


@pytest.mark.parametrize("seed", range(3))
def test_plans_compose_over_successive_prunings(module: Tied, typing: Typing, seed: int) -> None:
    first = kept(typing, seed)
    smaller = infer(rewrite(typing, first))
    second = {a: i for a, i in kept(smaller, seed + 100).items() if len(i) < a.size} if smaller.groups else {}
    one, two = Plan.of(typing, first), Plan.of(smaller, second)
    both = one.then(two)
    state, stepwise = both.apply(module.state_dict()), two.apply(one.apply(module.state_dict()))
    for name, tensor in rewrite(smaller, second).tensors().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(stepwise[name], tensor)
    assert all(shape == tuple(module.state_dict()[name].shape) for name, shape in both.shapes.items())


def test_composing_with_nothing_changes_nothing(typing: Typing) -> None:
    plan = Plan.of(typing, kept(typing, 0))
    assert plan.then(Plan()) == plan
    assert Plan().then(plan) == plan


def test_composing_leaves_both_plans_as_they_were(typing: Typing) -> None:
    first = Plan.of(typing, kept(typing, 0))
    smaller = infer(rewrite(typing, kept(typing, 0)))
    before = Plan({n: dict(d) for n, d in first.keep.items()}, dict(first.shapes), dict(first.aliases))
    first.then(Plan.of(smaller, kept(smaller, 1)) if all(g.size > 1 for g in smaller.groups) else Plan())
    assert first == before


def test_plans_in_the_wrong_order_are_refused(typing: Typing) -> None:
    plan = Plan.of(typing, kept(typing, 0))
    with pytest.raises(PipelineError, match="the plans do not follow each other: the first leaves"):
        plan.then(plan)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw a plan for tensors of any names and shapes."""
    keep: dict[str, dict[int, Indices]] = {}
    shapes = {}
    names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
    for name in draw(st.lists(names, max_size=4, unique=True)):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        dims = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
        keep[name] = {
            d: np.array(sorted(draw(st.sets(st.integers(0, shape[d] - 1), min_size=1))), dtype=np.int64) for d in dims
        }
        shapes[name] = shape
    return Plan(keep, shapes)


@given(plan=plans())
def test_a_saved_plan_is_read_back(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    plan.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.safetensors"]


@given(plan=plans(), data=st.data())
def test_composition_is_slicing_twice(plan: Plan, data: st.DataObject) -> None:
    keep: dict[str, dict[int, Indices]] = {}
    for name in plan.keep:
        sizes = plan.shape_after(name)
        dim = data.draw(st.integers(0, len(sizes) - 1))
        indices = data.draw(st.sets(st.integers(0, sizes[dim] - 1), min_size=1))
        keep[name] = {dim: np.array(sorted(indices), dtype=np.int64)}
    later = Plan(keep, {name: plan.shape_after(name) for name in keep})
    state = {name: torch.arange(float(np.prod(shape))).reshape(shape) for name, shape in plan.shapes.items()}
    once, twice = plan.then(later).apply(state), later.apply(plan.apply(state))
    assert all(torch.equal(once[name], twice[name]) for name in state)


# -- state dicts that do not fit --


def shrink(name: str = "w", shape: tuple[int, ...] = (4, 3), indices: tuple[int, ...] = (0, 2)) -> Plan:
    return Plan({name: {0: np.array(indices, dtype=np.int64)}}, {name: shape})


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(PipelineError, match="the state dict has no w "):
        shrink().apply({"v": torch.zeros(4, 3)})
    assert shrink().apply({}, strict=False) == {}


def test_a_tensor_of_another_shape_is_named() -> None:
    with pytest.raises(PipelineError, match=r"w has shape \(5, 3\), the plan was made for \(4, 3\)"):
        shrink().apply({"w": torch.zeros(5, 3)})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_share_memory_but_not_their_cuts_stay_apart(device: str) -> None:
    base = torch.arange(12.0, device=device).reshape(4, 3)
    plan = Plan(
        {"a": {0: np.array([0, 1])}, "b": {0: np.array([2])}, "c": {0: np.array([0])}},
        {"a": (4, 3), "b": (4, 3), "c": (2, 3)},
    )
    state = plan.apply({"a": base, "b": base, "c": base[:2]})
    assert {name: tuple(t.shape) for name, t in state.items()} == {"a": (2, 3), "b": (1, 3), "c": (1, 3)}
    if device == "cpu":
        assert state["b"].tolist() == [[6, 7, 8]]


def test_a_plan_does_not_touch_what_it_is_applied_to() -> None:
    state = {"w": nn.Parameter(torch.arange(12.0).reshape(4, 3)), "other": torch.ones(2)}
    result = shrink().apply(state)
    assert result["other"] is state["other"]
    assert tuple(state["w"].shape) == (4, 3)
    assert result["w"].tolist() == [[0, 1, 2], [6, 7, 8]]


# -- files that are no plans --


def write(path: Path, arrays: dict[str, Any], metadata: dict[str, str] | None) -> Path:
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    return path


def described(**changes: str) -> dict[str, str]:
    facts = {"shapes": json.dumps({"w": [4, 3]}), "aliases": "{}"}
    return {"format": "graphopt-plan", "version": "1", **facts, **changes}


ROW = np.array([0, 2], dtype=np.int64)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"0:w": ROW}, None, "no plan of version 1"),
        ({"0:w": ROW}, described(format="pt"), "its format is 'pt'"),
        ({"0:w": ROW}, described(version="2"), "version '2'"),
        ({"0:w": ROW}, described(shapes="{"), "contradicts itself"),
        ({"0:w": ROW}, described(shapes="[1]"), "contradicts itself"),
        ({"0:w": ROW}, described(shapes="[" * 100_000), "contradicts itself"),
        ({"0:w": ROW}, described(shapes='{"w": ["a"]}'), "contradicts itself"),
        ({"0:w": ROW}, {"format": "graphopt-plan", "version": "1"}, "contradicts itself"),
        ({"0:w": ROW}, described(aliases='{"v": "w"}'), "same indices under each of its names"),
        ({"0:w": ROW}, described(aliases='{"w": "v"}'), "contradicts itself"),
        ({"0:v": ROW}, described(), "contradicts itself"),
        ({"2:w": ROW}, described(), "contradicts itself"),
        ({"-1:w": ROW}, described(), "contradicts itself"),
        ({"w": ROW}, described(), "contradicts itself"),
        ({"0:w": ROW.astype(np.int32)}, described(), "row of int64"),
        ({"0:w": ROW.reshape(1, 2)}, described(), "row of int64"),
        ({"0:w": ROW[:0]}, described(), "row of int64"),
        ({"0:w": np.array([2, 0])}, described(), "sorted, unique and in range"),
        ({"0:w": np.array([0, 0])}, described(), "sorted, unique and in range"),
        ({"0:w": np.array([0, 4])}, described(), "sorted, unique and in range"),
        ({"0:w": np.array([-1, 2])}, described(), "sorted, unique and in range"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, arrays: dict[str, Any], metadata: dict[str, str] | None, message: str
) -> None:
    path = write(tmp_path / "plan.safetensors", arrays, metadata)
    with pytest.raises(GraphOptError, match=message):
        Plan.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04cos\nsystem\n.", b"PK\x03\x04", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"[]      "]
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.safetensors"
    path.write_bytes(content)
    with pytest.raises(GraphOptError, match=r"cannot read .*plan.safetensors as a safetensors file"):
        Plan.load(path)


def test_a_truncated_or_missing_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    with pytest.raises(GraphOptError, match="cannot read"):
        Plan.load(path)
    shrink().save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(GraphOptError, match="cannot read"):
        Plan.load(path)


def test_an_element_type_that_numpy_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    safetensors.torch.save_file({"0:w": torch.zeros(2, dtype=torch.bfloat16)}, path, described())
    with pytest.raises(GraphOptError, match="must be a row of int64"):
        Plan.load(path)


def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    shrink().save(path)

    def fail(*_: Any) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        shrink(indices=(1,)).save(path)
    assert Plan.load(path) == shrink()
    assert list(tmp_path.iterdir()) == [path]


# -- checkpoints in files --


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write a checkpoint of two shards with an index."""
    names = list(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({n: state[n].contiguous() for n in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    total = sum(t.numel() * t.element_size() for t in state.values())
    index.write_text(json.dumps({"metadata": {"total_size": total, "note": "x"}, "weight_map": weight_map}))
    return index


def loaded(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("named", ["index", "folder"])
def test_a_sharded_checkpoint_is_pruned_shard_by_shard(
    tmp_path: Path, module: Tied, typing: Typing, named: str
) -> None:
    # A checkpoint file holds a shared tensor under one of its names.
    state = {n: t for n, t in module.state_dict().items() if n != "head.weight"}
    (tmp_path / "in").mkdir()
    index = sharded(tmp_path / "in", state)
    plan = Plan.of(typing, kept(typing, 0))
    written = plan.apply_files(index if named == "index" else index.parent, tmp_path / "out")
    expected = plan.apply(state, strict=False)
    found = loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(p.name for p in written) == sorted(p.name for p in (tmp_path / "out").iterdir())
    content = json.loads((tmp_path / "out" / index.name).read_text())
    assert content["weight_map"] == json.loads(index.read_text())["weight_map"]
    assert content["metadata"] == {"total_size": sum(t.numel() * t.element_size() for t in found.values()), "note": "x"}


def test_one_file_is_pruned_and_keeps_its_metadata(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.arange(12.0).reshape(4, 3), "v": torch.ones(2)}, source, {"format": "pt"})
    (written,) = shrink().apply_files(source, tmp_path / "out")
    with safetensors.safe_open(written, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("w").tolist() == [[0, 1, 2], [6, 7, 8]]
        assert file.get_tensor("v").tolist() == [1, 1]


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    out = tmp_path / "out"
    safetensors.torch.save_file({"v": torch.ones(2)}, source)
    with pytest.raises(PipelineError, match="has no w, which the plan shrinks; nothing was written"):
        shrink().apply_files(source, out)
    safetensors.torch.save_file({"w": torch.ones(2)}, source)
    with pytest.raises(PipelineError, match=r"w has shape \(2,\)"):
        shrink().apply_files(source, out)
    assert not out.exists()


def test_one_name_of_a_shared_tensor_is_enough_also_after_loading(tmp_path: Path, module: Tied, typing: Typing) -> None:
    state = {n: t.contiguous() for n, t in module.state_dict().items() if n != "embed.weight"}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    Plan.of(typing, kept(typing, 0)).save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert {*plan.aliases, *plan.aliases.values()} == {"head.weight", "embed.weight"}
    plan.apply_files(tmp_path / "model.safetensors", tmp_path / "out")
    assert tuple(loaded(tmp_path / "out")["head.weight"].shape) == plan.shape_after("head.weight")


def test_a_tensor_that_merely_looks_alike_is_no_substitute(tmp_path: Path) -> None:
    """Equal cuts do not make two tensors one: a checkpoint without one of them does not fit."""
    plan = Plan({"a": {0: ROW}, "b": {0: ROW}}, {"a": (4, 3), "b": (4, 3)})
    source = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4, 3)}, source)
    with pytest.raises(PipelineError, match="has no b, which the plan shrinks"):
        plan.apply_files(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no index of a sharded checkpoint"),
        ("[]", "is no index of a sharded checkpoint"),
        ('{"weight_map": 3}', "is no index of a sharded checkpoint"),
        ("[" * 100_000, "is no index of a sharded checkpoint"),
        ('{"weight_map": {"w": 3}}', "cannot read"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "points outside its folder"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "points outside its folder"),
        ('{"weight_map": {"w": ".."}}', "points outside its folder|cannot read"),
        ('{"weight_map": {"w": "missing.safetensors"}}', "cannot read .*missing.safetensors"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(GraphOptError, match=message):
        shrink().apply_files(index, tmp_path / "out")


def test_a_folder_must_hold_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="holds 0 checkpoints"):
        shrink().apply_files(tmp_path, tmp_path / "out")
