"""Compare what operators compute with the results that ONNX ships for them, and their shapes on meta tensors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.dialects.onnx import semantics
from graphopt.dialects.onnx.operators import op
from tests.dialects.onnx.node_cases import Case, cases

LEFT_OUT = {
    "AffineGrid": "to do",
    "Attention": "to do",
    "Bernoulli": "draws random numbers",
    "BitCast": "to do",
    "BlackmanWindow": "to do",
    "CausalConvWithState": "to do",
    "Col2Im": "to do",
    "ConvInteger": "to do",
    "DFT": "to do",
    "DeformConv": "to do",
    "DequantizeLinear": "to do",
    "Det": "to do",
    "DynamicQuantizeLinear": "to do",
    "GRU": "to do",
    "GridSample": "to do",
    "HammingWindow": "to do",
    "HannWindow": "to do",
    "If": "carries a graph",
    "ImageDecoder": "reads image files",
    "LSTM": "to do",
    "LinearAttention": "to do",
    "Loop": "carries a graph",
    "MatMulInteger": "to do",
    "MaxUnpool": "to do",
    "MelWeightMatrix": "to do",
    "NegativeLogLikelihoodLoss": "to do",
    "NonMaxSuppression": "to do",
    "OptionalGetElement": "holds optional values",
    "OptionalHasElement": "holds optional values",
    "QLinearConv": "to do",
    "QLinearMatMul": "to do",
    "QuantizeLinear": "to do",
    "RNN": "to do",
    "RegexFullMatch": "works on text",
    "Resize": "to do",
    "RoiAlign": "to do",
    "RotaryEmbedding": "to do",
    "STFT": "to do",
    "Scan": "carries a graph",
    "SequenceInsert": "holds sequences",
    "SequenceMap": "carries a graph",
    "SoftmaxCrossEntropyLoss": "to do",
    "SplitToSequence": "holds sequences",
    "StringConcat": "works on text",
    "StringNormalizer": "works on text",
    "StringSplit": "works on text",
    "TensorScatter": "to do",
    "TfIdfVectorizer": "works on text",
    "Upsample": "to do",
}
"""Operators that have cases and no semantics, and why."""

CASES_LEFT_OUT = {
    "cast*_FLOAT4E2M1*": "torch has no type of four bits with an exponent",
    "cast*_to_FLOAT4E2M1*": "torch has no type of four bits with an exponent",
    "cast_e8m0_*_to_FLOAT8E8M0": "torch has no arithmetic with powers of two alone",
    "castlike_*_to_INT[24]": "a byte does not say that it stands for fewer bits",
    "castlike_*_to_UINT[24]": "a byte does not say that it stands for fewer bits",
    "equal_string": "works on text",
    "equal_string_broadcast": "works on text",
    "identity_opt": "holds optional values",
    "identity_sequence": "holds sequences",
    "range_bfloat16_type_positive_delta": "a Python number does not say bfloat16",
    "range_float16_type_positive_delta": "a Python number does not say float16",
    "range_int32_type_negative_delta": "a Python number does not say int32",
    "training_dropout": "draws random numbers",
    "training_dropout_default": "draws random numbers",
    "training_dropout_default_mask": "draws random numbers",
    "training_dropout_mask": "draws random numbers",
}
"""Patterns of single cases of other operators that cannot be compared, and why."""

SHAPES_BY_DATA = {"Compress", "NonMaxSuppression", "NonZero", "Unique"}
"""Operators of which a meta tensor does not tell the result's shape."""

WITHOUT_TENSORS = {"Constant", "ConstantOfShape", "Range"}
"""Operators that no tensor tells the device to make theirs on."""


@cache
def by_operator() -> dict[str, list[Case]]:
    found = defaultdict(list)
    for case in cases().values():
        found[case.op.name].append(case)
    return found


def operators() -> list[str]:
    return sorted(set(by_operator()) - set(LEFT_OUT))


def described(name: str) -> bool:
    try:
        semantics.semantics_of(name)
    except NotImplementedError:
        return False
    return True


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
        if wanted is None:
            continue
        if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
            yield f"{number}: {type(got).__name__} for {type(wanted).__name__}"
        elif (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
            yield f"{number}: {got.dtype}{list(got.shape)} for {wanted.dtype}{list(wanted.shape)}"
        elif not torch.allclose(got.double(), wanted.double(), case.rtol, case.atol, equal_nan=True):
            yield f"{number}: off by {(got.double() - wanted.double()).abs().max()}"


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
            assert {v.device.type for v in found if isinstance(v, Tensor)} == {"meta"}, case.name


def spec(value: Any) -> Any:
    return (list(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)


def test_what_is_left_out_has_no_semantics() -> None:
    assert not [name for name in LEFT_OUT if described(name)]
    assert set(LEFT_OUT) <= set(by_operator())


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
