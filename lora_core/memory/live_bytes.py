"""Counts the bytes that are alive while operations run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_core.model.decoder import grouped_product, split_evenly_if_unknown


class LiveBytes(TorchDispatchMode):
    """Counts the storage that is alive while operations run, by component, and remembers the peak."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_loss_tokens = 0
        self._at_peak: dict[str, int] = {}
        self._vocab_size = vocab_size
        self._now: dict[str, int] = {}
        self._total = self._peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def count(self, tensor: Tensor, component: str) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._now[component] = self._now.get(component, 0) + size
        self._total += size

        def freed(_: Any) -> None:
            del self._alive[key]
            self._now[component] -= size
            self._total -= size

        self._alive[key] = weakref.ref(storage, freed)
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, dict(self._now)

    def take_peak(self) -> dict[str, int]:
        """Bytes by component at the peak since the last call."""
        at_peak = self._at_peak
        self._peak, self._at_peak = self._total, dict(self._now)
        return at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            # The one operation whose size depends on values: how many loss tokens there are.
            result: Any = torch.empty((self.num_loss_tokens, args[0].dim()), dtype=torch.long)
        elif func is torch.ops.aten._grouped_mm.default:
            # torch's rule for tensors without storage allows bfloat16 alone; its kernels on CPUs take float32 too.
            result = grouped_product(*args, **(kwargs or {}))
        elif func is torch.ops.aten.split_with_sizes.default:
            result = split_evenly_if_unknown(*args, **(kwargs or {}))
        elif func is torch.ops.aten._local_scalar_dense.default:
            # A look at a value that there is not, such as the longest position, by which some rotary embeddings grow.
            try:
                return func(*args)
            except DataDependentOutputException:
                return 0
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
                self.count(tensor, "logits" if is_logits else "activations")
        return result
