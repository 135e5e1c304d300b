"""The bytes of all tensors that are alive at a time, which no allocator blurs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak; torch works within it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do an operation, and take in what it made."""
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, result)
        return result

    def note(self, tensor: Any) -> Any:
        """Take a tensor into the count, until its storage goes."""
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                size = storage.nbytes()
                self.seen[storage] = size
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.bytes -= size

    def take_all(self) -> None:
        """Take in what was made without an operation, such as weights that were read."""
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and not thing.is_meta:
                self.note(thing)
        self.peak = self.bytes
