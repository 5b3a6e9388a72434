"""The tables of README.md and docs/ that say what was measured: each from results that a study, a benchmark or an experiment stored."""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from table import markdown

from gradreg.sharpness.measures import MEASURES
from gradreg.study.sharpness import cell, correlation_text
from gradreg.study.verdicts import decimals, interval_text

ROOT = Path(__file__).parents[1]
STORED = "stored/"
WEIGHT_DECAYS = {
    "l2-0": "0",
    "l2-1e-4": "10⁻⁴",
    "l2-3e-4": "3·10⁻⁴",
    "l2-1e-3": "10⁻³",
    "l2-3e-3": "3·10⁻³",
    "l2-1e-2": "10⁻²",
    "l2-3e-2": "3·10⁻²",
    "l2-1e-1": "10⁻¹",
    "predicted": "predicted",
    "auto": "AutoL2",
    "auto-on-the-clock": "AutoL2, η-aware",
}
"""The variants of the recipes l2-fc-mnist and l2-fc-digits, as docs/weight-decay.md calls them."""


def studies() -> str:
    """What the studies in examples/studies answered: a row for each variant, from the stored ``results.json``."""
    header = ("study, metric", "variant", "test", "over plain, equal epochs", "equal gradients", "stopped early", "verdict at equal epochs")
    rows: list[tuple[str, ...]] = []
    for file in sorted((ROOT / "docs" / "results" / "studies").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        metric, seeds = found["metric"], len(found["seeds"])
        title = f"`{file.stem}`, {metric['name']}{', %' if metric['percent'] else ''}, {seeds} seeds"
        for label, value, equal, spent, early, _, decision in cells(f"studies/{file.stem}"):
            rows.append((title, label, value, equal, spent, early, decision))
            title = ""
    return markdown(header, rows)


def digits() -> str:
    """What ``make demo`` found: the stored ``results.json`` of its comparison."""
    header = (
        "variant",
        "test accuracy, %",
        "over plain, equal epochs",
        "over plain, equal gradients",
        "over plain, stopped early",
        "gradient evaluations",
        "at equal epochs",
    )
    return markdown(
        header,
        [
            (label, value, equal, spent, early, evaluations, decision)
            for label, value, equal, spent, early, evaluations, decision in cells("digits-noisy-labels")
        ],
    )


def gain_left() -> str:
    """What plain training stopped early leaves of the gains on digits, over fifteen seeds; the stored ``results.json``."""
    found = json.loads((ROOT / "docs" / "results" / "digits-fifteen-seeds.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for row in found["table"]:
        gain, early = row["difference"], row["early_difference"]
        if row["variant"] == found["baseline"]:
            continue
        shown = [interval_text(one["difference"], one["low"], one["high"]) for one in (gain, early)]
        share = f"{100 * early['difference'] / gain['difference']:.0f} %"
        rows.append((f"{row['label']}, {row['method']}", shown[0], gain["decision"], shown[1], early["decision"], share))
    header = ("variant", "over plain, equal epochs", "", "over plain, stopped early", "", "left of the gain")
    return markdown(header, rows)


def strengths() -> str:
    """What ``gradreg compare digits-strengths`` found."""
    header = ("variant", "test accuracy, %", "over plain, equal epochs", "at equal epochs")
    return markdown(
        header,
        [(label, value, equal, decision) for label, value, equal, *_, decision in cells("digits-strengths") if "epochs" not in label],
    )


def diagonal_network() -> str:
    """What B-GR, DB and F-GR do to α and to the recovery, from the stored flows."""
    rows = stored("papers/diagonal-network.json")["seeds"]
    names = {"none": "none", "B-GR": "B-GR, ε = 0.05", "DB": "DB", "F-GR, 0.02": "F-GR, ε = 0.02", "F-GR": "F-GR, ε = 0.05"}

    def averaged(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    cells = [(label, f"{averaged(f'{name}, recovery error'):.4f}", f"{averaged(name):.3f}") for name, label in names.items()]
    return markdown(("penalty", "‖β − β*‖²", "mean ln(α/α₀)"), cells)


def kernel_decay() -> str:
    """How near the kernels of two widths are to the theorem's, from the stored flows."""
    rows = stored("papers/kernel-decay.json")["seeds"]
    cells: list[tuple[str, ...]] = []
    for width in ("512", "4096"):
        ratios = [row[f"ratio {width}"] for row in rows]
        deviation = 100 * sum(abs(ratio - 1) for ratio in ratios) / len(ratios)
        cells.append((width, f"{statistics.mean(ratios):.3f} ± {statistics.stdev(ratios):.3f}", f"{deviation:.1f} %"))
    return markdown(("width", "‖Θ_t‖/‖Θ₀‖ over the prediction, ± sd", "mean deviation"), cells)


def edge() -> str:
    """What ``gradreg lab edge`` found on MNIST, from its stored table."""
    header = (
        "method",
        "η",
        "ρ",
        "2/η",
        "reached at step",
        "curvature / edge since then: median [quartiles]",
        "at the end: curvature",
        "edge",
        "loss",
    )
    with (ROOT / "docs" / "results" / "edge" / "edge.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows = [
        (
            row["method"],
            row["eta"],
            row["rho"],
            f"{float(row['2/eta']):g}",
            row["reached at step"],
            f"{float(row['curvature/edge']):.2f} [{float(row['1st quartile']):.2f}, {float(row['3rd']):.2f}]",
            f"{float(row['curvature']):.2f}",
            f"{float(row['edge']):.2f}",
            f"{float(row['loss']):.4f}",
        )
        for row in found
    ]
    return markdown(header, rows)


def sharpness_methods() -> str:
    """How sharp each method's minima are on the digits, from the stored study."""
    found = json.loads((ROOT / "docs" / "results" / "sharpness-digits.json").read_text(encoding="utf-8"))
    block, names = found["sharpness"], ("largest_eigenvalue", "trace", "m_sharpness")
    told = {(one["measure"], one["over"]): correlation_text(one) for one in block["correlations"]}
    rows = [
        (line["label"], f"{100 * line['test_accuracy']:.2f} ± {100 * line['test_accuracy_sd']:.2f}", *(cell(line[name]) for name in names))
        for line in block["table"]
    ]
    rows += [
        (f"rank correlation with accuracy, {over}", "", *(told[name, over] for name in names))
        for over in ("over all runs", "within variants")
    ]
    return markdown(("variant", "test accuracy, %", *(MEASURES[name] for name in names)), rows)


def jax_costs() -> str:
    """What a step costs in JAX, in processor time, from the stored result."""
    models = json.loads((ROOT / "benchmarks" / "results" / "jax_step_cost.json").read_text(encoding="utf-8"))["models"]
    ratios = [model["ratio in processor time"] for model in models.values()]
    rows = [(variant, *(f"{ratio[variant]:.2f}" for ratio in ratios)) for variant in ratios[0]]
    return markdown(("step", *(name.split()[0] for name in models)), rows)


def gpu_step_costs() -> str:
    """What a step costs on a GPU: a row for each model and way of running it, from the stored results of ``benchmarks/gpu.py``."""
    names = {"resnet50": "ResNet-50", "vit-s": "ViT-S/16"}
    found = [stored(f"gpu/step-cost-{name}.json") for name in names]
    methods = list(found[0]["ways"]["fp32"])
    rows: list[tuple[str, ...]] = []
    for one in found:
        for way, own in one["ways"].items():
            ratios = (f"{own[method]['ratio_to_two']:.2f}" if method in own else "–" for method in methods)
            rows.append((f"{names[one['model']]}, batch {one['samples']}, {way}: time", *ratios))
        own = one["ways"]["fp32"]
        copies = (f"{own[method]['memory_over_plain']:.1f}" if method in own else "–" for method in methods)
        rows.append((f"{names[one['model']]}, fp32: memory over plain", *copies))
    made = found[0]["environment"]
    table = markdown(("model", *methods), rows)
    where = f"{made['device']}, torch {made['torch']}, timm {made['timm']}, {made['date']}."
    return f"{table}\n{where} `{found[0]['command']} step-cost-vit-s`\n"


def cells(name: str) -> list[tuple[str, ...]]:
    """Of every row of the stored ``docs/results/NAME.json``: label, value, three differences, gradient evaluations, and the decision."""
    found = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for row in found["table"]:
        places = decimals(row["deviation"])
        value = "–" if row["mean"] is None else f"{row['mean']:.{places}f} ± {row['deviation']:.{places}f}"
        differences = [
            "" if (d := row[key]) is None or d["low"] is None else interval_text(d["difference"], d["low"], d["high"])
            for key in ("difference", "matched_difference", "early_difference")
        ]
        decision = "" if row["difference"] is None or row["variant"] == found["baseline"] else row["difference"]["decision"]
        label = row["label"] if row["variant"] == found["baseline"] else f"{row['label']}, {row['method']}"
        rows.append((label, value, *differences, f"{row['gradient_evaluations'] or 0:g}", decision))
    return rows


def weight_decay_budget() -> str:
    """At one budget: constant L2, the predicted one and AutoL2 on two tasks, from the stored runs."""
    found = json.loads((ROOT / "benchmarks" / "results" / "weight-decay" / "budget.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for variant, label in WEIGHT_DECAYS.items():
        cells: list[str] = []
        for task in ("mnist", "digits"):
            own = found[task]["rows"][variant]
            value, over = f"{own['accuracy']:.2f} ± {own['sd']:.2f}", own["over the best constant"]
            cells += [f"**{value}**", ""] if over is None else [value, interval_text(*over)]
        rows.append((label, *cells))
    return markdown(("λ", "MNIST", "over its best constant", "digits", "over its best constant"), rows)


def weight_decay_epochs() -> str:
    """Epochs until 99 % of an accuracy, of the same runs."""
    found = json.loads((ROOT / "benchmarks" / "results" / "weight-decay" / "budget.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for variant in ("best", "auto", "auto-on-the-clock", "predicted", "l2-0"):
        cells: list[str] = []
        for task in ("mnist", "digits"):
            own = found[task]["rows"][found[task]["best constant"] if variant == "best" else variant]
            for key in ("epochs to 99 % of its own", "epochs to 99 % of the best constant's"):
                cells.append(", ".join("never" if epochs is None else str(epochs) for epochs in own[key]))
        rows.append(("best constant, 3·10⁻³" if variant == "best" else {"l2-0": "λ = 0"}.get(variant, WEIGHT_DECAYS[variant]), *cells))
    header = ("", *(f"{task}: of {whose}" for task in ("MNIST", "digits") for whose in ("its final", "the best constant's")))
    return markdown(header, rows)


def weight_decay_law() -> str:
    """Log-log slopes of the time to the best accuracy, from the stored runs."""
    found = json.loads((ROOT / "benchmarks" / "results" / "weight-decay" / "law.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = []
    for sweep, label in (("l2", "λ from 0.8 to 0.025 (1.5 decades) at η = 0.05"), ("lr", "η from 0.1 to 0.003 (1.5 decades) at λ = 0.2")):
        best, arrival = found[f"{sweep}, best"], found[f"{sweep}, arrival"]
        more = "" if arrival["runs"] == best["runs"] else f" (with λ = 0.0125: {arrival['runs']} runs)"
        slopes = ["{:.2f} [{:.2f}, {:.2f}]".format(*one["slope"]).replace("-", "−") for one in (best, arrival)]
        rows.append((f"{label}, {best['runs']} runs", slopes[0], slopes[1] + more))
    return markdown(("sweep", "time to the best accuracy", "time to 99 % of the best"), rows)


PEERS = {
    "lightning": ("Lightning", "2.6.5's: loops, precision plugins, checkpoints, weight averaging"),
    "transformers": (
        "transformers",
        "of its Trainer: accumulation, reproducibility, logs and counts, optimizers and schedules, checkpoints and resuming, callbacks, "
        "data, evaluation; 100 tests of eight files",
    ),
    "trl tests/test_reward_trainer.py": ("TRL", "1.10's, of `RewardTrainer`"),
    "trl tests/test_dpo_trainer.py": ("TRL", "1.10's, of `DPOTrainer`"),
    "trl tests/test_sft_trainer.py": ("TRL", "1.10's, of `SFTTrainer`"),
    "trl tests/test_kto_trainer.py": ("TRL", "1.10's, of `KTOTrainer`"),
    "trl tests/test_rloo_trainer.py": ("TRL", "1.10's, of `RLOOTrainer`"),
    "trl tests/test_grpo_trainer.py, the last 25": ("TRL", "1.10's, of `GRPOTrainer`, the last 25 of 147"),
}
"""The key of the stored result -> the project, and which of its tests were run."""


def peer_suites() -> str:
    """Other projects' own tests without gradreg and with it, from the stored counts of tests/peers/suites.py."""
    found = json.loads((ROOT / "benchmarks" / "results" / "peer_suites.json").read_text(encoding="utf-8"))

    def counted(count: dict[str, int]) -> str:
        return f"{count['passed']} passed, {count['failed']} failed"

    rows = [
        (
            f"{project} {found[key]['installed']}",
            tests,
            counted(found[key]["without"]),
            counted(found[key]["with"]),
            str(len(found[key]["new"])),
        )
        for key, (project, tests) in PEERS.items()
    ]
    return markdown(("installed", "tests", "without gradreg", "with it", "fail with it only, also alone"), rows)


def stored_rows(name: str) -> dict[str, list[str]]:
    """The rows of a stored table by their first cell."""
    lines = stored_file(name).read_text(encoding="utf-8").splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows}


def stored(name: str) -> Any:
    """The content of a stored result."""
    path = ROOT / "benchmarks" / "results" / name
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else path.read_text(encoding="utf-8")


def stored_file(name: str) -> Path:
    """Where a benchmark wrote the table ``stored/FILE``."""
    return ROOT / "benchmarks" / "results" / f"{name.removeprefix(STORED)}.md"


def demo_answer() -> str:
    """What the demo answered, in the words of README.md."""
    found = json.loads((ROOT / "docs" / "results" / "digits-noisy-labels.json").read_text(encoding="utf-8"))
    rows = [row for row in found["table"] if row["variant"] != found["baseline"]]
    gains = [row["difference"]["difference"] for row in rows]
    matched = [row["matched_difference"]["difference"] for row in rows]
    shown = sum(row["difference"]["decision"] == "helps" for row in rows)
    text = (
        f"There, with 30 % wrong labels, each penalty beats plain training by {min(gains):.1f} to {max(gains):.1f} points of test "
        f"accuracy, and plain training with as many gradient evaluations by {min(matched):.0f} to {max(matched):.0f}. After the "
        f"correction for {len(rows)} variants {len(found['seeds'])} seeds show the former for {shown} of them, and the page says so. "
        "On a network that underfits, the same penalties hurt."
    )
    return textwrap.fill(text, 150) + "\n"
