"""A recipe is parsed once: how many configurations and penalties the commands build, and how often jsonargparse parses."""

from __future__ import annotations

import functools
from collections import Counter

import jsonargparse
import pytest

from gradreg import cli
from gradreg.penalties import GradientPenalty
from gradreg.study.plan import Job, Plan, make_plan
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.task import RecipeTask, RecipeVariant

TEXT = """
data: {train_size: 100}
epochs: 2
batch_size: 50
variants:
  none: {}
  sam: {penalty: {name: sam, rho: 0.1}}
  late: {penalty: {name: sam, rho: 0.1, warmup: {kind: zero, epochs: 1}}}
"""


@pytest.fixture
def built(monkeypatch) -> Counter[str]:
    """Counts what is built while a test runs: configurations, penalties from dictionaries, and parses by jsonargparse."""
    counts: Counter[str] = Counter()
    recipes._built.cache_clear()

    def count(cls: type, method: str, name: str) -> None:
        original = getattr(cls, method)

        @functools.wraps(original)
        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, method, counted)

    count(Config, "__post_init__", "configurations")
    count(GradientPenalty, "from_dict", "penalties")
    count(jsonargparse.ArgumentParser, "parse_object", "parses")
    count(jsonargparse.ArgumentParser, "parse_args", "parses")
    return counts


def test_train_parses_its_recipe_once(built, tmp_path):
    words = ["--variant", "sam", "--epochs", "1", "--trackers", "[]", "--model.hidden", "[8]", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "digits-noisy-labels", *words]) == 0
    assert built == {"configurations": 1, "penalties": 1, "parses": 1}


def test_a_warm_up_in_epochs_is_built_again_for_the_steps_that_the_data_have(built, tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT)
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--variant", "late", "--trackers", "[]", "--out", str(tmp_path / "run")]) == 0
    assert built == {"configurations": 1, "penalties": 2, "parses": 1}


def plan_of(seeds: int) -> Plan:
    recipe = recipes.read_recipe("x", TEXT)
    return make_plan(RecipeTask(recipe, CommandParser("compare", "").settings(["x", "--optimizer.lr", "0.1"], recipe.base)), seeds=seeds)


def config_of(job: Job) -> Config:
    assert isinstance(job.variant, RecipeVariant)
    return job.variant._configuration(job.seed, job.stretch)


def test_a_plan_parses_what_its_variants_share_once_whatever_the_seeds(built):
    plan = plan_of(seeds=7)
    jobs = plan.jobs({})
    assert len({job.folder for job in jobs}) == len(jobs) == 5 * 7
    # The penalty warmed up in epochs is built twice; what the variants share is parsed once for all.
    assert built == {"configurations": 3, "penalties": 3, "parses": 1}
    # The two longer baselines are made from what was parsed.
    assert {(config_of(job).seed, config_of(job).epochs) for job in jobs if job.budget == "gradients"}
    assert built["parses"] == 1


def test_the_configurations_of_a_plan_are_those_that_each_seed_would_be_parsed_to():
    recipe = recipes.read_recipe("x", TEXT)
    for job in plan_of(seeds=2).jobs({}):
        if job.budget == "epochs":
            settings = recipes.merge(recipe.settings(job.name), {"seed": job.seed, "optimizer": {"lr": 0.1}})
            assert config_of(job) == recipes.configuration(settings)


def test_an_error_is_the_recipes_where_the_recipe_is_wrong_by_itself():
    broken = recipes.read_recipe("x", "variants: {a: {penalty: {name: sam, rho: 0}}}")
    with pytest.raises(ValueError, match=r"^recipe 'x', variant 'a': rho must be finite and > 0; got 0"):
        broken.configuration({**broken.settings("a"), "epochs": 3}, "a")
    sound = recipes.read_recipe("x", "penalty: {name: sam, rho: 0.1}")
    with pytest.raises(ValueError, match=r"^rho must be finite and > 0; got -1"):
        sound.configuration(CommandParser("train", "").settings(["x", "--penalty.rho", "-1"], sound.base))
