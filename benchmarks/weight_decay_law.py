"""The time to the best test accuracy against L2 and against the learning rate, on real MNIST.

    python benchmarks/weight_decay_law.py --root DATA          # about 12 minutes of one core; finished runs are kept
    python benchmarks/weight_decay_law.py --figures            # the pictures and slopes of stored results

``DATA`` holds MNIST/raw (torchvision's layout). Every run has the same number of steps, whatever its L2: a length in proportion to 1/(ηλ)
would put the law into the result by itself, since on a plateau the best of many noisy measurements falls anywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gradreg import files

RESULTS = Path(__file__).parent / "results" / "weight-decay" / "law.json"
FIGURES = Path(__file__).parents[1] / "docs" / "figures" / "weight-decay"
SEEDS = (0, 1, 2)
L2S = [0.8 / 2**k for k in range(7)]  # 1.8 decades
LEARNING_RATES = [0.1 / 2**k for k in range(6)]  # 1.5 decades
LEARNING_RATE, L2 = 0.05, 0.2
STEPS = 6_500
MEASUREMENTS = sorted({round(x) for x in np.geomspace(2, STEPS, 110)})
SWEEPS = {
    "l2": [{"lr": LEARNING_RATE, "l2": value} for value in L2S],
    "lr": [{"lr": value, "l2": L2} for value in LEARNING_RATES],
}


def run(lr: float, l2: float, seed: int, root: str) -> list[float]:
    """Test accuracy at ``MEASUREMENTS`` of one run of ``STEPS`` steps.

    The steps are those of ``gradreg.train.loop``, without its evaluation on 10,000 images after every epoch of 20 steps, which costs more.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from gradreg.train import models
    from gradreg.train.data.configuration import AugmentationConfig, DataConfig
    from gradreg.train.data.loader import load

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = DataConfig(name="mnist", root=root, train_size=2000)
    sets = load(data, AugmentationConfig(), seed=seed, device=torch.device("cpu"))
    test = next(sets.test.batches(5000))
    model = models.create({"name": "mlp", "hidden": [128, 128], "gain": 2.0}, classes=10, image_shape=(1, 28, 28))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=l2)
    found: list[float] = []
    wanted, step = set(MEASUREMENTS), 0
    for epoch in range(1, STEPS // 20 + 1):  # of 20 steps each
        for batch in sets.train.batches(epoch, 100):
            optimizer.zero_grad()
            cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
            step += 1
            if step in wanted:
                with torch.no_grad():
                    found.append((model(test.images).argmax(dim=1) == test.labels).float().mean().item())
    return found


def best_step(accuracies: list[float]) -> int:
    """t*: the measured step with the highest test accuracy."""
    return MEASUREMENTS[int(np.argmax(accuracies))]


def arrival(accuracies: list[float], share: float = 0.99) -> int:
    """The first measured step at ``share`` of the highest test accuracy."""
    return MEASUREMENTS[int(np.argmax(np.array(accuracies) >= share * max(accuracies)))]


def without_peak(group: list[dict[str, Any]], axis: str) -> set[float]:
    """The values at which a seed has its best accuracy in the last tenth of the run: too short to see a peak, if there is one."""
    return {r[axis] for r in group if best_step(r["accuracies"]) > 0.9 * STEPS}


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Log-log slope with its 95 % interval (Student's t over all runs)."""
    fit: Any = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sweep, axis in (("l2", "l2"), ("lr", "lr")):
        group = [r for r in runs if r["sweep"] == sweep]
        x = np.array([r[axis] for r in group])
        late = without_peak(group, axis)
        inside = np.array([r[axis] not in late for r in group])
        times = {"best": best_step, "arrival": arrival}
        for name, time in times.items():
            y = np.array([time(r["accuracies"]) for r in group], dtype=float)
            kept = inside if name == "best" else np.ones(len(x), dtype=bool)
            found[f"{sweep}, {name}"] = {
                "slope": slope(x[kept], y[kept]),
                "runs": int(kept.sum()),
                "left out": int((~kept).sum()),
                "clock (mean)": float(
                    np.exp(np.mean(np.log([r["lr"] * r["l2"] * time(r["accuracies"]) for r, k in zip(group, kept, strict=True) if k])))
                ),
            }
    return found


def figures(runs: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    labels = {"l2": "λ", "lr": "η"}
    curves, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for sweep, axis in zip(("l2", "lr"), axes, strict=True):
        values = [point[sweep] for point in SWEEPS[sweep]]
        for value, colour in zip(values, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(values))), strict=True):
            group = [r for r in runs if r["sweep"] == sweep and r[sweep] == value]
            clock = np.array(MEASUREMENTS) * group[0]["lr"] * group[0]["l2"]
            mean = 100 * np.mean([r["accuracies"] for r in group], axis=0)
            axis.plot(clock, mean, color=colour, label=f"{labels[sweep]} = {value:.4g}")
        fixed = f"η = {LEARNING_RATE}" if sweep == "l2" else f"λ = {L2}"
        axis.set(xscale="log", xlabel="clock ηλt", ylim=(50, 92), title=f"{fixed}, mean of {len(SEEDS)} seeds")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    curves.tight_layout()
    curves.savefig(FIGURES / "curves.png", dpi=90)

    law, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for sweep, axis in zip(("l2", "lr"), axes, strict=True):
        group = [r for r in runs if r["sweep"] == sweep]
        for name, time, marker in (("best accuracy", best_step, "o"), ("99 % of the best", arrival, "^")):
            kept = [r for r in group if time is arrival or r[sweep] not in without_peak(group, sweep)]
            x = np.array([r[sweep] for r in kept])
            y = np.array([time(r["accuracies"]) for r in kept], dtype=float)
            s, low, high = slope(x, y)
            line = axis.plot(x, y, marker, alpha=0.7, label=f"{name}: slope {s:.2f} [{low:.2f}, {high:.2f}]")[0]
            places = np.array([min(x), max(x)])
            axis.plot(places, np.exp(np.mean(np.log(y)) + s * (np.log(places) - np.mean(np.log(x)))), color=line.get_color())
        late = [r for r in group if r[sweep] in without_peak(group, sweep)]
        if late:
            y = [best_step(r["accuracies"]) for r in late]
            axis.plot([r[sweep] for r in late], y, "x", color="grey", label=f"no peak within the run, left out: {len(late)}")
        axis.set(xscale="log", yscale="log", xlabel=labels[sweep])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("optimizer steps")
    law.tight_layout()
    law.savefig(FIGURES / "law.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder that holds MNIST/raw")
    parser.add_argument("--sweep", choices=tuple(SWEEPS), help="only this one")
    parser.add_argument("--figures", action="store_true", help="only draw what is stored")
    options = parser.parse_args()
    if not options.figures:
        for sweep in [options.sweep] if options.sweep else SWEEPS:
            part = RESULTS.with_name(f"law-{sweep}.json")
            runs: list[dict[str, Any]] = json.loads(part.read_text())["runs"] if part.is_file() else []
            done = {(r["lr"], r["l2"], r["seed"]) for r in runs}
            for seed in SEEDS:
                for point in SWEEPS[sweep]:
                    if (point["lr"], point["l2"], seed) in done:
                        continue
                    runs.append({"sweep": sweep, **point, "seed": seed, "accuracies": run(**point, seed=seed, root=options.root)})
                    files.write_text(part, json.dumps({"steps": MEASUREMENTS, "runs": runs}) + "\n")
                    print(sweep, point, seed, best_step(runs[-1]["accuracies"]), flush=True)
    runs = [r for sweep in SWEEPS for r in json.loads(RESULTS.with_name(f"law-{sweep}.json").read_text())["runs"]]
    found = summary(runs)
    files.write_json(RESULTS, found)
    for name, values in found.items():
        print(name, values)
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures(runs)


if __name__ == "__main__":
    main()
