"""Do the intervals of a study cover, and how often is its verdict false? 10,000 made-up studies of each kind, whose truth is known.

    python benchmarks/study_statistics.py --out benchmarks/results/study_statistics     # about five minutes of one core
    python benchmarks/study_statistics.py --page                                        # the stored table into docs/statistics.md

A study has a baseline and variants over common seeds. A value is the sum of what all runs of a seed share (the split, the initialization),
of the run's own noise, both of standard deviation 1, and of the variant's effect; so differences of variants share the baseline's noise.
The tests, Holm, the levels of a race and its intervals are those of ``gradreg.study``, the first three on all studies at once; the first
studies of each kind are also judged by ``compare_paired`` or ``Race.judge``, which must agree. Fails if a kind that is not named as beyond
the guarantee leaves it: 95 % intervals cover 93 to 97 %, and any false "helps" in a study has a chance of at most 5 %.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gradreg import files
from gradreg.study import statistics
from gradreg.study.boundaries import Spending, normal_quantile, stagewise_p
from gradreg.study.racing import Race
from gradreg.study.replay import replay
from gradreg.study.verdicts import compare_paired
from reporting import command, environment, report, signature
from tables import markdown

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results" / "study_statistics.md"
PAGE = ROOT / "docs" / "statistics.md"
Array = NDArray[Any]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Array]
ALPHA = 0.05
ALSO_JUDGED = 20
"""Studies of each kind that ``compare_paired`` judges too; a race, which is slower to judge, has a quarter."""


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return generator.standard_normal(shape)


def heavy(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Student's t of 3 degrees of freedom, of standard deviation 1."""
    return generator.standard_t(3, shape) / math.sqrt(3)


def low_tail(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Most runs a little above the mean, a few far below: minus an exponential, of mean 0, standard deviation 1 and skewness −2."""
    return 1 - generator.exponential(size=shape)


def collapsing(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Half a standard deviation better, but for one run in twenty, which is ten worse without diverging; the mean is 0."""
    return generator.standard_normal(shape) + 0.5 - 10.0 * (generator.random(shape) < 0.05)


@dataclass(frozen=True)
class Kind:
    """One kind of made-up study.

    Args:
        label: in the table.
        effects: of the variants.
        seeds: of a study; in a race the bound.
        noise: of a variant's runs.
        baseline_noise: of the baseline's.
        grid: values are rounded to multiples of it.
        diverges: chance that a run of a variant diverges.
        worst_diverge: runs of a variant whose own noise is below this diverge.
        race: the spending function, or "none" for a race that looks at every seed without a correction.
        beyond: shown beside the guarantee, not under it, and why.
    """

    label: str
    effects: tuple[float, ...]
    seeds: int
    noise: Noise = normal
    baseline_noise: Noise = normal
    grid: float | None = None
    diverges: float = 0.0
    worst_diverge: float | None = None
    race: Spending | str | None = None
    beyond: str = ""


THREE, KNOWN, EIGHT = (0.0, 0.0, 0.0), (0.0, 1.0, 3.0), (0.0,) * 8
KINDS = (
    *(Kind("no effect", THREE, n) for n in (3, 5, 10, 20)),
    Kind("no effect, 8 variants", EIGHT, 5),
    *(Kind("effects 0, 1 and 3", KNOWN, n) for n in (3, 5, 10, 20)),
    Kind("heavy tails", KNOWN, 5, heavy, heavy),
    Kind("heavy tails", KNOWN, 10, heavy, heavy),
    Kind("low tails", KNOWN, 5, low_tail, low_tail),
    Kind("low tails", KNOWN, 10, low_tail, low_tail),
    Kind("low tail of the variants alone", KNOWN, 5, low_tail),
    Kind("low tail of the variants alone", KNOWN, 10, low_tail),
    Kind("a coarse metric, in steps of 1/4", KNOWN, 3, grid=0.25),
    Kind("a coarse metric, in steps of 1/4", KNOWN, 5, grid=0.25),
    Kind("1 run in 10 diverges", KNOWN, 5, diverges=0.1),
    Kind("1 run in 10 diverges", KNOWN, 10, diverges=0.1),
    Kind("the worst runs diverge", THREE, 10, worst_diverge=-1.0),
    *(Kind("race, no effect", THREE, 20, race=s) for s in ("pocock", "obrien-fleming")),
    *(Kind("race, effects 0, 1 and 3", KNOWN, 20, race=s) for s in ("pocock", "obrien-fleming")),
    Kind("race, heavy tails", KNOWN, 20, heavy, heavy, race="obrien-fleming"),
    Kind("race, low tails", KNOWN, 20, low_tail, low_tail, race="obrien-fleming"),
    Kind("race, low tail of the variants alone", KNOWN, 20, low_tail, race="obrien-fleming"),
    Kind("race, 1 run in 50 diverges", KNOWN, 20, diverges=0.02, race="obrien-fleming"),
    Kind("race, the worst runs diverge", THREE, 20, worst_diverge=-1.0, race="obrien-fleming"),
    Kind("a coarse metric, in steps of 1", KNOWN, 3, grid=1.0, beyond="ties on so coarse a grid: safe, but too wide"),
    Kind("race without a correction, no effect", THREE, 20, race="none", beyond="what the correction is for"),
    Kind("a low tail of the differences themselves", THREE, 5, low_tail, lambda g, s: np.zeros(s), beyond="skewness −2"),
    Kind("a low tail of the differences themselves", THREE, 20, low_tail, lambda g, s: np.zeros(s), beyond="skewness −2"),
    *(
        Kind("1 run in 20 collapses, the others gain", THREE, n, collapsing, beyond="the tail is what makes the mean 0")
        for n in (5, 10, 20)
    ),
    Kind("a coarse metric, in steps of 1", KNOWN, 5, grid=1.0),
)


def studies(kind: Kind, number: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Values of the baseline, [studies, seeds], and of the variants, [studies, variants, seeds]; NaN for diverged runs."""
    shape = (number, len(kind.effects), kind.seeds)
    shared = generator.standard_normal((number, kind.seeds))
    baseline = shared + kind.baseline_noise(generator, (number, kind.seeds))
    own = kind.noise(generator, shape)
    values = shared[:, None] + own + np.asarray(kind.effects)[:, None]
    if kind.grid is not None:
        baseline, values = (np.round(x / kind.grid) * kind.grid for x in (baseline, values))
    gone = generator.random(shape) < kind.diverges
    if kind.worst_diverge is not None:
        gone |= own < kind.worst_diverge
    return baseline, np.where(gone, np.nan, values)


def counting(test: statistics.PairedT, failed: Array) -> Array:
    """The p that enter Holm: 1 for a gain of a variant that diverged."""
    return np.where(failed & ~(test.mean < 0), 1.0, test.p)


def simulate(kind: Kind, number: int, seed: int) -> dict[str, Any]:
    """The row of a kind: how often its intervals cover, and how often its verdicts are false and right."""
    generator = np.random.default_rng(seed)
    baseline, values = studies(kind, number, generator)
    gains = values - baseline[:, None]
    truth = np.asarray(kind.effects)
    if kind.race is None:
        test = statistics.paired_t(gains)
        failed = np.isnan(gains).any(axis=-1)
        shown = statistics.holm(counting(test, failed)) <= ALPHA
        half = -special.stdtrit(test.n - 1, ALPHA / 2) * test.se
        there = (test.n >= 2) & (test.sd > 0)
        covered = (np.abs(test.mean - truth) <= half)[there]
        used = np.full(gains.shape[:2], kind.seeds)
        mean = test.mean
    else:
        shown, failed, mean, used, covered = race(kind, gains)
    helps, harms = shown & ~failed & (mean > 0), shown & (mean < 0)
    check(kind, baseline, values, helps, harms)
    survivors = kind.worst_diverge is not None  # whose mean is not that of all runs: nothing to cover
    return {
        "kind": kind.label + (f" ({kind.race})" if kind.race in ("pocock", "obrien-fleming") else ""),
        "seeds": kind.seeds,
        "variants": len(kind.effects),
        "coverage": None if survivors or kind.race == "none" else float(covered.mean()),
        "false helps": float((helps & (truth <= 0)).any(axis=-1).mean()),
        "false harms": float((harms & (truth >= 0)).any(axis=-1).mean()),
        "false": float(((helps & (truth <= 0)) | (harms & (truth >= 0))).any(axis=-1).mean()),
        "helps": {f"{effect:g}": float(helps[:, i].mean()) for i, effect in enumerate(kind.effects) if effect > 0},
        "seeds used": {f"{effect:g}": float(used[:, i].mean()) for i, effect in enumerate(kind.effects)},
        "beyond": kind.beyond,
    }


def race(kind: Kind, gains: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Which variants are shown to differ, which diverged, their means and seeds where they stopped; which intervals cover, one a study."""
    rule = Race(range(kind.seeds), spending="obrien-fleming" if kind.race == "obrien-fleming" else "pocock")
    variants = gains.shape[1]
    levels = rule.levels(variants)
    if kind.race == "none":
        levels = np.repeat(ALPHA / np.arange(1, variants + 1)[:, None], len(rule.looks), axis=1)
    tests = [statistics.paired_t(gains[..., :n]) for n in rule.looks]
    failures = [np.isnan(gains[..., :n]).any(axis=-1) for n in rule.looks]
    p = np.stack([counting(t, f) for t, f in zip(tests, failures, strict=True)], axis=1)
    outcome = replay(p, np.stack(failures, axis=1), levels=levels).differs

    def there(arrays: list[Array]) -> Array:
        return np.take_along_axis(np.stack(arrays, axis=1), outcome.look[:, None], axis=1)[:, 0]

    failed, mean, used = there(failures), there([t.mean for t in tests]), np.asarray(rule.looks)[outcome.look]
    covered: list[Array] = []
    if kind.race != "none" and kind.worst_diverge is None:
        times = tuple(n / kind.seeds for n in rule.looks)
        ses, ns = np.stack([t.se for t in tests], axis=-1), np.stack([t.n for t in tests], axis=-1)
        for i, effect in enumerate(kind.effects):
            for look in range(len(times)):
                # One variant of each study; the interval of one that diverged is that of its survivors, without a claim.
                here = np.flatnonzero((outcome.look[:, i] == look) & ~failed[:, i] & (np.arange(len(gains)) % variants == i))
                for some in (here[k : k + 500] for k in range(0, len(here), 500)):
                    n, se = ns[some, i, : look + 1], ses[some, i, : look + 1]
                    z = normal_quantile((mean[some, i] - effect) / se[:, -1], n[:, -1] - 1)
                    used_levels = levels[outcome.open[some, i] - 1, : look + 1]
                    above = stagewise_p(times[: look + 1], used_levels, n=n, se=se, z=z, mean=effect)
                    covered.append((above >= ALPHA / 2) & (above <= 1 - ALPHA / 2))
    return outcome.shown, failed, mean, used, np.concatenate(covered) if covered else np.zeros(0)


def check(kind: Kind, baseline: Array, values: Array, helps: Array, harms: Array) -> None:
    """The first studies, judged as a user's are, must get the same verdicts."""
    if kind.race == "none":
        return
    for study in range(ALSO_JUDGED if kind.race is None else ALSO_JUDGED // 4):
        plain = dict(enumerate(baseline[study]))
        variants = {str(i): dict(enumerate(row)) for i, row in enumerate(values[study])}
        if kind.race is None:
            verdicts = compare_paired(plain, variants, mode="max")
        else:
            spending: Spending = "obrien-fleming" if kind.race == "obrien-fleming" else "pocock"
            verdicts = Race(range(kind.seeds), spending=spending).judge(plain, variants, mode="max").verdicts
        for i, verdict in enumerate(verdicts.values()):
            expected = "helps" if helps[study, i] else "harms" if harms[study, i] else None
            found = verdict.decision if verdict.decision in ("helps", "harms") else None
            if found != expected:
                raise SystemExit(f"{kind.label}, study {study}, variant {i}: {expected} at once, {found} alone.")


def beside(number: int) -> dict[str, float]:
    """What stands beside the verdict: claims by a margin, the promised power, and, of a tenth of the studies, sign flips and BCa."""
    generator = np.random.default_rng(0)
    baseline, values = studies(Kind("", (-1.0, -1.0, -1.0), 10), number, generator)
    test = statistics.paired_t(values - baseline[:, None])
    no_worse = statistics.holm(test.p_above(-1.0)) <= ALPHA / 2
    sd = math.sqrt(2)
    found: dict[str, float] = {"false no worse, 10 seeds, 3 variants worse by the margin": float(no_worse.any(axis=-1).mean())}
    for n in (3, 5, 10):
        effect = statistics.detectable_difference(n, sd, alpha=ALPHA)
        assert effect is not None
        shown = statistics.paired_t(generator.normal(effect, sd, (number, n)))
        found[f"shown of a difference that {n} seeds would have shown"] = float(((shown.p <= ALPHA) & (shown.mean > 0)).mean())
    few = max(1, number // 10)
    for n in (8, 10, 20):
        sample = generator.normal(0, 1, (few, n))
        ends = [statistics.bca_interval(row) for row in sample]
        found[f"coverage of BCa, {n} seeds"] = float(np.mean([pair is not None and pair[0] <= 0 <= pair[1] for pair in ends]))
    for n in (5, 6, 10):
        flips = [statistics.sign_flip_p(row) for row in generator.normal(0, 1, (few, n))]
        found[f"sign flips with p ≤ .05 of no effect, {n} seeds"] = float(np.mean(np.asarray(flips) <= ALPHA))
    return found


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """The rows under the guarantee that do not keep it."""
    found: list[str] = []
    for row in rows:
        if row["beyond"]:
            continue
        name = f"{row['kind']}, {row['seeds']} seeds"
        if row["coverage"] is not None and not 0.93 <= row["coverage"] <= 0.97:
            found.append(f"{name}: intervals cover {row['coverage']:.1%}")
        if row["false helps"] > ALPHA:
            found.append(f"{name}: false helps in {row['false helps']:.1%}")
    return found


def table(results: dict[str, Any]) -> str:
    """Both tables, in Markdown."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    def each(values: dict[str, float], form: Callable[[float], str]) -> str:
        return ", ".join(f"{form(value)} ({effect})" for effect, value in values.items())

    header = (
        "studies",
        "variants",
        "seeds",
        "intervals cover, %",
        'any false "helps", %',
        '"harms", %',
        "either, %",
        '"helps" (effect), %',
    )
    rows: list[tuple[str, ...]] = []
    for row in results["rows"]:
        raced = row["kind"].startswith("race")
        used = each(row["seeds used"], lambda n: f"{n:.1f}")
        rows.append(
            (
                row["kind"] + (f": beyond the guarantee, {row['beyond']}" if row["beyond"] else ""),
                str(row["variants"]),
                used if raced else str(row["seeds"]),
                percent(row["coverage"]),
                percent(row["false helps"]),
                percent(row["false harms"]),
                percent(row["false"]),
                each(row["helps"], lambda share: f"{100 * share:.0f}"),
            )
        )
    second = markdown(("beside the verdict", "%"), [(name, f"{100 * share:.1f}") for name, share in results["beside"].items()])
    note = f"{results['studies']:,} studies of each kind. Of a race: the seeds that a variant used on average, by its effect. –: no claim."
    return "\n".join([markdown(header, rows), note, "", second, signature(results, "numpy", "scipy")]) + "\n"


def page(text: str, stored: str) -> str:
    """The page with the stored tables in their place."""
    marked = re.compile(r"(<!-- stored: benchmarks/results/study_statistics.md -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    return marked.sub(lambda match: match[1] + stored + match[2], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10_000, help="made-up studies of each kind (default: 10000)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--page", action="store_true", help="only put the stored tables into docs/statistics.md")
    arguments = parser.parse_args()
    if arguments.page:
        files.write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), STORED.read_text(encoding="utf-8")))
        return 0
    rows: list[dict[str, Any]] = []
    for i, kind in enumerate(KINDS):
        start = time.perf_counter()
        rows.append(simulate(kind, arguments.studies, seed=i))
        print(f"{kind.label}, {kind.seeds} seeds: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    results = {
        "command": command(),
        "environment": environment(("numpy", "scipy")),
        "studies": arguments.studies,
        "rows": rows,
        "beside": beside(arguments.studies),
    }
    report(results, table(results), arguments.out)
    for line in broken(rows):
        print(f"outside of the guarantee: {line}", file=sys.stderr)
    return 1 if broken(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
