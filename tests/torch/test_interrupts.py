"""A step that is interrupted anywhere, or runs out of memory anywhere, leaves everything as it was, or as a whole step leaves it.

``--soak`` goes through all executed lines and allocations; without it a sample is taken, the same each time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import cycle

import pytest

from gradreg import GradientPenalty

from .cases import PENALTIES, every_penalty
from .interrupts import MOMENTS, Allocations, Fault, Lines, a_few, every, lines_before_the_last_pass_ends, sweep

BY_MOMENT = [(name, moment) for name, moment in zip(PENALTIES, cycle(MOMENTS), strict=False)]
"""One moment for each penalty."""


def check(fault: Fault, penalty: GradientPenalty, moment: str, chosen) -> None:
    found = sweep(fault, penalty, moment, chosen)
    wrong = [f"{one.where}: {', '.join(one.broken)}" for one in found if one.broken]
    assert not wrong, f"{len(wrong)} of {len(found)} points leave something wrong:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize(("name", "moment"), BY_MOMENT)
def test_an_interrupt_at_some_lines(name: str, moment: str) -> None:
    check(Lines, PENALTIES[name], moment, a_few(4, name))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["sam", "gsam", "friendly", "looksam", "exact", "exact-norm"])
def test_memory_exhausted_at_some_allocations(name: str, moment: str) -> None:
    check(Allocations, PENALTIES[name], moment, a_few(4, name))


@pytest.mark.parametrize(("name", "moment", "stride"), [("sam", "first", 1), ("cgr", "second", 5)], ids=["sam", "cgr"])
def test_an_interrupt_at_any_line_after_the_last_pass(name: str, moment: str, stride: int) -> None:
    """Where parameters, gradients, buffers and random numbers are put back, of which one may have happened and another not."""
    penalty = PENALTIES[name]
    last = lines_before_the_last_pass_ends(penalty, moment)
    check(Lines, penalty, moment, lambda places: list(range(last, len(places) + 1, stride)))


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
@every_penalty
def test_an_interrupt_at_every_line(penalty: GradientPenalty, moment: str) -> None:
    """KeyboardInterrupt before every line that circle 1 and the PyTorch engine execute in a step, of every penalty, at every moment.

    A line counts as often as it is reached from different lines of the engine: a function's for each of its callers, and theirs. In a loop
    (over parameters, modules, pieces of state, passes) the first, the second and the last turn are interrupted.
    """
    check(Lines, penalty, moment, every())


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
@every_penalty
def test_memory_exhausted_at_every_allocation(penalty: GradientPenalty, moment: str) -> None:
    """Every operation that allocates fails, and all after it, in a step of every penalty, at every moment."""
    check(Allocations, penalty, moment, every())


IN_A_SMALL_ROOM = """
import gc, json, resource, sys
import torch
from torch import nn
from gradreg.torch import GradientRegularizer
from tests.penalties import PENALTIES

torch.set_num_threads(1)
MEGABYTE = 1 << 20

def one(name, room):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))  # 4 MB each
    x = torch.randn(4, 1024)
    before = [p.detach().clone() for p in model.parameters()]
    regularizer = GradientRegularizer(model, PENALTIES[name])
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room * MEGABYTE, unlimited[1]))
    error = None
    try:
        regularizer.backward(lambda: model(x).square().mean())
    except (RuntimeError, MemoryError) as failure:
        error = str(failure)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    wrong = sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
    left = sum(p.grad is not None for p in model.parameters())
    return {"name": name, "room": room, "error": error, "wrong": wrong, "gradients": left}

found = []
model = nn.Linear(8, 8)  # what is loaded at the first step is no part of the room
GradientRegularizer(model, PENALTIES["sam"]).backward(lambda: model(torch.randn(2, 8)).square().mean())
for name in sys.argv[1].split(","):
    for room in json.loads(sys.argv[2]):
        gc.collect()
        found.append(one(name, room))
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, and reads /proc")
@pytest.mark.parametrize(
    "rooms", [list(range(4, 100, 12)), pytest.param(list(range(2, 120)), marks=pytest.mark.soak)], ids=["some rooms", "every room"]
)
def test_a_first_step_without_room_leaves_every_layer(rooms: list[int]) -> None:
    """Memory that is really limited: at most 36 MB of gradients, as many of a copy of the parameters, and what lies between."""
    names = ["sam", "gsam"]
    command = [sys.executable, "-c", IN_A_SMALL_ROOM, ",".join(names), json.dumps(rooms)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert any(one["error"] for one in found), "no room was too small"
    assert not all(one["error"] for one in found), "no room was large enough"
    failed = [one for one in found if one["error"]]
    assert all("memory" in one["error"] for one in failed), [one["error"] for one in failed]
    wrong = {f"{one['name']}, {one['room']} MB": one["wrong"] for one in found if one["wrong"]}
    assert not wrong, f"tensors of 16 that are not what they were: {wrong}"
    left = {f"{one['name']}, {one['room']} MB": one["gradients"] for one in failed if one["gradients"]}
    assert not left, f"gradients that a failed step left: {left}"
