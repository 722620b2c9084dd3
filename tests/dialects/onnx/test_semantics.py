"""Compare what operators compute with the results that ONNX ships for them, and their shapes on meta tensors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from graphopt.dialects.onnx import semantics
from graphopt.dialects.onnx.operators import op
from graphopt.sweep import default_dtype, promote
from tests.dialects.onnx.node_cases import Case, cases

LEFT_OUT = {
    "ImageDecoder": "ONNX Runtime reads no images either",
    "StringNormalizer": "ONNX Runtime wants the language en_US, which not every machine has",
}
"""Operators that have cases and no semantics, and why."""

CASES_LEFT_OUT = {
    "bernoulli*": "draws random numbers",
    "cast*_FLOAT4E2M1*": "torch has no type of four bits with an exponent",
    "cast*_to_FLOAT4E2M1*": "torch has no type of four bits with an exponent",
    "cast_e8m0_*_to_FLOAT8E8M0": "torch has no arithmetic with powers of two alone",
    "castlike_*_to_INT[24]": "a byte does not say that it stands for fewer bits",
    "castlike_*_to_UINT[24]": "a byte does not say that it stands for fewer bits",
    "dequantizelinear_float4e2m1": "torch has no type of four bits with an exponent",
    "equal_string": "works on text",
    "equal_string_broadcast": "works on text",
    "loop1[36]*": "its state is a sequence that begins empty, of a type that nothing tells",
    "quantizelinear_float4e2m1": "torch has no type of four bits with an exponent",
    "quantizelinear_int[24]": "a byte does not say that it stands for fewer bits",
    "quantizelinear_uint2": "a byte does not say that it stands for fewer bits",
    "range_bfloat16_type_positive_delta": "a Python number does not say bfloat16",
    "range_float16_type_positive_delta": "a Python number does not say float16",
    "range_int32_type_negative_delta": "a Python number does not say int32",
    "resize_downsample_scales_*_align_corners": "ONNX's results take the output for 2.4 positions long, ours for 2",
    "training_dropout": "draws random numbers",
    "training_dropout_default": "draws random numbers",
    "training_dropout_default_mask": "draws random numbers",
    "training_dropout_mask": "draws random numbers",
}
"""Patterns of single cases of other operators that cannot be compared, and why."""

SHAPES_BY_DATA = {
    *("Compress", "MelWeightMatrix", "NonMaxSuppression", "NonZero", "SplitToSequence", "Unique"),
    *("If", "Loop", "SequenceMap", "StringConcat", "StringSplit", "RegexFullMatch"),
}
"""Operators of which a meta tensor does not tell the result's shape."""

WITHOUT_TENSORS = {
    *("BlackmanWindow", "Constant", "ConstantOfShape", "HammingWindow", "HannWindow", "OptionalHasElement", "Range")
}
"""Operators that no tensor tells the device to make theirs on."""


@cache
def by_operator() -> dict[str, list[Case]]:
    found = defaultdict(list)
    for case in cases().values():
        found[case.op.name].append(case)
    return found


def operators() -> list[str]:
    return sorted(set(by_operator()) - set(LEFT_OUT))


def failure(case: Case) -> str:
    """Return in what a case's results differ from the expected ones; empty if in nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = case.run()
    except Exception as error:  # noqa: BLE001  # one broken case does not hide the others
        return f"{type(error).__name__}: {error}"
    return next(differences(case, found), "")


def differences(case: Case, found: tuple[Any, ...]) -> Iterator[str]:
    if len(found) < len(case.expected):
        yield f"{len(found)} results instead of {len(case.expected)}"
    for number, (wanted, got) in enumerate(zip(case.expected, found, strict=False)):
        if isinstance(wanted, list) and isinstance(got, list | tuple) and len(wanted) == len(got):
            pairs = list(zip(wanted, got, strict=True))
        else:
            pairs = [(wanted, got)] if wanted is not None or case.op.name.startswith("Optional") else []
        yield from (f"{number}: {text}" for text in map(difference, pairs, repeat(case)) if text)


def difference(pair: tuple[Any, Any], case: Case) -> str:
    wanted, got = pair
    if isinstance(wanted, np.ndarray) and isinstance(got, np.ndarray):
        return "" if wanted.tolist() == got.tolist() else f"{got} for {wanted}"
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return "" if wanted is None and got is None else f"{type(got).__name__} for {type(wanted).__name__}"
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        return f"{got.dtype}{list(got.shape)} for {wanted.dtype}{list(wanted.shape)}"
    if torch.allclose(got.double(), wanted.double(), *tolerances(case, wanted), equal_nan=True):
        return ""
    return f"off by {(got.double() - wanted.double()).abs().max()}"


def tolerances(case: Case, wanted: Tensor) -> tuple[float, float]:
    """Return the case's tolerances, widened by the last digits, as sums may be taken in any order."""
    if not wanted.is_floating_point() or wanted.itemsize == 1 or not wanted.numel():
        return case.rtol, case.atol
    last = torch.finfo(wanted.dtype).eps
    if wanted.itemsize == 2:
        return max(case.rtol, last), max(case.atol, last)
    return case.rtol, max(case.atol, 8 * last * wanted[wanted.isfinite()].abs().sum().item() ** 0.5)


@pytest.mark.parametrize("name", operators())
def test_results_are_those_that_onnx_ships(name: str) -> None:
    wrong = {case.name: failure(case) for case in by_operator()[name] if not left_out(case)}
    assert not {n: text for n, text in wrong.items() if text}


def left_out(case: Case) -> bool:
    return any(matches(case, pattern) for pattern in CASES_LEFT_OUT)


def matches(case: Case, pattern: str) -> bool:
    return fnmatchcase(case.name.removeprefix("test_"), pattern)


@pytest.mark.parametrize("name", sorted(set(operators()) - SHAPES_BY_DATA))
def test_meta_tensors_give_the_same_shapes(name: str) -> None:
    for case in by_operator()[name]:
        if left_out(case):
            continue
        wanted = [spec(v) for v in case.run()]
        found = case.run("meta")
        assert [spec(v) for v in found] == wanted, case.name
        if name not in WITHOUT_TENSORS:
            assert {v.device.type for v in tensors(found)} <= {"meta"}, case.name


def spec(value: Any) -> Any:
    return [(list(t.shape), t.dtype) for t in tensors(value)]


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def test_what_is_left_out_has_no_semantics() -> None:
    for name in LEFT_OUT:
        assert name not in semantics._table()
        assert any(failure(case) for case in by_operator()[name]) or name == "StringNormalizer"


def test_single_cases_that_are_left_out_fail() -> None:
    for pattern in CASES_LEFT_OUT:
        found = [case for case in cases().values() if case.op.name not in LEFT_OUT and matches(case, pattern)]
        assert found, pattern
        assert not [case.name for case in found if not failure(case)]


def test_a_wrong_result_is_noticed() -> None:
    case = cases()["test_relu"]
    assert not failure(case)
    (x,) = case.args
    assert "off by" in failure(Case("x", case.op, (x + 0.1,), {}, case.expected, case.rtol, case.atol))
    assert "for torch" in failure(Case("x", case.op, (x.double(),), {}, case.expected, case.rtol, case.atol))
    assert failure(Case("x", op("Gemm"), (x,), {}, case.expected, case.rtol, case.atol)).startswith("TypeError")


def test_every_key_is_an_operator() -> None:
    for key in semantics._table():
        assert op(key).key == key


# -- precision, gradients, arguments ---------------------------------------------------------------------------------

INEXACT = {
    "BitCast": "the same bits are another number",
    "Cast": "float64 stands for every type that is asked for",
    "CastLike": "float64 stands for every type that is asked for",
    "DynamicQuantizeLinear": "rounds to eight bits, by a range that a last digit may move",
    "QuantizeLinear": "rounds to few bits",
}
"""Operators whose results in float64 may differ by more than rounding from those in their own precision."""


@pytest.mark.parametrize("name", sorted(set(operators()) - set(INEXACT)))
def test_results_are_the_same_in_double_precision(name: str) -> None:
    """As a graph is evaluated in float64: with its inputs promoted and float64 for every type asked for."""
    for case in by_operator()[name]:
        if left_out(case) or not any(t.dtype == torch.float32 for t in tensors([*case.args])):
            continue
        with default_dtype(torch.float64):
            found = replace(case, args=map_aggregate(case.args, promote)).run()
        assert not [t.dtype for t in tensors(found) if t.is_floating_point() and t.dtype != torch.float64], case.name
        for a, b in both(case, found):
            rtol, atol = tolerances(case, b)
            assert torch.allclose(a.double(), b.double(), rtol, max(atol, 1e-6), equal_nan=True), case.name


def both(case: Case, found: tuple[Any, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the results that are tensors, each with the expected one."""
    for got, wanted in zip(found, case.expected, strict=False):
        if wanted is not None:
            yield from zip(tensors(got), tensors(wanted), strict=True)


@pytest.mark.parametrize("name", operators())
def test_arguments_are_not_written_to(name: str) -> None:
    for case in by_operator()[name]:
        given = tensors([*case.args])
        before = [t.clone() for t in given]
        if not left_out(case):
            case.run()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(given, before, strict=True)), case.name


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor in a form that tells NaN from NaN."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


GRADIENTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Attention": ([draw(1, 4, 3, 2), draw(1, 2, 5, 2), draw(1, 2, 5, 2)], {"is_causal": 1, "softcap": 2.0}),
    "AveragePool": ([draw(1, 2, 5, 5)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1}),
    "BatchNormalization": ([draw(2, 3, 4), draw(3), draw(3), draw(3), draw(3) ** 2], {}),
    "Conv": ([draw(1, 2, 5, 4), draw(3, 2, 2, 3), draw(3)], {"pads": [1, 0, 0, 2]}),
    "ConvTranspose": ([draw(1, 2, 4, 3), draw(2, 2, 3, 2)], {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
    "DequantizeLinear": ([torch.arange(6, dtype=torch.int8).reshape(2, 3), draw(3)], {}),
    "Gather": ([draw(3, 4), torch.tensor([-1, 0, 0])], {"axis": 1}),
    "Gemm": ([draw(3, 2), draw(4, 3), draw(4)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    "GroupNormalization": ([draw(2, 4, 3), draw(4), draw(4)], {"num_groups": 2}),
    "LRN": ([draw(1, 5, 2, 2)], {"size": 3}),
    "LSTM": ([draw(3, 2, 2), draw(1, 8, 2), draw(1, 8, 2), draw(1, 16)], {"hidden_size": 2}),
    "LayerNormalization": ([draw(2, 3, 4), draw(4), draw(4)], {}),
    "RMSNormalization": ([draw(2, 3, 4), draw(4)], {}),
    "Resize": ([draw(1, 1, 4, 3), None, [1.0, 1.0, 1.6, 0.7]], {"mode": "cubic"}),
    "RotaryEmbedding": ([draw(1, 3, 8), draw(1, 3, 2), draw(1, 3, 2)], {"num_heads": 2}),
    "ScatterElements": ([draw(3, 3), torch.tensor([[0, 2, 0]]), draw(1, 3)], {"reduction": "add"}),
    "com.microsoft.MultiHeadAttention": ([draw(1, 3, 4), draw(1, 3, 4), draw(1, 3, 4), draw(12)], {"num_heads": 2}),
}
"""Calls whose gradients are compared with differences of the results."""


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_are_those_of_the_results(key: str) -> None:
    args, attributes = GRADIENTS[key]
    leaves = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    if key == "BatchNormalization":
        del leaves[3:]  # torch gives statistics no gradient

    def function(*given: Tensor) -> Any:
        values = iter(given)
        return op(key)(*(next(values) if any(a is t for t in leaves) else a for a in args), **attributes)

    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in leaves])


HALVES = ("Attention", "Conv", "Gemm", "Gelu", "LayerNormalization", "MatMul", "ReduceMean", "Resize", "Sigmoid")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_stays_half_and_comes_close(name: str, dtype: torch.dtype) -> None:
    for case in by_operator()[name]:
        if left_out(case) or not all(t.dtype == torch.float32 for t in tensors([*case.args]) if t.is_floating_point()):
            continue
        args = map_aggregate(case.args, lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v)
        found = replace(case, args=args).run()
        for a, b in both(case, found):
            scale = b[b.isfinite()].abs().max() + 1 if b.numel() else 1
            if name != "LayerNormalization" or a is found[0]:
                assert a.dtype == dtype, case.name
            assert torch.allclose(a.double() / scale, b.double() / scale, 0, 0.05), case.name
