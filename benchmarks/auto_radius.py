"""Is a radius that sets itself (``AutoRadius``) as good as the best fixed one? With wrong labels, clean ones, and over widths and starts.

    python benchmarks/auto_radius.py digits-cost --seeds 10
    python benchmarks/auto_radius.py digits-cost --clean --seeds 10
    python benchmarks/auto_radius.py digits-cost --width 64 --methods fgr --targets 0.95 --seeds 10
    python benchmarks/auto_radius.py digits-cost --starts 0.001 0.01 0.05 0.1 1 --methods fgr --seeds 10
    python benchmarks/auto_radius.py cifar10-cost --methods fgr --targets 0.95 --seeds 5 --root DATA
    python benchmarks/auto_radius.py cifar10-underfit --held-out --methods fgr --targets 0.95 --first 4000 --device cuda --root DATA
    python benchmarks/auto_radius.py digits-cost --lets --seeds 10
    python benchmarks/auto_radius.py cifar10-cost --tune --seeds 2 --root DATA      # targets, on seeds that are not reported
    python benchmarks/auto_radius.py digits-cost --table                            # only what is stored

Beside plain training stand SAM and F-GR with each radius of a sweep, and with AutoRadius at each target; with ``--held-out`` AutoRadius
alone, and with some of the training images held out, which keep it off where there is nothing to prevent; with ``--lets`` SAM whose radius
is learned from these, at the radius from which that starts, and with AutoRadius. The best fixed radius is chosen
by the mean over the very seeds that are reported, which favours it. Stored under benchmarks/results/choosing/ with every run's accuracy;
what is complete under ``--runs`` is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import choosing
import gradreg
from gradreg import GradientPenalty, study
from gradreg.study.statistics import deviation, paired_difference
from reporting import command, environment
from tables import markdown

FIRST, TUNING = 1000, 500
"""The first seed of what is reported, and of what is tuned on."""
RADII: dict[str, dict[str, tuple[float, ...]]] = {
    "digits-cost": {"sam": (0.05, 0.1, 0.2, 0.4, 0.6), "fgr": (0.1, 0.25, 0.5, 1.0, 2.0)},
    "mnist-cost": {"sam": (0.05, 0.1, 0.2, 0.4), "fgr": (0.1, 0.25, 0.5, 1.0)},
    "cifar10-cost": {"sam": (0.05, 0.1), "fgr": (0.1, 0.2)},
    "cifar10-underfit": {"sam": (), "fgr": (0.02, 0.2)},
}
"""Recipe -> method -> fixed radii, around the best ones of docs/choosing.md."""
TARGETS = (0.9, 0.95)
TUNED_RATES = ((0.005, 5), (0.01, 5), (0.02, 5), (0.05, 5), (0.2, 5), (0.02, 1), (0.05, 1))
"""Of LETS: how fast it follows, and the steps between two measurements."""
TUNED_TARGETS = (0.8, 0.85, 0.9, 0.95)
ADAMW = {"optimizer": {"name": "adamw", "lr": 0.001}, "schedule.warmup_epochs": 2}
HELD_OUT = {"digits-cost": 0.05, "mnist-cost": 0.05, "cifar10-cost": 0.01, "cifar10-underfit": 0.01}
"""Recipe -> share of the training images: 50 or 100 of them, since what is held out is missed in training."""


def at(method: str, radius: Any) -> GradientPenalty:
    """SAM, or F-GR with γ = ε, at ``radius``."""
    if method == "sam":
        return gradreg.sam(rho=radius)
    return gradreg.fgr(epsilon=radius) if isinstance(radius, gradreg.AutoRadius) else gradreg.fgr(gamma=radius, epsilon=radius)


def variants(options: argparse.Namespace) -> dict[str, Any]:
    """Name -> penalty: "sam 0.1", "fgr auto 0.9", ..."""
    targets = options.targets or (TUNED_TARGETS if options.tune else TARGETS)
    found: dict[str, Any] = {}
    if options.lets:
        own = {"sam lets": gradreg.LETS()}
        tuned = {f"sam lets {rate:g} every {every}": gradreg.LETS(rate=rate, every=every) for rate, every in TUNED_RATES}
        learned = {
            name: {"penalty": {**gradreg.sam(rho=radius).to_dict(), "held_out": HELD_OUT[options.task]}}
            for name, radius in (tuned if options.tune else own).items()
        }
        fixed = gradreg.LETS().start
        return {f"sam {fixed:g}": at("sam", fixed), **learned, "sam auto 0.95": at("sam", gradreg.AutoRadius())}
    for method in options.methods:
        if options.starts:
            found |= {f"{method} from {start:g}": at(method, gradreg.AutoRadius(start=start)) for start in options.starts}
            continue
        if not (options.tune or options.held_out):
            radii = RADII[options.task][method] if options.radii is None else options.radii
            found |= {f"{method} {radius:g}": at(method, radius) for radius in radii}
        for target in targets:
            penalty = at(method, gradreg.AutoRadius(target=target))
            found[f"{method} auto {target:g}"] = penalty
            if options.held_out:
                found[f"{method} auto {target:g} held out"] = {"penalty": {**penalty.to_dict(), "held_out": HELD_OUT[options.task]}}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing; the content of the results."""
    settings: dict[str, Any] = {"seed": options.first or (TUNING if options.tune else FIRST), "trackers": []}
    if options.device is not None:
        settings["device"] = options.device
    if options.clean:
        settings["data.label_noise"] = 0.0
    if options.adamw:
        settings |= ADAMW
    if options.width is not None:
        settings["model.hidden"] = [options.width, options.width]
    if options.root is not None:
        settings["data.root"] = options.root
    found = study.compare(
        options.task,
        penalties=variants(options),
        seeds=options.seeds,
        out=options.runs or Path("runs/auto-radius") / name_of(options),
        options=settings,
        rivals=["epochs"],
        workers=options.workers,
    )
    accuracies: dict[str, list[float | None]] = {}
    for record in sorted(found.records, key=lambda record: record.seed):
        accuracies.setdefault(record.variant, []).append(None if record.diverged else record.test)
    return {
        "command": command(),
        "environment": environment(("torch",), torch.device(options.device or "cpu")),
        "seeds": list(range(settings["seed"], settings["seed"] + options.seeds)),
        "variants": accuracies,
    }


def name_of(options: argparse.Namespace) -> str:
    """Of the stored results."""
    parts = [
        "auto-tuning" if options.tune else "auto",
        options.task,
        "clean" if options.clean else "",
        "adamw" if options.adamw else "",
        "" if options.width is None else f"width-{options.width}",
        "starts" if options.starts else "",
        "held-out" if options.held_out else "",
        "lets" if options.lets else "",
    ]
    return "-".join(part for part in parts if part)


def best_fixed(accuracies: dict[str, list[float]], method: str) -> str | None:
    """The name of the fixed radius of ``method`` with the highest mean; None without one."""
    fixed = [name for name in accuracies if name.startswith(f"{method} ") and name.removeprefix(f"{method} ")[0].isdigit()]
    return max(fixed, key=lambda name: np.nanmean(accuracies[name]), default=None)


def table(results: dict[str, Any]) -> str:
    """A row for each variant: accuracy, over plain, and over the best fixed radius of its method."""
    accuracies = {name: [np.nan if one is None else 100 * one for one in row] for name, row in results["variants"].items()}
    best = {method: best_fixed(accuracies, method) for method in ("sam", "fgr")}
    rows: list[tuple[str, str, str, str]] = []
    for name, row in accuracies.items():
        kept = [one for one in row if not np.isnan(one)]
        lost = f" ({len(row) - len(kept)} diverged)" if len(kept) < len(row) else ""
        rival = best.get(name.split()[0])
        rows.append(
            (
                name + (", the best fixed" if name == rival else ""),
                (f"{np.mean(kept):.2f}" if kept else "all diverged") + (f" ± {deviation(kept):.2f}" if len(kept) > 1 else "") + lost,
                "" if name == "none" else _over(row, accuracies["none"]),
                _over(row, accuracies[rival]) if rival is not None and name != rival else "",
            )
        )
    header = f"test accuracy, %, {len(results['seeds'])} seed{'s' if len(results['seeds']) > 1 else ''}"
    return markdown(("variant", header, "over plain, points", "over the best fixed radius of its method, points"), rows)


def _over(row: list[float], rival: list[float]) -> str:
    found = paired_difference(*({seed: one for seed, one in enumerate(each) if not np.isnan(one)} for each in (row, rival)))
    if found is None or found.low is None or found.high is None:
        return "" if found is None else f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=RADII)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, help=f"the first seed ({FIRST}; with --tune {TUNING})")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--clean", action="store_true", help="no wrong labels")
    parser.add_argument("--adamw", action="store_true", help="AdamW with a learning rate warm-up of two epochs, in place of SGD")
    parser.add_argument("--width", type=int, help="of both hidden layers of a perceptron")
    parser.add_argument("--methods", nargs="+", choices=("sam", "fgr"), default=("sam", "fgr"))
    parser.add_argument("--radii", type=float, nargs="*", help="the fixed radii, if any, in place of those of the task; with one method")
    parser.add_argument("--starts", type=float, nargs="+", help="AutoRadius alone, from these radii")
    parser.add_argument("--held-out", action="store_true", help="AutoRadius alone, without and with some of the images held out")
    parser.add_argument("--lets", action="store_true", help="SAM with a radius learned from held-out images, and its rivals")
    parser.add_argument("--tune", action="store_true", help="AutoRadius alone, at more targets, on other seeds")
    parser.add_argument("--targets", type=float, nargs="+", help="alignments that AutoRadius aims at")
    parser.add_argument("--root", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs/auto-radius/NAME)")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    options = parser.parse_args()
    if not options.table:
        choosing.store(name_of(options), measure(options))
    choosing.show(name_of(options), table(choosing.stored(name_of(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
