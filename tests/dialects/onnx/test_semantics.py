"""Compare what operators compute with the results that ONNX ships for them, and their shapes on meta tensors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.dialects.onnx import semantics
from graphopt.dialects.onnx.operators import op
from tests.dialects.onnx.node_cases import Case, cases

LEFT_OUT = {
    "If": "carries a graph",
    "ImageDecoder": "reads image files",
    "Loop": "carries a graph",
    "RegexFullMatch": "works on text",
    "Scan": "carries a graph",
    "SequenceMap": "carries a graph",
    "StringConcat": "works on text",
    "StringNormalizer": "works on text",
    "StringSplit": "works on text",
    "TfIdfVectorizer": "works on text",
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

SHAPES_BY_DATA = {"Compress", "MelWeightMatrix", "NonMaxSuppression", "NonZero", "SplitToSequence", "Unique"}
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
        if isinstance(wanted, list) and isinstance(got, list | tuple) and len(wanted) == len(got):
            pairs = list(zip(wanted, got, strict=True))
        else:
            pairs = [(wanted, got)] if wanted is not None or case.op.name.startswith("Optional") else []
        yield from (f"{number}: {text}" for text in map(difference, pairs, repeat(case)) if text)


def difference(pair: tuple[Any, Any], case: Case) -> str:
    wanted, got = pair
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
