"""SAM in one file to copy, for PyTorch alone: correct where the sixty lines that everyone copies are not.

    sam = SAM(model, rho=0.05)  # model: also a DistributedDataParallel
    loss = sam.backward([lambda: criterion(model(x), y)])
    optimizer.step()  # your optimizer, with its schedule, clipping, momentum and state

Under a GradScaler: ``sam.backward(closures, scaler)``, then ``scaler.unscale_``, clipping, ``scaler.step``, ``scaler.update``. To
accumulate gradients, give one closure for each of n micro-batches, which bind what differs between them:
``[lambda x=x, y=y: criterion(model(x), y) / n for x, y in micro_batches]``.
gradreg has the same and the rest: other penalties, FSDP2, closures that draw random numbers by NumPy or Python, state in frozen tensors.
"""

import contextlib

import torch


class SAM:
    def __init__(self, model, rho=0.05, warmup=0):
        self.model, self.rho, self.warmup, self.step = model, rho, warmup, 0  # plain gradients in the first ``warmup`` steps

    def backward(self, closures, scaler=None):
        """Leave the gradient at θ + ρ·g/‖g‖ in ``.grad``, and return the loss at θ; closures run the forward pass and return a loss."""
        scale = (lambda loss: loss) if scaler is None else scaler.scale
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = None
        sam, self.step = self.step >= self.warmup, self.step + 1
        loss, starts = 0.0, []
        for i, closure in enumerate(closures):
            starts.append(self._state())
            with self._no_sync(sam or i < len(closures) - 1):  # each process perturbs by its own gradient: one all-reduce a step
                value = closure()
                scale(value).backward()
            loss = loss + value.detach()
        if not sam:
            return loss
        end, reached = self._state(), [p for p in parameters if p.grad is not None]
        gradients, weights = [p.grad for p in reached], [p.detach().clone() for p in reached]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))  # frozen parameters do not count
        finite = bool(torch.isfinite(norm))  # if the loss scale was too large, the second pass must give NaN, so that the scaler skips
        try:
            if finite and norm > 0:
                with torch.no_grad():
                    torch._foreach_add_(reached, torch._foreach_mul(gradients, self.rho / norm))  # the loss scale cancels
            for p in parameters:
                p.grad = None
            for i, (closure, start) in enumerate(zip(closures, starts, strict=True)):
                self._load(start)  # the same dropout masks, and the buffers that the first pass read
                with self._no_sync(i < len(closures) - 1):
                    scale(closure() * (1.0 if finite else float("nan"))).backward()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(reached, weights)  # bit for bit: subtracting the perturbation would leave rounding errors
            self._load(end)  # running statistics and random numbers as the first pass left them
        return loss

    def state_dict(self):
        return {"step": self.step}  # the momentum is in your optimizer, and in its state_dict()

    def load_state_dict(self, state):
        self.step = state["step"]

    def _no_sync(self, wanted):
        return self.model.no_sync() if wanted and hasattr(self.model, "no_sync") else contextlib.nullcontext()

    def _state(self):
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return [b.clone() for b in self.model.buffers()], torch.get_rng_state(), cuda

    def _load(self, state):
        buffers, cpu, cuda = state
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
