"""The figure of docs/sharpness.md: how sharp each method's minima are on one task, and what they score.

    gradreg compare digits-noisy-labels --seeds 5 --rivals epochs --sharpness.every 60 --sharpness.samples 500 --out runs/sharpness-digits
    python benchmarks/sharpness_methods.py runs/sharpness-digits/results.json --out docs/figures/sharpness/methods.png

Every dot is a run, at the end of training, measured on the same 500 training samples of its seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gradreg.sharpness.measures import MEASURES
from gradreg.study.sharpness import correlation_text

COLORS = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHOWN = ("largest_eigenvalue", "trace", "m_sharpness")


def draw(found: dict) -> Figure:
    figure = Figure(figsize=(4.2 * len(SHOWN), 3.9), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    told = {(one["measure"], one["over"]): correlation_text(one) for one in found["sharpness"]["correlations"]}
    metric = f"test_{found['metric']['name']}"
    for axis, name in zip(axes, SHOWN, strict=True):
        for color, line in zip(COLORS, found["sharpness"]["table"], strict=False):
            runs = [run for run in found["runs"] if (run["variant"], run["budget"]) == (line["variant"], line["budget"])]
            axis.plot(
                [run[f"sharpness_{name}"] for run in runs],
                [100 * run[metric] for run in runs],
                "o",
                color=color,
                alpha=0.75,
                label=line["label"],
            )
            axis.plot(line[name]["mean"], 100 * line[metric], "+", color=color, markersize=16, markeredgewidth=2.5)
        axis.set_xscale("log")
        axis.set_xlabel(MEASURES[name])
        axis.set_title("\n".join(f"{over}: {told.get((name, over), '-')}" for over in ("over all runs", "within variants")), fontsize=8.5)
        axis.grid(color="#e4e4e4")
    axes[0].set_ylabel(f"test {found['metric']['name']}, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    matplotlib.use("agg")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(arguments.results.read_text(encoding="utf-8"))).savefig(arguments.out, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
