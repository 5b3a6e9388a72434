"""What passes share: the random numbers (dropout masks), and the buffers (batch statistics) that only the first pass may change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class RandomNumbers:
    """The default random generators of the CPU and of the given devices, captured and put back."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)

    def capture(self) -> list[Tensor]:
        """The generators' states, CPU first."""
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


class ForwardBuffers:
    """The buffers that a forward pass changes, whatever kind of layer they belong to.

    A changed buffer is one written in place (its version counter moved) or replaced by a new tensor. PyTorch's batch normalization writes
    its statistics without moving the counter, so buffers of their kind (floating point, one dimension) count as changed always. Nothing
    is copied for other buffers that a forward pass leaves alone, and no list of layer types is kept, so normalization layers of one's own
    are covered.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._before: dict[tuple[int, str], tuple[Tensor, int]] = {}
        self._after: list[tuple[nn.Module, str, Tensor]] = []
        self._copies: dict[tuple[int, str], Tensor] = {}
        self._values: list[tuple[list[Tensor], list[Tensor]]] = []

    def watch(self) -> None:
        """Note every buffer before the first pass."""
        self._before = {(i, name): (buffer, buffer._version) for i, name, buffer in self._buffers()}

    @torch.no_grad()
    def keep(self) -> None:
        """After the first pass: remember the values of those that changed."""
        self._after = []
        changed: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for i, name, buffer in self._buffers():
            before = self._before.get((i, name))
            unseen = buffer.dim() == 1 and buffer.is_floating_point()
            if unseen or before is None or before[0] is not buffer or before[1] != buffer._version:
                self._after.append((self._modules[i], name, buffer))
                values, buffers = changed.setdefault((buffer.dtype, buffer.device), ([], []))
                values.append(self._copy_of((i, name), buffer))
                buffers.append(buffer)
        self._before = {}
        self._values = list(changed.values())
        for values, buffers in self._values:
            torch._foreach_copy_(values, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the remembered buffers the tensors and values that they had after the first pass."""
        for values, buffers in self._values:
            torch._foreach_copy_(buffers, values)
        for module, name, buffer in self._after:
            module._buffers[name] = buffer
        self._after, self._values = [], []

    def _copy_of(self, key: tuple[int, str], buffer: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype or copy.device != buffer.device:
            copy = self._copies[key] = torch.empty_like(buffer)
        return copy

    def _buffers(self) -> Iterable[tuple[int, str, Tensor]]:
        for i, module in enumerate(self._modules):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    yield i, name, buffer
