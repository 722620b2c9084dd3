"""Check that cloned tensors keep their layout, their kind and what they share."""

import pytest
import torch
from torch import nn

from graphopt.capture.tensors import Owner


def owned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Clone ``tensors`` together."""
    owner = Owner(tensors)
    clones = [owner.own(tensor) for tensor in tensors]
    for tensor, clone in zip(tensors, clones, strict=True):
        assert torch.equal(tensor, clone)
        assert (tensor.dtype, tensor.stride(), tensor.requires_grad) == (
            clone.dtype,
            clone.stride(),
            clone.requires_grad,
        )
        assert type(tensor) is type(clone)
        assert clone.data_ptr() != tensor.data_ptr()
        assert clone.grad_fn is None
    return clones


def test_one_object_has_one_clone() -> None:
    weight = nn.Parameter(torch.randn(3))
    first, second = owned(weight, weight)
    assert first is second


@pytest.mark.parametrize(
    "tensor",
    [
        nn.Parameter(torch.randn(3, 4).t()),
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(4), requires_grad=False),
        torch.arange(10)[::2],
        torch.arange(3).expand(2, 3),
        torch.randn(5, 5)[1:3, 2:],
        torch.tensor(3.0),
        torch.ones(3, dtype=torch.bfloat16),
    ],
    ids=range(8),
)
def test_layout_type_and_gradient_are_kept(tensor: torch.Tensor) -> None:
    owned(tensor)


def test_views_of_one_memory_stay_views_of_one_memory() -> None:
    memory = torch.randn(6)
    whole, part = owned(nn.Parameter(memory), memory[2:4])
    with torch.no_grad():
        whole.fill_(5)
    assert part.tolist() == [5, 5]


def test_history_is_left_behind() -> None:
    weight = nn.Parameter(torch.randn(3))
    computed = weight * 2
    clone = Owner([computed]).own(computed)
    assert not clone.requires_grad
    assert torch.equal(clone, computed)


def test_empty_and_meta_tensors_are_cloned() -> None:
    for tensor in (torch.zeros(0, 3), torch.zeros(2, 3, device="meta")):
        clone = Owner([tensor]).own(tensor)
        assert clone is not tensor
        assert (clone.shape, clone.device) == (tensor.shape, tensor.device)
