"""Check that computed sizes follow a pruning once: also where they are read off a tensor that shrinks itself."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import torch

from graphopt.capture import capture
from graphopt.dialects import infer
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs

HEADS = """
<ir_version: 9, opset_import: ["" : 20]> heads (float[n, 5, 8] x) => (float[n, 5, 2] out)
<int64[1] first = {0}, int64[1] three = {3}, int64[1] rest = {-1}, int64[2] each = {5, 4},
 int64[2] split = {3, 4}, int64[1] five = {5}, int64[1] width = {12}, int64[1] twenty = {20}>
{
    packed = MatMul (x, weight)
    sizes = Shape (x)
    n = Gather <axis = 0> (sizes, first)
    apart = Concat <axis = 0> (n, five, split)
    heads_last = Reshape (packed, apart)
    heads = Transpose <perm = [0, 2, 1, 3]> (heads_last)
    count = Mul (n, three)
    joined = Concat <axis = 0> (count, each)
    batched = Reshape (heads, joined)
    batched_sizes = Shape (batched)
    as_many = Gather <axis = 0> (batched_sizes, first)
    flat_sizes = Concat <axis = 0> (as_many, rest)
    flat = Reshape (batched, flat_sizes)
    explicit_sizes = Concat <axis = 0> (count, twenty)
    again = Reshape (batched, explicit_sizes)
    active = Mul (flat, again)
    back_sizes = Concat <axis = 0> (n, three, each)
    back = Reshape (active, back_sizes)
    turned = Transpose <perm = [0, 2, 1, 3]> (back)
    out_sizes = Concat <axis = 0> (n, five, width)
    merged = Reshape (turned, out_sizes)
    out = MatMul (merged, projection)
}
"""


def test_a_size_read_off_a_tensor_that_shrinks_is_not_scaled_again() -> None:
    model = onnx.parser.parse_model(HEADS)
    rng = np.random.default_rng(0)
    for name, shape in (("weight", (8, 12)), ("projection", (12, 2))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    typing = infer(capture(model))
    assert sorted(group.size for group in typing.groups) == [3, 4]
    (heads,) = (group for group in typing.groups if group.size == 3)
    keep = {heads.atom: np.array([0, 2])}
    pruned = rewrite(typing, keep)
    for batch in (2, 3):
        x = torch.from_numpy(rng.standard_normal((batch, 5, 8)))
        expected = masked_outputs(typing, keep, (x,), {}, double=True)
        assert difference(expected, evaluate(pruned, (x,), {}, double=True), double=True).relative < 1e-12
