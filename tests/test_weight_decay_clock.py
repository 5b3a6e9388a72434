"""The ηλ clock: what it means for the weights, conversions, transfer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg import DecayClock, effective_learning_rate, l2_from_authors, l2_to_authors
from gradreg.weight_decay_clock import coupled_to_independent

POSITIVE = st.floats(1e-6, 10.0)
WHOLE = st.integers(1, 10**6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decay_alone_leaves_one_over_e_after_the_timescale(momentum: float) -> None:
    clock = DecayClock(learning_rate=0.1, weight_decay=1e-3, batch_size=10, samples=100, momentum=momentum)
    weight, buffer, steps = 1.0, 0.0, round(clock.timescale_steps)
    for _ in range(steps):  # SGD on the L2 term alone
        buffer = momentum * buffer + 1e-3 * weight
        weight -= 0.1 * buffer
    assert weight == pytest.approx(math.exp(-1), rel=0.02)
    assert clock.elapsed(steps) == pytest.approx(1.0)
    assert clock.timescale_epochs == pytest.approx(steps / 10)


@given(POSITIVE, POSITIVE, WHOLE, WHOLE, POSITIVE, WHOLE, WHOLE, st.floats(0, 0.99))
def test_transfer_keeps_the_timescale_in_epochs(
    lr: float, decay: float, batch: int, samples: int, lr2: float, batch2: int, samples2: int, momentum2: float
) -> None:
    here = DecayClock(learning_rate=lr, weight_decay=decay, batch_size=batch, samples=samples)
    there = here.transfer(learning_rate=lr2, batch_size=batch2, samples=samples2, momentum=momentum2)
    assert there.timescale_epochs == pytest.approx(here.timescale_epochs, rel=1e-9)
    back = there.transfer(learning_rate=lr, batch_size=batch, samples=samples, momentum=0.0)
    assert back.weight_decay == pytest.approx(decay, rel=1e-9)


def test_authors_convention_gives_the_same_gradient_step() -> None:
    torch = pytest.importorskip("torch")
    eta, l2, classes = 3.0, 0.02, 4
    theta = torch.randn(5, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.nn.functional.one_hot(torch.arange(7) % classes, classes)
    theirs = (-(targets * torch.log_softmax(x @ theta, dim=1)).mean()) + l2 * theta.square().sum()  # the mean is over classes too
    expected = theta.detach() - eta * torch.autograd.grad(theirs, theta)[0]

    lr, weight_decay = l2_from_authors(eta, l2, classes=classes)
    optimizer = torch.optim.SGD([theta], lr=lr, weight_decay=weight_decay)
    torch.nn.functional.cross_entropy(x @ theta, torch.arange(7) % classes).backward()
    optimizer.step()
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-12, atol=1e-12)
    assert l2_to_authors(lr, weight_decay, classes=classes) == pytest.approx((eta, l2))


def test_independent_weight_decay_is_the_share_of_a_step() -> None:
    assert coupled_to_independent(0.5, 0.2) == pytest.approx(0.1)
    assert effective_learning_rate(0.5, 0.75) == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": -1e-3}, r"weight_decay must be finite and > 0; got -0.001\. Without weight decay there is no clock"),
        ({"weight_decay": 0.0}, r"weight_decay must be finite and > 0; got 0.0"),
        ({"learning_rate": math.inf}, r"learning_rate must be a number > 0 and finite; got inf"),
        ({"batch_size": 0}, r"batch_size must be >= 1; got 0"),
        ({"momentum": 1.5}, r"momentum must be < 1; got 1.5"),
    ],
)
def test_bad_clocks_are_refused(changes: dict[str, float], message: str) -> None:
    arguments = {"learning_rate": 0.1, "weight_decay": 1e-3, "batch_size": 100, "samples": 1000}
    with pytest.raises(ValueError, match=message):
        DecayClock(**{**arguments, **changes})  # type: ignore[arg-type]


def test_bad_conversions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"classes must be >= 2; got 1"):
        l2_from_authors(0.1, 0.01, classes=1)
    with pytest.raises(ValueError, match=r"l2 must be finite and >= 0; got -0.01"):
        l2_from_authors(0.1, -0.01, classes=10)
