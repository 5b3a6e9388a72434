"""Whatever is measured, and whatever is raised, the model is bit for bit as it was, and every evaluation is of one function."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradreg import sharpness

from .cases import mlp


class Restless(nn.Module):
    """Dropout, BatchNorm, an EMA that the next pass reads, a counter, a generator of its own, and draws from every global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)
        self.teacher = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("seen", torch.zeros(8))
        self.generator = torch.Generator().manual_seed(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(self.first(x)) + self.seen + 0.1 * random.random() + 0.1 * float(np.random.rand())
        h = h * torch.rand(8, generator=self.generator) * self.teacher
        self.seen = (0.9 * self.seen + h.mean(0)).detach()
        self.teacher.data.mul_(0.9).add_(self.first.weight.data.mean(1), alpha=0.1)
        return self.last(self.drop(torch.tanh(h)))


def restless() -> tuple[Restless, Callable[[], Tensor]]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Restless().double()
    x, y = torch.randn(10, 6).double(), torch.randn(10, 3).double()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    model.norm.eval()  # modules may differ in mode
    return model, lambda: nn.functional.mse_loss(model(x), y)


def fingerprint(model: Restless) -> list[Any]:
    return [
        {k: v.clone() for k, v in model.state_dict().items()},
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()],
        [m.training for m in model.modules()],
        (model.calls, model.generator.get_state(), sorted(vars(model))),
        (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()),
    ]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


MEASURES: dict[str, Callable[..., Any]] = {
    "eigenvalues": lambda m, c, **o: sharpness.eigenvalues(m, c, **o).values,
    "differences": lambda m, c, **o: sharpness.eigenvalues(m, c, products="differences", **o).values,
    "trace": lambda m, c, **o: torch.tensor(sharpness.trace(m, c, samples=3, **o).samples),
    "spectrum": lambda m, c, **o: torch.from_numpy(sharpness.spectrum(m, c, samples=2, steps=5, **o).nodes),
    "sam": lambda m, c, **o: sharpness.sam_sharpness(m, c, rho=0.1, **o).samples,
    "m-sharpness": lambda m, c, **o: sharpness.sam_sharpness(m, c, rho=0.1, perturb="each", **o).samples,
    "random": lambda m, c, **o: sharpness.random_sharpness(m, c, rho=0.1, samples=3, **o).samples,
    "directional": lambda m, c, **o: sharpness.directional_sharpness(m, c, direction={"last.bias": torch.ones(3)}, rho=0.1, **o).samples,
    "critical": lambda m, c, **o: sharpness.critical_sharpness(m, c, **o).bracket,
    "slice": lambda m, c, **o: sharpness.slice_1d(m, c, points=3, **o).losses.tolist(),
    "operator": lambda m, c, **o: torch.from_numpy(
        sharpness.hessian(m, c, **o) @ np.ones(sum(p.numel() for p in m.parameters() if p.requires_grad))
    ),
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
MODES = {"as it is": {"mode": "train"}, "eval": {"mode": "eval"}}


@every_measure
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("closures", [1, 3])
def test_the_model_is_as_it_was_and_numbers_repeat(measure: Callable[..., Any], options: dict[str, str], closures: int) -> None:
    model, closure = restless()
    given = closure if closures == 1 else [closure] * 3
    before = fingerprint(model)
    first = measure(model, given, **options)
    assert_same(before, fingerprint(model))
    assert_same(first, measure(model, given, **options))
    assert_same(before, fingerprint(model))


def raising(closure: Callable[[], Tensor], when: int) -> Callable[[], Tensor]:
    """The closure, which raises when it is called for the ``when``-th time, after its forward pass."""
    calls = [0]

    def wrapped() -> Tensor:
        loss = closure()
        calls[0] += 1
        if calls[0] == when:
            raise KeyboardInterrupt
        return loss

    return wrapped


@every_measure
@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_the_model_is_as_it_was_after_an_exception(measure: Callable[..., Any], when: int) -> None:
    model, closure = restless()
    before = fingerprint(model)
    try:
        measure(model, [raising(closure, when), closure], mode="train")
    except KeyboardInterrupt:
        assert_same(before, fingerprint(model))
    else:
        assert when == 4  # what costs two gradients has ended
        assert measure in (MEASURES["sam"], MEASURES["directional"], MEASURES["m-sharpness"], MEASURES["slice"])


def test_an_optimizer_that_steps_inside_the_backward_pass_does_not_step() -> None:
    case = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in case.model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        p.grad = None

    for p in case.model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = copy.deepcopy(case.model.state_dict())
    plain = mlp()
    found = sharpness.eigenvalues(case.model, case.closure(), products="differences")
    assert torch.equal(found.values, sharpness.eigenvalues(plain.model, plain.closure(), products="differences").values)
    assert_same(dict(before), dict(case.model.state_dict()))
    case.closure()().backward()  # and steps again afterwards
    assert not torch.equal(before["0.weight"], case.model.state_dict()["0.weight"])


def test_batches_do_not_read_what_others_wrote() -> None:
    """The sum over closures does not depend on their order, although each pass changes what the next would read."""
    model, _ = restless()
    model.drop.p = 0.0
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double()
    model.forward = lambda x: quiet(model, x)  # type: ignore[method-assign]
    closures = [lambda r=r: nn.functional.mse_loss(model(x[r]), y[r]) for r in (slice(0, 10), slice(10, 20))]
    one = sharpness.sam_sharpness(model, closures, rho=0.1, mode="eval")
    other = sharpness.sam_sharpness(model, closures[::-1], rho=0.1, mode="eval")
    assert one.value == pytest.approx(other.value, rel=1e-12)
    assert one.passes.backward == 2  # the first gradient was taken again, each batch from the start


def quiet(model: Restless, x: Tensor) -> Tensor:
    """A pass that draws nothing, and reads the EMA that it writes."""
    h = model.first(x) + model.seen
    model.seen = (0.9 * model.seen + h.mean(0)).detach()
    return model.last(torch.tanh(h))
