"""Numbers that stand in the sentences of a page: each sentence is made again from the stored result, and must be in the page.

A table is written into its page by ``tables.py``; a sentence is not, because a reader of the source would not want its markers. Instead
``make lint`` fails where a page does not have it, and says what it should be.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import quoted_theory
from from_choosing import AUTO, AUTO_ELSEWHERE, accuracies
from from_results import ROOT, stored

from gradreg.study.probing import Climb, Probe
from gradreg.study.statistics import paired_difference


def outdated(root: Path = ROOT) -> Iterator[str]:
    """A line for each sentence that a page should have and does not."""
    for page, sentence in QUOTED:
        text = " ".join((root / "docs" / page).read_text(encoding="utf-8").split())
        if (wanted := sentence()) not in text:
            yield f"docs/{page} must say, from its stored result: {wanted}"


def loop() -> str:
    """The training loop against a bare one."""

    def of(name: str) -> tuple[str, str]:
        found = stored("loop_throughput.json")["workloads"][name]
        low, high = found["ratio_quartiles"]
        return f"{found['ratio']:.3f}", f"{low:.3f}–{high:.3f}"

    names = "MLP 784-512-512-512-10, MNIST", "CNN 16-32-128-10, MNIST", "MLP 64-256-256-10, digits"
    (mlp, around), (cnn, around_cnn), (small, around_small) = (of(name) for name in names)
    smallest = stored("loop_throughput.json")["workloads"][names[-1]]
    bare, own = (1000 * 128 / smallest[f"{which}_images_per_second"] for which in ("bare", "loop"))  # a batch has 128 images
    return (
        f"MLP 784-512-512-512-10 {mlp} (quartiles {around}), CNN of 280,000 weights {cnn} ({around_cnn}), MLP 64-256-256-10, whose step "
        f"takes {bare:.1f} ms, {small} ({around_small}), which is {own - bare:.1f} ms of Python per step"
    )


def pipeline() -> str:
    """Augmentation on the device against torchvision's."""
    ratio = stored("data_pipeline.json")["tasks"]["flip and crop"]["ratio"]
    return f"({ratio:.1f} times as fast as torchvision with two workers for flips and crops)"


def data_parallel() -> str:
    """Step times with two processes."""
    rows = re.findall(r"^\| (\S.*?) \| ([\d.]+) \| ([\d.]+) \|$", stored("data_parallel.md"), flags=re.MULTILINE)
    found = {name: (float(milliseconds), ratio) for name, milliseconds, ratio in rows}
    one = found["plain, two passes, one all-reduce"][0]
    return (
        f"two plain passes with one all-reduce {one:.0f} ms, SAM local {found['SAM, scope local'][1]} times that, F-GR local "
        f"{found['F-GR, scope local'][1]}, SAM global {found['SAM, scope global'][1]}, plain DDP with two all-reduces "
        f"{found['plain, two passes, two all-reduces'][1]}."
    )


def best_by_early_stopping() -> str:
    """What plain training stopped early reaches in the demo, and what penalties add to it."""
    rows = json.loads((ROOT / "docs" / "results" / "digits-noisy-labels.json").read_text(encoding="utf-8"))["table"]
    gains = [row["early_difference"]["difference"] for row in rows if row["early_difference"] is not None]
    plain = next(row["best_mean"] for row in rows if row["variant"] == "none" and row["budget"] == "epochs")
    return (
        f"Plain training stopped at its best epoch by validation, at no extra cost, reaches {plain:.2f} %; the penalties, each at its "
        f"own best epoch, are {min(gains):.1f} to {max(gains):.1f} points ahead of it"
    )


def cheaper_on_cifar() -> str:
    """What cheaper F-GR keeps on the convolutional network."""
    rows = re.findall(r"^\| (\S+) \|.*\| ([^|]+) \|$", stored("choosing/cost-cifar10-cost.md"), flags=re.MULTILINE)
    kept = dict(rows)
    return f"the quarter keeps {kept['quarter']} and the tenth {kept['tenth-every-5']}: measure before relying on one"


def held_out_keeps() -> str:
    """Which part of the gain of ``auto()`` stays with held-out images, where it gains clearly."""
    kept: list[float] = []
    for name in ("digits-cost", "mnist-cost", "cifar10-cost"):
        found = accuracies(f"auto-{name}-held-out")
        held, auto = (paired_difference(found[f"fgr auto 0.95{more}"], found["none"]) for more in (" held out", ""))
        assert held is not None
        assert auto is not None
        kept.append(100 * held.mean / auto.mean)
    return f"where `auto()` helps, {min(kept):.0f} to {max(kept):.0f} % of its gain stay"


def wide_target() -> str:
    """What another target gains over the best fixed radius in the widest network."""
    rows = dict(
        re.findall(r"^\| (fgr auto \S+) \| .* \| ([^|]+) \|$", stored("choosing/auto-digits-cost-width-2048.md"), flags=re.MULTILINE)
    )
    return f"{rows['fgr auto 0.85']} points ({seeds_of('auto-digits-cost-width-2048')}; the target was chosen on two others, `--tune`)"


def starts_on_digits() -> str:
    """What ``auto()`` gains from a start far too small, and from one far too large."""
    rows = dict(re.findall(r"^\| fgr from (\S+) \| [^|]* \| (\S+)", stored("choosing/auto-digits-cost-starts.md"), flags=re.MULTILINE))
    return f"from 0.001 it gains {rows['0.001']} on digits, from 1 {rows['1']} (`--starts`, {seeds_of('auto-digits-cost-starts')})"


def seeds_of(name: str) -> str:
    """The number of seeds of a stored comparison of docs/choosing.md, in words."""
    return f"{len(stored(f'choosing/{name}.json')['seeds'])} seeds"


def auto_beside_the_best() -> str:
    """That ``auto()`` is clearly below the best fixed radius on no task but in the widest network."""
    for title, name in {**AUTO, **AUTO_ELSEWHERE}.items():
        found = accuracies(f"auto-{name}")
        fixed = [values for one, values in found.items() if one.startswith("fgr ") and one[4].isdigit()]
        if fixed:
            best = max(fixed, key=lambda values: sum(values.values()) / len(values))
            difference = paired_difference(found["fgr auto 0.95"], best)
            assert difference is not None
            assert difference.high is not None
            assert (difference.high > -0.3) == (title != "digits, width 2048"), title
            assert (difference.mean < -1) == (title == "digits, width 2048"), title
            assert (difference.high < 0) == (title in ("digits, width 512", "digits, width 1024", "digits, width 2048")), title
    return "up to width 1024 no interval lies below -0.3 as a whole"


def sam_by_the_same_target() -> str:
    """SAM with AutoRadius against SAM with its best radius."""
    found = stored("choosing/auto-digits-cost.md")
    rows = dict(re.findall(r"^\| sam auto (\S+) \| [^|]* \| [^|]* \| ([^|]+) \|", found, flags=re.MULTILINE))
    return f"on digits {rows['0.95']} over SAM's best radius, {rows['0.9']} with target 0.9"


def adapters() -> str:
    """The dearest adapter."""
    found = [one for name in ("", "_fabric") for one in stored(f"adapter_cost{name}.json")["adapters"].values()]
    return f"at most {max(one['ratio'] for one in found):.2f} of the loop by hand"


def left_of_the_gain() -> str:
    """The sentence of F-GR in the study of fifteen seeds."""
    rows = json.loads((ROOT / "docs" / "results" / "digits-fifteen-seeds.json").read_text(encoding="utf-8"))["table"]
    row = next(row for row in rows if row["variant"] == "fgr")
    gain, early = row["difference"], row["early_difference"]
    told = f"{early['difference']:+.2f} [{early['low']:+.2f}, {early['high']:+.2f}]"
    return f"stopped early by validation {early['difference']:.2f} of these {gain['difference']:.2f} is left: {early['decision']}, {told}"


def at_equal_seconds() -> str:
    """What F-GR adds to plain training of as many seconds, on a JAX task."""
    found = json.loads((ROOT / "docs" / "results" / "nnx-digits-seconds.json").read_text(encoding="utf-8"))
    row = next(row for row in found["table"] if row["variant"].startswith("fgr"))
    gain, measured = row["seconds_difference"], found["seconds"][row["variant"]]
    told = f"{gain['difference']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    sam = next(row for row in found["table"] if row["variant"].startswith("sam"))["seconds_difference"]["decision"]
    return (
        f"A run of F-GR took {measured['ratio']:.2f} times the seconds of plain training, which therefore got {measured['length']} epochs "
        f"where F-GR had {measured['lengths'][-1]}: {gain['decision']}, {told} points. "
        f"For SAM five seeds {sam}."
    )


def digits_at_equal_seconds() -> str:
    """What each penalty adds to plain training of as many seconds, on the demo's task."""
    found = json.loads((ROOT / "docs" / "results" / "digits-seconds.json").read_text(encoding="utf-8"))
    told: list[str] = []
    for row in found["table"]:
        if gain := row.get("seconds_difference"):
            ratio = found["seconds"][row["variant"]]["ratio"]
            interval = f"{gain['difference']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
            told.append(f"{NAMES[row['variant']]} ({ratio:.2f} times the seconds) {interval}")
    return f"{', '.join(told)} points over plain training of as many seconds."


NAMES = {"sam": "SAM", "gnp": "GNP", "fgr": "F-GR", "bgr": "B-GR"}


def sharpness_beside_others() -> str:
    """Memory, time and error of the largest eigenvalue beside other packages."""
    rows = {(row["model"], row["what"]): row for row in stored("sharpness_peers.json")["rows"]}
    ours, theirs = (rows["vit", f"{name}, fused attention"] for name in ("gradreg", "hessian-eigenthings"))
    memory = rows["resnet10t", "gradreg, exact"]["peak_megabytes"] / rows["resnet10t", "curvlinops"]["peak_megabytes"]
    return (
        f"on the ResNet it holds {memory:.1f} times the memory of curvlinops. With fused attention hessian-eigenthings takes "
        f"{theirs['seconds'] / ours['seconds']:.2f} of our time, with an error {theirs['error'] / ours['error']:.0f} times as large. "
        "Differences across the kinks of a ReLU network are no second derivative: on the ResNet they are "
        f"{100 * rows['resnet10t', 'gradreg, differences']['error']:.0f} % off."
    )


def looksam_beside_another() -> str:
    """Time of LookSAM beside pytorch_optimizer's."""
    ours, theirs = re.findall(r"^\| LookSAM, k = 5 \| ([\d.]+) \| ([\d.]+) \|", stored("peers.md"), flags=re.MULTILINE)[0]  # the MLP's
    return f"the steps between really take one pass: {ours} of two passes on an MLP against {theirs}"


def minilm_accuracy() -> str:
    """What penalties change in the accuracy of MiniLM."""
    found = stored("language-models/minilm.json")["found"]["wrong"]
    verdicts = [(wrong, row, row["difference"]) for wrong, one in found.items() for row in one["table"] if row["difference"]]
    assert {verdict["decision"] for *_, verdict in verdicts} == {"cannot tell"}
    wrong, row, most = max(verdicts, key=lambda one: abs(one[2]["difference"]))
    worst = min(run["test_accuracy"] for one in found.values() for run in one["runs"])
    told = f"{most['difference']:+.2f} [{most['low']:+.2f}, {most['high']:+.2f}]"
    return (
        f"the largest difference is {told} points, of `{row['label']}` with {'wrong' if float(wrong) else 'right'} labels. No run fell to "
        f"chance: the worst ended at {100 * worst:.0f} %."
    )


def minilm_likelihood() -> str:
    """What penalties change in the negative log-likelihood of MiniLM."""
    found = stored("language-models/minilm.json")["found"]["wrong"]
    own = {
        wrong: [row["nll"] for row in one["logged"]["table"] if row["nll"].get("difference") is not None] for wrong, one in found.items()
    }
    assert all(one["low"] > 0 for one in own["0.3"])
    assert all(one["difference"] < 0 for one in own["0"])
    raised, lowered = (sorted(abs(one["difference"]) for one in own[wrong]) for wrong in ("0.3", "0"))
    above = sum(one["high"] >= 0 for one in own["0"])
    return (
        f"With wrong labels every penalty raises it, by {raised[0]:.3f} to {raised[-1]:.3f}, and every interval is above 0; with right "
        f"labels every penalty lowers it, by {lowered[0]:.3f} to {lowered[-1]:.3f}, and {above} of {len(lowered)} intervals reach 0."
    )


def smollm_forgetting() -> str:
    """What penalties change in the loss of another book."""
    found = stored("language-models/smollm.json")["found"]
    rows = {row["label"]: row["forgetting"] for row in found["logged"]["table"]}
    fgr, auto = (f"{rows[name]['difference']:+.3f} [{rows[name]['low']:+.3f}, {rows[name]['high']:+.3f}]" for name in ("fgr", "auto"))
    verdicts = [row["difference"] for row in found["table"] if row["difference"]]
    assert {one["decision"] for one in verdicts} == {"cannot tell"}
    return (
        f"by {-rows['none']['mean']:.3f} with plain fine-tuning, by {-rows['fgr']['mean']:.3f} with F-GR, by {-rows['auto']['mean']:.3f} "
        f"with `auto`. The differences to plain are {fgr} and {auto}; the loss on Job itself differs by at most "
        f"{max(abs(one['difference']) for one in verdicts):.3f}, which two seeds cannot tell from nothing."
    )


def hacked_reward() -> str:
    """How soon the reward is hacked, and which true scores are left."""
    ways = stored("language-models/grpo.json")["found"]["ways"]
    soon = max(next(step for step, reward in zip(way["step"], way["reward"], strict=True) if reward > 0.9) for way in ways)
    begun = sum(way["test_true_score"][0] for way in ways) / len(ways)
    held = [way["test_true_score"][-1] for way in ways if way["variant"] == "kl"]
    others = sorted((way["test_true_score"][-1], way["variant"]) for way in ways if way["variant"] != "kl")
    lost = sum(score < 0.1 for score, _ in others)
    assert lost == len(others) - 1
    return (
        f"Every run has a reward above 0.9 within {soon} steps. With the KL penalty (β = 0.04) the true score ends at "
        f"{' and '.join(f'{score:.2f}' for score in held)}, where it began at {begun:.2f}; without it, {lost} of {len(others)} runs end "
        f"below 0.1, and one, of `{others[-1][1]}`, at {others[-1][0]:.2f}."
    )


def hacked_later() -> str:
    """That a hundred times the strength delays it."""
    ways = stored("language-models/grpo.json")["found"]["ways"]

    def means(name: str, step: int) -> tuple[float, float]:
        own = [[way[key][way["step"].index(step)] for key in ("reward", "test_true_score")] for way in ways if way["variant"] == name]
        reward, score = (sum(one) / len(own) for one in zip(*own, strict=True))
        return reward, score

    strong, plain = means("fgr-100", 20), means("none", 20)
    assert means("fgr-100", 50)[0] > 0.99
    assert means("fgr-100", 50)[1] < means("none", 50)[1]
    return (
        f"at step 20 the reward is {strong[0]:.2f} and the true score {strong[1]:.2f}, against {plain[0]:.2f} and {plain[1]:.2f} of plain "
        "GRPO; at step 50 nothing of that is left."
    )


def cosines_at_the_best_radii() -> str:
    """The cosine of the first five epochs at the best radius of each method, and at a smaller one that is as good."""
    runs = stored("choosing/signs.json")["runs"]
    means = {(run["method"], run["radius"]): sum(run["cosine"][:5]) / 5 for run in runs}
    best: dict[str, float] = {}
    for run in runs:
        best[run["method"]] = max(
            (one for one in runs if one["method"] == run["method"]), key=lambda one: (one["test_accuracy"], one["radius"])
        )["radius"]
    own = [means[each] for each in best.items()]
    smaller = f"{means['fgr', 0.5]:.2f}".removeprefix("0")
    return f"nearly the same cosine early on, {min(own):.2f} to {max(own):.2f}** (F-GR's 0.5, as good as 1, has {smaller})"


def random_directions() -> str:
    """What a random direction gains at most."""
    gains = re.findall(r"^\| random-\S+ \| [^|]* \| [^|]* \| (\S+)", stored("choosing/cost-digits-cost.md"), flags=re.MULTILINE)
    return f"random directions gain at most {max(map(float, gains)):.1f} points"


def layerwise_over_sam() -> str:
    """By how much the best loss of mup2_sam is below SAM's, over the widths."""
    losses: dict[tuple[str, int, float], list[float]] = {}
    for run in stored("layerwise_radii.json")["runs"]:
        if run["radius"] is not None:
            losses.setdefault((run["method"], run["width"], run["radius"]), []).append(run["loss"])
    best: dict[tuple[str, int], float] = {}
    for (method, width, _), values in losses.items():
        best[method, width] = min(best.get((method, width), math.inf), sum(values) / len(values))
    below = [best["SAM", width] - loss for (method, width), loss in best.items() if method != "SAM"]
    low, high = (f"{value:.2f}".removeprefix("0") for value in (min(below), max(below)))
    return f"At every width its best loss is also lower than SAM's, by {low} to {high}."


def host_on_a_gpu() -> str:
    """What a step of SAM takes beyond two plain passes on the ResNet-50, by the wall's clock, over the ways it runs in."""
    ways = stored("gpu/step-cost-resnet50.json")["ways"].values()
    beyond = [way["SAM"]["milliseconds"] - way["two"]["milliseconds"] for way in ways]
    return f"{min(beyond):.0f} to {max(beyond):.0f} milliseconds on the ResNet-50"


def exact_on_a_gpu() -> str:
    """How much more time and memory the exact penalty takes there."""
    ways = stored("gpu/step-cost-resnet50.json")["ways"].values()
    times, copies = [way["exact"]["ratio_to_two"] for way in ways], [way["exact"]["memory_over_plain"] for way in ways]
    longer, larger = (f"{min(one):.0f} to {max(one):.0f}" for one in (times, copies))
    return f"{longer} times two passes, and {larger} times the memory of the parameters"


def jax_convolution() -> str:
    """How slow a convolution is inside ``cond``."""
    inside, outside = (jax_step("CNN", f'the same, over, branch="{branch}"') for branch in ("cond", "select"))
    return f"the small network of `benchmarks/jax_step_cost.py` took {inside / outside:.0f} times as long inside `cond`"


def jax_exact() -> str:
    """What the exact penalty costs in JAX."""
    first, second, third = (
        f"{jax_step(name, 'gradreg exact') / jax_step(name, 'one plain gradient'):.1f}" for name in ("MLP", "CNN", "ViT")
    )
    return f"forward over reverse: {first}, {second} and {third} plain gradients in this table"


def jax_step(model: str, step: str) -> float:
    """Processor time of a step in JAX, in units of two plain gradients."""
    found = stored("jax_step_cost.json")["models"]
    return next(one for name, one in found.items() if name.split()[0] == model)["ratio in processor time"][step]


def equal_seconds() -> str:
    """How a table names the baseline of as many seconds as SAM."""
    found = json.loads((ROOT / "docs" / "results" / "digits-seconds.json").read_text(encoding="utf-8"))
    return next(f'("{row["label"]}")' for row in found["table"] if "equal seconds of sam" in row["label"])


def seeds_that_would_tell() -> str:
    """Which penalties the demo shows to help, and the seeds that it names for the others."""
    rows = json.loads((ROOT / "docs" / "results" / "digits-noisy-labels.json").read_text(encoding="utf-8"))["table"]
    own = {row["variant"]: row["difference"] for row in rows if row["variant"] in NAMES and row["budget"] == "epochs"}
    (helps,) = (name for name, one in own.items() if one["decision"] == "helps")
    assert own[helps]["difference"] == min(one["difference"] for one in own.values())
    needed = [one["needed"] for name, one in own.items() if name != helps]
    assert len(needed) == 3
    return (
        f"{NAMES[helps]} helps, though its gain is the smallest, and for the other three five seeds cannot tell. The demo says that "
        f"{min(needed)} to {max(needed)} would."
    )


def flattest() -> str:
    """Which method's minima are the flattest on the digits."""
    found = json.loads((ROOT / "docs" / "results" / "sharpness-digits.json").read_text(encoding="utf-8"))["sharpness"]["table"]
    sharp = {row["label"]: row["largest_eigenvalue"]["mean"] for row in found}
    first, second = sorted(sharp, key=sharp.__getitem__)[:2]
    return (
        f"{NAMES[first]}'s minima are the flattest, and {NAMES[second]}'s, with {sharp[second] / sharp[first]:.2f} times the largest "
        "eigenvalue, score as much"
    )


def alignment_of_the_best_radii() -> str:
    """The cosines of ``cosines_at_the_best_radii``, where a probe looks for them."""
    found = [float(one) for one in re.findall(r"\d?\.\d\d", cosines_at_the_best_radii())]
    return f"(`docs/choosing.md`: {min(found):.2f} to {max(found):.2f} early on)"


def barely_shown() -> str:
    """How far correlations of sharpness with accuracy exclude 0, over all runs."""
    found = json.loads((ROOT / "docs" / "results" / "sharpness-digits.json").read_text(encoding="utf-8"))["sharpness"]["correlations"]
    shown = [one for one in found if one["measure"] in ("largest_eigenvalue", "trace", "m_sharpness")]
    overall, within = ([one for one in shown if (one["over"] == "over all runs") == every] for every in (True, False))
    assert sum(-0.1 < one["high"] < 0 for one in overall) == 2
    assert sum(one["high"] > 0 for one in overall) == 1
    assert all(one["low"] < 0 < one["high"] for one in within)
    return "two of the three intervals barely exclude 0 and one does not. Within variants nothing is shown: the intervals contain 0"


def best_radius_of_sam() -> str:
    """The best radius of SAM on the digits."""
    (best,) = re.findall(r"^\| SAM: ρ \| (\S+) \|", stored("choosing/radius-digits-cost.md"), flags=re.MULTILINE)
    return f"The best of a sweep over the same digits is {best} (`docs/choosing.md`)."


def printed_by_the_probe() -> str:
    """What ``gradreg tune digits-noisy-labels --probe --penalty sam fgr`` says of SAM, from the ``probe.json`` that it wrote."""
    found = dict(next(one for one in stored("probe-digits.json")["probes"] if one["penalty"] == "sam"))
    del found["start"], found["range"]
    found["climbs"] = [Climb(**climb) for climb in found["climbs"]]
    found["losses"] = [(one["epoch"], one["loss"]) for one in found["losses"]]
    return " ".join(Probe("digits-noisy-labels", **found).sentences())


QUOTED: tuple[tuple[str, Callable[[], str]], ...] = (
    ("coming-from-sam.md", looksam_beside_another),
    ("language-models.md", minilm_accuracy),
    ("language-models.md", minilm_likelihood),
    ("language-models.md", smollm_forgetting),
    ("language-models.md", hacked_reward),
    ("language-models.md", hacked_later),
    ("training.md", loop),
    ("comparing.md", left_of_the_gain),
    ("comparing.md", at_equal_seconds),
    ("comparing.md", digits_at_equal_seconds),
    ("choosing.md", auto_beside_the_best),
    ("choosing.md", starts_on_digits),
    ("cost.md", host_on_a_gpu),
    ("cost.md", exact_on_a_gpu),
    ("choosing.md", held_out_keeps),
    ("choosing.md", wide_target),
    ("choosing.md", sam_by_the_same_target),
    ("choosing.md", cosines_at_the_best_radii),
    ("choosing.md", random_directions),
    ("choosing.md", layerwise_over_sam),
    ("integrations.md", adapters),
    ("quick-start.md", cheaper_on_cifar),
    ("quick-start.md", pipeline),
    ("quick-start.md", best_by_early_stopping),
    ("pytorch.md", data_parallel),
    ("sharpness.md", sharpness_beside_others),
    ("sharpness.md", flattest),
    ("sharpness.md", barely_shown),
    ("jax.md", jax_convolution),
    ("jax.md", jax_exact),
    ("comparing.md", equal_seconds),
    ("quick-start.md", seeds_that_would_tell),
    ("tuning.md", alignment_of_the_best_radii),
    ("tuning.md", best_radius_of_sam),
    ("tuning.md", printed_by_the_probe),
    *quoted_theory.QUOTED,
)
"""Page -> the sentence that it must have."""
