"""The curves of docs/training.md, from the metrics of run folders.

python benchmarks/training_curves.py runs/mnist runs/cifar --out docs/figures/training/curves.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from gradreg.train.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the figure, by its ending SVG or PNG")
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.runs), figsize=(4.2 * len(options.runs), 3.2), layout="constrained", squeeze=False)
    for path, axis in zip(options.runs, axes[0], strict=True):
        folder = RunFolder(path)
        config, history = folder.configuration(), folder.history()
        epochs = [epoch.epoch for epoch in history]
        axis.plot(epochs, [100 * epoch.test_accuracy for epoch in history], "o-", color="tab:blue")
        axis.set(title=f"{config.model['name']} on {config.data.name}", xlabel="epoch", ylabel="test accuracy, %", xticks=epochs)
        loss = axis.twinx()
        loss.plot(epochs, [epoch.train_loss for epoch in history], "s--", color="tab:orange")
        loss.set_ylabel("training loss", color="tab:orange")
        loss.set_ylim(bottom=0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
