"""Draw random ONNX models, for properties that must hold for every graph of that dialect.

A model is a chain of steps over a state, an image ``(N, c, h, w)`` or tokens ``(N, n, c)``, as in ``random_graphs``.
Every step writes a few nodes and the tensors they read, in the forms that exporters write: products with and without
an addition after them, factors of shape ``(c,)``, ``(c, 1, 1)`` and ``(1, c, 1, 1)``, tensors that several nodes share,
packed maps, branches, batch norms. Widths are small and often distinct; all numbers are double.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.random_graphs import Dice

__all__ = ["onnx_models"]

State: TypeAlias = tuple[int, ...]
"""Sizes without the batch: ``(c, h, w)`` or ``(n, c)``."""

_WIDTHS: Final = (2, 3, 4, 5, 6, 8)


@dataclass
class Sheet:
    """Collect nodes and tensors of one model.

    Attributes:
        dice: what chooses.
        nodes: the nodes so far.
        tensors: the tensors so far, by name.
    """

    dice: Dice
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its first result; further ones end in ``_1`` and so on."""
        name = f"v{len(self.nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """Add a tensor of random numbers, or find one again that has the shape: vectors are often shared."""
        alike = [name for name, each in self.tensors.items() if each.shape == shape and each.dtype == np.float64]
        if alike and len(shape) == 1 and self.dice.random.random() < 0.3:
            return str(self.dice.among(alike))
        random = np.random.default_rng(self.dice.integer(0, 2**31))
        values = random.standard_normal(shape)
        if len(shape) > 1 and self.dice.random.random() < 0.4:  # outputs that are constant, inputs that nobody reads
            values[(slice(None), 0) if self.dice.coin() else 0] = 0
        return self.hold(values)

    def hold(self, values: Any) -> str:
        """Add a tensor and return its name."""
        name = f"t{len(self.tensors)}"
        self.tensors[name] = np.asarray(values)
        return name

    def positive(self, size: int) -> str:
        """Add a vector of positive numbers."""
        random = np.random.default_rng(self.dice.integer(0, 2**31))
        return self.hold(random.uniform(0.5, 2.0, size))


Step: TypeAlias = Callable[[Sheet, str, State], tuple[str, State]]


def _is_image(state: State) -> bool:
    return len(state) == 3


def _layer(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Add a convolution or a linear layer in one of its forms."""
    dice, out = sheet.dice, sheet.dice.among(_WIDTHS)
    if _is_image(state):
        return _conv(sheet, x, state, out)
    n, c = state
    y = sheet.node("MatMul", x, sheet.weight(c, out))
    if dice.coin():
        bias = sheet.weight(*dice.pick((out,), (1, out), (1, 1, out), (1,)))
        y = sheet.node("Add", *dice.pick((y, bias), (bias, y)))
    return y, (n, out)


def _conv(sheet: Sheet, x: str, state: State, out: int) -> tuple[str, State]:
    dice, (c, h, w) = sheet.dice, state
    if dice.random.random() < 0.2:
        weight = sheet.weight(c, out, 1, 1)
        return sheet.node("ConvTranspose", x, weight, *([sheet.weight(out)] if dice.coin() else [])), (out, h, w)
    groups = c if dice.random.random() < 0.2 else 1
    out = c if groups > 1 else out
    kernel = dice.pick(1, 3)
    options: dict[str, Any] = {"group": groups} if groups > 1 else {}
    if kernel == 3:
        padding = dice.pick({"pads": [1, 1, 1, 1]}, {"pads": [0, 2, 2, 0]}, {"auto_pad": "SAME_UPPER"})
        options.update(padding)
    bias = [sheet.weight(out)] if dice.coin() else []
    return sheet.node("Conv", x, sheet.weight(out, c // groups, kernel, kernel), *bias, **options), (out, h, w)


def _gemm(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Go through matrices and back; a Gemm has transposed weights and factors."""
    if _is_image(state):
        return _layer(sheet, x, state)
    dice, (n, c), out = sheet.dice, state, sheet.dice.among(_WIDTHS)
    flat = sheet.node("Reshape", x, sheet.hold(np.array([-1, c])))
    turned = dice.coin()
    options: dict[str, Any] = {"transB": int(turned)} if turned else {}
    if dice.coin():
        options |= {"alpha": 0.5, "beta": 2.0}
    bias = [sheet.weight(*dice.pick((out,), (1, out), (1,)))] if dice.coin() else []
    weight = sheet.weight(out, c) if turned else sheet.weight(c, out)
    y = sheet.node("Gemm", flat, weight, *bias, **options)
    if dice.coin():
        y = sheet.node("Mul", y, sheet.weight(out))
    return sheet.node("Reshape", y, sheet.hold(np.array([-1, n, out]))), (n, out)


def _affine(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Scale or shift, by channel or by one number."""
    dice = sheet.dice
    if _is_image(state):
        c = state[0]
        shape = dice.pick((c, 1, 1), (1, c, 1, 1), (), (1,))
    else:
        shape = dice.pick((state[1],), (1, 1, state[1]), (), (1, 1))
    operator = dice.pick("Mul", "Add", "Sub", "Div")
    if operator == "Div":
        size = int(np.prod(shape)) if shape else 1
        factor = sheet.hold(sheet.tensors[sheet.positive(size)].reshape(shape))
    else:
        factor = sheet.weight(*shape)
    operands = (factor, x) if operator in ("Mul", "Add") and dice.coin() else (x, factor)
    return sheet.node(operator, *operands), state


def _norm(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    c = state[0]  # dimension 1, of images and of tokens
    statistics = (sheet.weight(c), sheet.weight(c), sheet.weight(c), sheet.positive(c))
    return sheet.node("BatchNormalization", x, *statistics), state


def _activation(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    return sheet.node(sheet.dice.pick("Relu", "Sigmoid", "Tanh", "Softplus", "Identity", "Dropout"), x), state


def _residual(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Add up branches of one input, itself among them at times."""
    size = sheet.dice.among(_WIDTHS)
    if not _is_image(state):
        y = sheet.node("MatMul", x, sheet.weight(state[1], size))
        y = sheet.node(sheet.dice.pick("Relu", "Identity"), y)
        return sheet.node("Add", x, sheet.node("MatMul", y, sheet.weight(size, state[1]))), state
    y, _ = _conv(sheet, x, state, state[0])
    z = x if sheet.dice.coin() else _conv(sheet, x, state, state[0])[0]
    return sheet.node("Add", y, z), state


def _packed(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Make two gates in one product, or in two, and cut them apart."""
    if _is_image(state):
        return _residual(sheet, x, state)
    dice, (n, c), out = sheet.dice, state, sheet.dice.among(_WIDTHS)
    if dice.coin():
        y = sheet.node("Add", sheet.node("MatMul", x, sheet.weight(c, 2 * out)), sheet.weight(2 * out))
        y = sheet.node("Split", y, outputs=2, axis=-1, num_outputs=2)
        gates = (y, f"{y}_1")
    else:
        first = sheet.node("MatMul", x, sheet.weight(c, out))
        gates = (first, sheet.node("Add", sheet.node("MatMul", x, sheet.weight(c, out)), sheet.weight(out)))
    return sheet.node("Mul", sheet.node("Sigmoid", gates[0]), gates[1]), (n, out)


def _turn(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Turn an image into tokens, or exchange the dimensions of tokens."""
    if _is_image(state):
        c, h, w = state
        y = sheet.node("Reshape", x, sheet.hold(np.array([0, c, h * w])))
        return sheet.node("Transpose", y, perm=[0, 2, 1]), (h * w, c)
    n, c = state
    return sheet.node("Transpose", x, perm=[0, 2, 1]), (c, n)


def _computed(sheet: Sheet, x: str, state: State) -> tuple[str, State]:
    """Add what follows from tensors of the model alone, twice."""
    c = state[0] if _is_image(state) else state[1]
    shape = (1, c, 1, 1) if _is_image(state) else (1, 1, c)
    v = sheet.weight(c)
    first = sheet.node("Reshape", sheet.node("Exp", v), sheet.hold(np.array(shape)))
    second = sheet.node("Reshape", sheet.node("Exp", v), sheet.hold(np.array(shape)))
    return sheet.node("Mul", sheet.node("Add", x, first), second), state


_STEPS: Final[tuple[Step, ...]] = (
    _layer,
    _layer,
    _layer,
    _gemm,
    _affine,
    _affine,
    _norm,
    _activation,
    _residual,
    _packed,
    _turn,
    _computed,
)


def drawn(seed: int, length: int) -> onnx.ModelProto:
    """Return the model that a seed stands for."""
    sheet = Sheet(Dice(seed))
    start: State = sheet.dice.pick((3, 5, 4), (4, 6, 5), (5, 6), (7, 4))
    x, state = "x", start
    for _ in range(length):
        x, state = sheet.dice.among(_STEPS)(sheet, x, state)
    y = sheet.node("Tanh", x)
    graph = helper.make_graph(
        sheet.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["N", *start])],
        [helper.make_tensor_value_info(y, TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(values, name) for name, values in sheet.tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def onnx_models() -> st.SearchStrategy[onnx.ModelProto]:
    """Return a strategy that draws models of one to eight steps."""
    return st.builds(drawn, st.integers(0, 2**31), st.integers(1, 8))
