"""The plan: which variants, which compute-matched baselines, at which cost."""

from __future__ import annotations

import pytest

from gradreg.study.plan import gradient_evaluations, make_plan, with_gradient_evaluations
from gradreg.train import recipe as recipes
from gradreg.train.recipe import configuration

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
    recipe = recipes.parse_recipe("x", text)
    return make_plan(recipe, recipe.settings(), **{"penalties": None, "seeds": 2, **options})


def test_every_variant_and_seed_and_a_compute_matched_baseline_for_each_cost():
    plan = plan_of(BASE + VARIANTS)
    assert (plan.baseline, plan.seeds) == ("plain", [7, 8])
    found = sorted((job.variant, job.budget, job.evaluations, job.config.epochs) for job in plan.jobs if job.seed == 8)
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
    assert plan.matched == {"sam": 80, "late": 50, "central": 120}
    assert all(job.config.seed == job.seed and job.config.penalty is None for job in plan.jobs if job.budget == "gradients")
    assert len({job.folder for job in plan.jobs}) == len(plan.jobs)


def test_the_baseline_is_there_though_it_was_not_picked_and_picks_keep_their_order():
    assert plan_of(BASE + VARIANTS, penalties=["central", "sam"]).variants == ["plain", "central", "sam"]


def test_a_recipe_without_variants_compares_its_penalty_to_none():
    plan = plan_of(BASE + "penalty: {name: fgr, gamma: 0.1, epsilon: 0.1}")
    assert plan.variants == ["none", "fgr"]
    assert {job.config.penalty is None for job in plan.jobs if job.variant == "none"} == {True}


def test_without_a_plain_variant_the_baseline_is_made_by_leaving_the_penalty_out():
    plan = plan_of(BASE + "penalty: {name: sam, rho: 0.1}\nvariants: {a: {}, b: {penalty: {rho: 0.2}}}")
    assert plan.variants == ["none", "a", "b"]
    assert plan.settings["none"]["penalty"] is None
    assert plan.settings["b"]["penalty"] == {"name": "sam", "rho": 0.2}


def test_evaluations_count_a_last_smaller_batch_as_a_step():
    config = configuration({"data": {"train_size": 101}, "batch_size": 10, "epochs": 2, "penalty": {"name": "exact", "gamma": 0.1}})
    assert gradient_evaluations(config) == 2 * 11 * 3


def test_the_compute_matched_baselines_schedule_is_stretched_with_it():
    settings = {"data": {"train_size": 100}, "batch_size": 10, "epochs": 10}
    settings["schedule"] = {"name": "step", "decay_epochs": [4, 8], "warmup_epochs": 1}
    longer = with_gradient_evaluations(configuration(settings), 195)
    assert (longer.epochs, longer.schedule.decay_epochs, longer.schedule.warmup_epochs) == (20, [8, 16], 2)
    assert with_gradient_evaluations(configuration(settings), 100) is None


def test_seeds_must_be_positive():
    with pytest.raises(ValueError, match=r"--seeds must be >= 1; got 0"):
        plan_of(BASE + VARIANTS, seeds=0)
