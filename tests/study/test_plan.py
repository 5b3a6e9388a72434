"""The plan: which variants, which compute-matched baselines, at which cost."""

from __future__ import annotations

from fractions import Fraction

import pytest

from gradreg.penalties import GradientPenalty
from gradreg.study.plan import folder_name, make_plan
from gradreg.study.variants import parse_penalty
from gradreg.train import recipe as recipes
from gradreg.train.recipe import configuration
from gradreg.train.task import RecipeTask, gradient_evaluations, lengthened

BASE = "data: {train_size: 100}\nbatch_size: 10\nepochs: 4\nseed: 7\n"
VARIANTS = """
variants:
  plain: {}
  sam: {penalty: {name: sam, rho: 0.1}}
  late: {penalty: {name: sam, rho: 0.1, warmup: {kind: zero, steps: 30}}}
  central: {penalty: {name: cgr, gamma: 0.1, epsilon: 0.1}}
  hot: {optimizer: {lr: 0.5}}
"""


def plan_of(text: str, **options):
    return make_plan(RecipeTask(recipes.parse_recipe("x", text)), **{"seeds": 2, **options})


def config_of(job):
    return job.variant._configuration(job.seed, job.stretch)


def test_every_variant_and_seed_and_a_compute_matched_baseline_for_each_cost():
    plan = plan_of(BASE + VARIANTS)
    assert (plan.baseline, plan.seeds) == ("plain", [7, 8])
    jobs = plan.jobs({})
    found = sorted((job.name, job.budget, job.evaluations, config_of(job).epochs) for job in jobs if job.seed == 8)
    assert found == [
        ("central", "epochs", 120, 4),
        ("hot", "epochs", 40, 4),
        ("late", "epochs", 50, 4),  # 30 steps without a second pass, 10 with
        ("plain", "epochs", 40, 4),
        ("plain", "gradients", 50, 5),
        ("plain", "gradients", 80, 8),
        ("plain", "gradients", 120, 12),
        ("sam", "epochs", 80, 4),
    ]
    assert {name: one.evaluations for name, one in plan.longer({}).items()} == {"sam": 80, "late": 50, "central": 120}
    longer = [config_of(job) for job in jobs if job.budget == "gradients"]
    assert all(config.penalty is None and config.seed in (7, 8) for config in longer)
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_baseline_is_there_though_it_was_not_picked_and_picks_keep_their_order():
    assert plan_of(BASE + VARIANTS, penalties=["central", "sam"]).variants.keys() == {"plain", "central", "sam"}


def test_a_recipe_without_variants_compares_its_penalty_to_none():
    plan = plan_of(BASE + "penalty: {name: fgr, gamma: 0.1, epsilon: 0.1}")
    assert list(plan.variants) == ["none", "fgr"]
    assert {config_of(job).penalty is None for job in plan.jobs({}) if job.name == "none"} == {True}


def test_without_a_plain_variant_the_baseline_is_made_by_leaving_the_penalty_out():
    plan = plan_of(BASE + "penalty: {name: sam, rho: 0.1}\nvariants: {a: {}, b: {penalty: {rho: 0.2}}}")
    assert list(plan.variants) == ["none", "a", "b"]
    assert plan.variants["none"].settings["penalty"] is None
    assert plan.variants["b"].settings["penalty"] == {"name": "sam", "rho": 0.2}


def test_evaluations_count_a_last_smaller_batch_as_a_step():
    config = configuration({"data": {"train_size": 101}, "batch_size": 10, "epochs": 2, "penalty": {"name": "exact", "gamma": 0.1}})
    assert gradient_evaluations(config) == 2 * 11 * 3


def test_the_compute_matched_baselines_schedule_is_stretched_with_it():
    settings = {"data": {"train_size": 100}, "batch_size": 10, "epochs": 10}
    settings["schedule"] = {"name": "step", "decay_epochs": [4, 8], "warmup_epochs": 1}
    longer = lengthened(configuration(settings), Fraction(20, 10))
    assert (longer.epochs, longer.schedule.decay_epochs, longer.schedule.warmup_epochs) == (20, [8, 16], 2)


def test_seeds_must_be_positive():
    with pytest.raises(ValueError, match=r"seeds must be >= 1; got 0"):
        plan_of(BASE + VARIANTS, seeds=0)


def test_a_penalty_and_changed_keys_by_their_text():
    plan = plan_of(BASE + VARIANTS, penalties=["sam", "fgr:gamma=0.2,epsilon=1e-1,every=5", "gnp:r=0.1,alpha=0.8@optimizer.lr=0.5"])
    assert list(plan.variants) == ["plain", "sam", "fgr:gamma=0.2,epsilon=1e-1,every=5", "gnp:r=0.1,alpha=0.8@optimizer.lr=0.5"]
    fgr, gnp = list(plan.variants.values())[2:]
    assert fgr.settings["penalty"] == {"name": "fgr", "gamma": 0.2, "epsilon": 0.1, "every": 5}
    assert (gnp.settings["penalty"]["r"], gnp.settings["optimizer"]["lr"]) == (0.1, 0.5)
    assert plan.variants["sam"].settings["optimizer"]["lr"] == plan.variants["plain"].settings["optimizer"]["lr"] != 0.5


def test_the_text_of_a_penalty():
    assert parse_penalty("sam") == ({"name": "sam"}, {})
    expected = {"name": "sam", "rho": 0.1, "warmup": {"kind": "zero", "steps": 3}}, {"width": 8, "act": "relu"}
    assert parse_penalty("sam:rho=0.1,warmup={kind: zero, steps: 3}@width=8,act=relu") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sma:rho=0.1", r"unknown variant or penalty 'sma'. Did you mean 'sam'\?"),
        ("sam:0.1", r"penalty 'sam:0.1' must be written NAME:KEY=VALUE,KEY=VALUE@OPTION=VALUE; got '0.1' in it"),
        ("sam:rho=0.1,rho=0.2", r"must give each key once; got 'rho' twice"),
        ("sam:rho=[", r"rho of penalty 'sam:rho=\[' must be valid YAML"),
        ("none:rho=1", r"'none:rho=1' must be 'none' alone"),
        ("sam:rho=no", r"rho of penalty 'sam:rho=no'"),
        ("sam:radius=1", r"sam:radius=1: .*radius"),
        ("sam:rho=-1", r"sam:rho=-1: rho must be"),
        ("sam:rho=0.1@no.such=1", r"no.such|'no'"),
    ],
)
def test_a_text_that_is_no_penalty(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan_of(BASE + VARIANTS, penalties=[text])


def test_names_that_would_share_a_folder_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"'sam:rho=0.1' and 'sam:rho=0.1@'"):
        plan_of(BASE + VARIANTS, penalties=["sam:rho=0.1", "sam:rho=0.1@"])
    with pytest.raises(ValueError, match=r"'SAM' and 'sam'"):
        make_plan(RecipeTask(recipes.parse_recipe("x", BASE)), {"SAM": "sam:rho=0.1", "sam": "sam:rho=0.2"})


def test_a_variant_called_none_that_has_a_penalty_is_not_the_baseline():
    with pytest.raises(ValueError, match=r"'none' must be plain training.*got a variant of that name with SAM"):
        make_plan(RecipeTask(recipes.parse_recipe("x", BASE)), {"none": "sam:rho=0.1"})
    plan = make_plan(RecipeTask(recipes.parse_recipe("x", BASE)), {"none": "sam:rho=0.1", "plain": None})
    assert plan.baseline == "plain"


def test_a_longer_baselines_folder_cannot_be_a_variants():
    plan = plan_of(BASE + "variants: {plain: {}, plain-80-gradients: {penalty: {name: sam, rho: 0.1}}}")
    folders = [job.folder for job in plan.jobs({})]
    assert len(set(folders)) == len(folders) == 6
    assert "@" not in folder_name("a@b")


def test_rivals_can_be_left_out():
    assert all(job.budget == "epochs" for job in plan_of(BASE + VARIANTS, rivals=["epochs"]).jobs({}))
    with pytest.raises(ValueError, match=r"unknown rivals 'second'\. Did you mean 'seconds'"):
        plan_of(BASE + VARIANTS, rivals=["second"])


def test_two_hundred_variants_and_twenty_seeds_are_planned_in_time_proportional_to_them(monkeypatch):
    """A configuration is parsed once a variant and its evaluations are counted once, however many seeds and steps there are."""
    counted = []
    counts = GradientPenalty.evaluations_at
    monkeypatch.setattr(GradientPenalty, "evaluations_at", lambda *a, **k: counted.append(a) or counts(*a, **k))
    plan = plan_of(BASE, penalties=[f"sam:rho=0.{i}" for i in range(100, 300)], seeds=20)
    assert len(plan.jobs({})) == 20 * 202  # with as many of plain training at as many gradients
    assert plan.jobs({}) is plan.jobs({})
    assert len(counted) <= 201


@pytest.mark.parametrize(
    "penalty", ["sam:rho=0.1", "sam:rho=0.1,every=3", "looksam:rho=0.1,k=4,a=0.7", "fgr:epsilon=auto", "sam:rho=0.1,tail=0.3"]
)
def test_evaluations_are_those_of_every_step(penalty):
    variant = next(v for name, v in plan_of(BASE, penalties=[penalty], seeds=2).variants.items() if name != "none")
    steps = variant.config.epochs * variant.config.steps_per_epoch()
    resolved = variant.config.resolved_penalty()
    assert variant.evaluations == round(sum(resolved.evaluations_at(step) for step in range(steps)))
