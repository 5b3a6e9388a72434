"""A step holds one copy of the parameters beyond what plain gradient accumulation holds, by the allocator's own account."""

import pytest
import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from gradreg.torch import GradientRegularizer

from .cases import PENALTIES

LAYERS, WIDTH = 10, 128


def largest_allocation(run) -> int:
    """The most bytes that ``run`` holds above what was allocated before, temporaries within operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    allocations = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations):
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.filterwarnings("ignore:CUDA initialization")
@pytest.mark.parametrize("name", ["sam", "gnp", "gnp-unit", "fgr", "cgr"])
def test_one_copy_of_the_parameters(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x = torch.randn(1, WIDTH)
    regularizer = GradientRegularizer(model, PENALTIES[name])

    peak = largest_allocation(lambda: regularizer.backward(lambda: model(x).square().mean()))
    # The gradients themselves, one copy, and while a layer's second gradient is added to its first, that one layer's.
    assert peak / size == pytest.approx(2 + 1 / LAYERS, abs=0.12)
    model.zero_grad()
    assert largest_allocation(lambda: regularizer.backward(lambda: model(x).square().mean())) / size < 1.25, "the copy is made once"
