"""Check how example inputs are read, named, widened, and found on models that describe them."""

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.capture.inputs import dynamic_dimensions, find_inputs, leaf_names, normalise, widen
from graphopt.errors import CaptureError
from tests.capture.models import Nested, Net, Tied

X, Y = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (X, ((X,), {})),
        ((X, Y), ((X, Y), {})),
        ([X, Y], ((X, Y), {})),
        ({"x": X}, ((), {"x": X})),
        (UserDict({"x": X}), ((), {"x": X})),
        (((X,), {"y": Y}), ((X,), {"y": Y})),
        (([X], {}), ((X,), {})),
        ((X, {"y": Y}), ((X, {"y": Y}), {})),
        (((((X,), {"y": Y})), {}), (((X,), {"y": Y}), {})),
        ((), ((), {})),
    ],
    ids=range(10),
)
def test_one_rule_reads_example_inputs(given: Any, expected: Any) -> None:
    assert normalise(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "example_inputs is a int: pass example_inputs: a tuple"),
        ({1: X}, "a mapping with the key 1, which names no argument"),
        (((X,), {1: X}), "a mapping with the key 1, which names no argument"),
    ],
)
def test_other_example_inputs_are_refused(given: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        normalise(given)


def test_leaves_are_named_as_in_forward() -> None:
    inputs = normalise((([X, X], Y, Y), {"options": {"bias": X}, "double": True}))
    assert leaf_names(Nested(), inputs) == [
        "pair.0",
        "pair.1",
        "more.0",
        "more.1",
        "options.bias",
        "double",
    ]
    with pytest.raises(CaptureError, match="holds 2 positional inputs; forward takes 1: x"):
        leaf_names(Net(), ((X, Y), {}))


class TestDynamicDimensions:
    """Which dimensions vary, as the caller says."""

    inputs = (([X, X], torch.tensor(1.0)), {"y": Y, "flag": 3})
    names = ("x.0", "x.1", "s", "y", "flag")

    def read(self, dynamic: Any) -> dict[int, set[int]]:
        return {k: set(v) for k, v in dynamic_dimensions(dynamic, list(self.names), self.inputs).items()}

    def test_batch_is_the_first_dimension_of_every_tensor_that_has_one(self) -> None:
        assert self.read("batch") == {0: {0}, 1: {0}, 3: {0}}
        assert self.read(None) == {}

    def test_a_mapping_adds_to_the_batch(self) -> None:
        assert self.read({"y": {1: "length"}}) == {0: {0}, 1: {0}, 3: {0, 1}}
        assert self.read({"y": [-1]}) == {0: {0}, 1: {0}, 3: {0, 1}}
        assert self.read({"x": [1], "y": None}) == {0: {0, 1}, 1: {0, 1}, 3: set()}
        assert self.read({"x.1": [1]}) == {0: {0}, 1: {0, 1}, 3: {0}}

    @pytest.mark.parametrize(
        ("dynamic", "message"),
        [
            ({"z": [0]}, "dynamic: unknown tensor input 'z'.* Valid names: x.0, x.1, y"),
            ({"flag": [0]}, "unknown tensor input 'flag'"),
            ({"y": [2]}, r"dynamic\['y'\] names dimension 2; the tensor has 2 dimensions"),
            ({"y": ["length"]}, "names dimension 'length'"),
            (
                {"y": "length"},
                r"dynamic\['y'\] must be \{dimension: name\}, a list of dimensions or None; found 'length'",
            ),
            (
                {"y": {0: "n", 1: "n"}},
                "the name 'n' to dimension 0 of y, of size 2, and to dimension 1 of y, of size 3",
            ),
            ("sequence", "dynamic must be 'batch', None or .*; found 'sequence'"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, dynamic: Any, message: str) -> None:
        with pytest.raises(CaptureError, match=message):
            self.read(dynamic)


def test_widening_repeats_what_varies_and_has_size_one() -> None:
    one, two = torch.tensor([[1.0, 2.0]]), torch.ones(2, 1)
    (wide, same, other), keywords = widen(((one, two, one), {"n": 3}), {0: frozenset({0}), 1: frozenset({0})})
    assert wide.tolist() == [[1, 2], [1, 2], [1, 2]]
    assert same is two
    assert other is one
    assert keywords == {"n": 3}


class Describes(nn.Module):
    """A model that says what it takes, in the way each test gives it."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(facts.pop("channels", 3), 4, 1, dtype=facts.pop("dtype", torch.float32))
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.stem(x).mean((2, 3))


class TakesPixels(nn.Module):
    """A Hugging Face vision model by its attributes."""

    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(1, 4, 1)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        return self.stem(pixel_values)


class TakesIds(Tied):
    """A Hugging Face language model by its attributes."""

    config = SimpleNamespace()
    main_input_name = "ids"
    dummy_inputs = {"ids": torch.tensor([[1, 2, 3]]), "decoder_ids": torch.tensor([[1]])}  # noqa: RUF012


class TestFinding:
    """Models that describe their inputs need none."""

    def test_lightning(self) -> None:
        x = torch.rand(2, 3, 4, 4)
        assert find_inputs(Describes(example_input_array=x))[0][0] is x
        assert find_inputs(Describes(example_input_array={"x": x}))[1] == {"x": x}
        assert len(find_inputs(Describes(example_input_array=(x, None)))[0]) == 2

    @pytest.mark.parametrize("name", ["default_cfg", "pretrained_cfg"])
    def test_timm(self, name: str) -> None:
        (x,), _ = find_inputs(Describes(**{name: {"input_size": (3, 16, 8)}}))
        assert x.shape == (1, 3, 16, 8)
        (x,), _ = find_inputs(Describes(**{name: {"input_size": (3, 16, 8), "first_conv": "stem"}}, channels=1))
        assert x.shape == (1, 1, 16, 8)
        (x,), _ = find_inputs(
            Describes(default_cfg={"input_size": (3, 8, 8)}, patch_embed=SimpleNamespace(img_size=(4, 4)))
        )
        assert x.shape == (1, 3, 4, 4)

    def test_hugging_face_images(self) -> None:
        config = SimpleNamespace(image_size=8, num_channels=1)
        assert find_inputs(TakesPixels(config))[1]["pixel_values"].shape == (1, 1, 8, 8)
        nested = SimpleNamespace(vision_config=SimpleNamespace(image_size=(8, 4), num_channels=1))
        assert find_inputs(TakesPixels(nested))[1]["pixel_values"].shape == (1, 1, 8, 4)

    def test_hugging_face_dummies_are_filtered_by_what_forward_takes(self) -> None:
        assert list(find_inputs(TakesIds())[1]) == ["ids"]
        graph = capture(TakesIds())
        assert graph.module(ids=torch.tensor([[3, 1, 2], [0, 0, 0]])).shape == (2, 3, 11)

    def test_inputs_follow_the_type_and_device_of_the_model(self) -> None:
        (x,), _ = find_inputs(Describes(default_cfg={"input_size": (3, 8, 8)}, dtype=torch.float64))
        assert x.dtype == torch.float64
        (x,), _ = find_inputs(Describes(default_cfg={"input_size": (3, 8, 8)}).to("meta"))
        assert x.device.type == "cpu"  # a model without values is captured as one on the CPU

    @pytest.mark.parametrize(
        "model",
        [Net(), Describes(default_cfg={}), Describes(example_input_array=None), Describes(dummy_inputs={"ids": X})],
    )
    def test_a_model_that_says_nothing_is_refused_with_how_to_pass_inputs(self, model: nn.Module) -> None:
        with pytest.raises(CaptureError, match=r"forward\(x: .* has no example inputs.* a dict of keyword inputs"):
            capture(model)
