"""How often one regularized step crosses from one source file of gradreg into another: a reader has to follow each crossing.

    python benchmarks/step_boundaries.py [PENALTY ...]

Counts calls whose caller and callee are in different files of the package, and the files that a step runs through, on a small model in its
third step, when everything that is made once has been made.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import gradreg
from gradreg.torch import GradientRegularizer

PACKAGE = Path(gradreg.__file__).parent
PENALTIES = {
    "sam": gradreg.sam(rho=0.1),
    "gnp": gradreg.gnp(r=0.1, alpha=0.8),
    "fgr": gradreg.fgr(gamma=0.1, epsilon=0.2),
    "friendly_sam": gradreg.friendly_sam(rho=0.1),
    "gsam": gradreg.gsam(rho=0.1, a=0.3),
}


def crossings(penalty: gradreg.GradientPenalty) -> tuple[int, int, int]:
    """Crossings, files, and calls within the package, of one step."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(16, 4)
    regularizer = GradientRegularizer(model, penalty)
    calls: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(str(PACKAGE)):
            caller = caller.f_back  # through the standard library, torch, and the closure
        if caller is not None:
            calls.append((caller.f_code.co_filename, frame.f_code.co_filename))

    for step in range(3):
        if step == 2:
            sys.setprofile(profile)
        regularizer.backward(lambda: model(x).square().mean())
        sys.setprofile(None)
        model.zero_grad()
    crossed = [pair for pair in calls if pair[0] != pair[1]]
    return len(crossed), len({file for pair in calls for file in pair}), len(calls)


if __name__ == "__main__":
    for name in sys.argv[1:] or PENALTIES:
        crossed, files, calls = crossings(PENALTIES[name])
        print(f"{name}: {crossed} crossings between {files} files, {calls} calls")
