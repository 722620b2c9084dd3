"""Give a graph tensors of its own: same values, layout and sharing, other memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


class Owner:
    """Clone tensors once each.

    A tensor that occurs under several names is cloned once, so that tied parameters stay one object. Tensors that
    are different views of one storage stay views of one (other) storage. Strides, dtype, device and
    ``requires_grad`` are kept; history is not. Fake tensors become tensors on the meta device.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Count which storages are shared among ``tensors``, all those that will be asked for."""
        self._clones: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        distinct = {id(tensor): tensor for tensor in tensors}
        users: dict[int, int] = {}
        for tensor in distinct.values():
            if (key := _storage_key(tensor)) is not None:
                users[key] = users.get(key, 0) + 1
        self._shared = {key for key, count in users.items() if count > 1}

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the clone of ``tensor``, the same one for the same object."""
        found = self._clones.get(id(tensor))
        if found is None:
            data = self._clone(tensor.detach())
            clone = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
            # The original is kept beside its clone: an id is only unique while its object lives.
            found = self._clones[id(tensor)] = (tensor, clone)
        return found[1]

    def _clone(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        key = _storage_key(tensor)
        if key is None:
            return tensor.clone()
        if key not in self._shared:
            clone = tensor.clone(memory_format=torch.preserve_format)
            if clone.stride() == tensor.stride():
                return clone
        storage = self._storages.get(key)
        if storage is None:
            storage = self._storages[key] = tensor.untyped_storage().clone()
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _storage_key(tensor: torch.Tensor) -> int | None:
    # Only plain strided tensors with memory have a storage that can be copied and viewed anew.
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.device.type == "meta" or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.untyped_storage().data_ptr() or None
