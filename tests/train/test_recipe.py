"""Recipes: reading, merging, checking, and the shipped ones."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg import constructors
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.recipe import configuration


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_builds_all_its_variants(name):
    recipe = recipes.load(name)
    for variant in (None, *recipe.variants):
        assert configuration(recipe.settings(variant)).epochs >= 1
    assert recipe.description


def test_the_default_recipe_is_the_documented_experiment():
    recipe = recipes.load("digits-noisy-labels")
    config = configuration(recipe.settings())
    assert (config.data.train_size, config.data.label_noise, config.epochs, config.batch_size) == (1000, 0.3, 60, 100)
    assert (config.data.validation, config.data.training_images()) == (200, 800)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum, config.optimizer.nesterov) == ("sgd", 0.05, 0.9, False)
    assert config.model == {"name": "mlp", "hidden": [256, 256]}
    assert configuration(recipe.settings("gnp")).resolved_penalty().penalty == constructors.gnp(r=0.5, alpha=0.8)
    assert list(recipe.variants) == ["none", "sam", "gnp", "fgr", "bgr"]


def test_exponents_without_a_dot_are_numbers():
    assert recipes.parse_recipe("x", "optimizer: {lr: 1e-3}").base == {"optimizer": {"lr": 0.001}}


def test_a_variant_can_be_laid_over_an_overridden_base():
    recipe = recipes.parse_recipe("x", "epochs: 5\nseed: 3\nvariants: {long: {epochs: 9, optimizer: {lr: 0.3}}}")
    words = ["x", "--epochs", "7", "--optimizer.momentum=0.5"]
    base = CommandParser("train", "").settings(words, recipe.base)
    plain, long = configuration(base), configuration(recipe.settings("long", base=base))
    assert (plain.epochs, plain.seed, plain.optimizer.lr, plain.optimizer.momentum) == (7, 3, 0.05, 0.5)
    assert (long.epochs, long.seed, long.optimizer.lr, long.optimizer.momentum) == (9, 3, 0.3, 0.5)


def test_a_block_with_another_name_is_replaced_whole():
    before = {"penalty": {"name": "sam", "rho": 0.1}, "optimizer": {"lr": 0.1, "momentum": 0.9}}
    changed = recipes.merge(before, {"penalty": {"name": "fgr", "gamma": 1.0, "epsilon": 1.0}, "optimizer": {"lr": 0.2}})
    assert changed == {"penalty": {"name": "fgr", "gamma": 1.0, "epsilon": 1.0}, "optimizer": {"lr": 0.2, "momentum": 0.9}}
    assert recipes.merge(before, {"penalty": {"rho": 0.2}})["penalty"] == {"name": "sam", "rho": 0.2}
    assert recipes.merge(before, {"penalty": None})["penalty"] is None
    assert recipes.merge(before, {"optimizer": {"name": "sgd", "lr": 0.2}})["optimizer"] == {"name": "sgd", "lr": 0.2, "momentum": 0.9}
    assert recipes.merge(before, {"optimizer": {"name": "adamw", "lr": 0.2}})["optimizer"] == {"name": "adamw", "lr": 0.2}
    assert before["penalty"] == {"name": "sam", "rho": 0.1}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "must hold a configuration; got an empty file"),
        ("- 1", TypeError, r"must be a mapping of keys to values; got \[1\]"),
        ("epochs: [3", ValueError, "must be valid YAML"),
        ("epoch: 3", ValueError, r"unknown key in recipe 'x': 'epoch'\. Did you mean 'epochs'\?"),
        ("optimizer: {lrr: 3}", ValueError, "block 'optimizer': 'lrr'. Did you mean 'lr'"),
        ("optimizer: 3", TypeError, "key 'optimizer' in recipe 'x': must be a mapping of keys to values; got 3"),
        ("epochs: 3.5", ValueError, "Expected a int. Got value: 3.5"),
        ("epochs: 3\nvariants: [a]", TypeError, "variants of recipe 'x' must map names to changed keys"),
        ("epochs: 3\nvariants: {a: {penalti: 1}}", ValueError, "variant 'a': 'penalti'. Did you mean 'penalty'"),
        ("epochs: 3\nvariants: {a/b: {}}", ValueError, "a variant's name must be made of letters"),
        ("variants: {a: {penalty: {name: sam, rho: 0}}}", ValueError, "recipe 'x', variant 'a': rho must be finite and > 0; got 0"),
        ("data: {label_noise: 30}", ValueError, "data.label_noise must be between 0 and 1; got 30"),
        ("schedule: {name: step}", ValueError, "schedule.decay_epochs must name at least one epoch"),
        ("epochs: 3\nschedule: {warmup_epochs: 3}", ValueError, "schedule.warmup_epochs must be < epochs; got 3 of 3"),
        ("model: {hidden: [3]}", ValueError, "model must have a name"),
        ("schedule: {name: cos}", ValueError, "Got value: cos"),
        ("trackers: null", TypeError, "trackers must not be null. Leave it out for its default"),
        ("model: mlp", TypeError, r"model must be a mapping of keys to values; got 'mlp' \(str\)"),
        (
            "model: {name: mlp, 3: 4}",
            ValueError,
            r"recipe 'x': line 1 has the key 3 without quotes, which YAML takes for a number\. Quote it",
        ),
        (
            "model: &a\n  name: mlp\n  x: [*a]",
            ValueError,
            r"recipe 'x': line 3 has the alias \*a within &a of line 1, and nothing must be a part of itself\. Write out",
        ),
        (
            "model: {name: mlp, x: 2020-01-01}",
            TypeError,
            r"model\.x must be made of numbers, texts, lists and mappings; got datetime\.date",
        ),
        ("model: {name: mlp, x: .nan}", ValueError, r"model\.x must be finite; got nan"),
        ('data: {root: "\\uDCFF"}', ValueError, "data.root must be text that UTF-8 can hold"),
        (f"optimizer: {{lr: 1{400 * '0'}}}", ValueError, "a value must be < 1.8e308"),
        ("seed: 4294967296", ValueError, r"seed must be < 2\*\*32; got 4294967296"),
    ],
)
def test_bad_recipes_are_refused_in_words(text, error, message):
    with pytest.raises(error, match=message):
        recipes.parse_recipe("x", text)


@pytest.mark.slow
@given(
    epochs=st.integers(1, 500),
    lr=st.floats(1e-6, 10),
    noise=st.floats(0, 1),
    name=st.sampled_from(["constant", "cosine"]),
    hidden=st.lists(st.integers(1, 64), max_size=3),
    rho=st.floats(1e-3, 10),
)
def test_the_resolved_configuration_round_trips(epochs, lr, noise, name, hidden, rho):
    settings = {
        "epochs": epochs,
        "optimizer": {"lr": lr},
        "data": {"label_noise": noise},
        "schedule": {"name": name},
        "model": {"name": "mlp", "hidden": hidden},
        "penalty": {"name": "sam", "rho": rho},
    }
    config = configuration(settings)
    assert configuration(asdict(config)) == config
    assert (config.optimizer.lr, config.data.label_noise, config.resolved_penalty().penalty) == (
        lr,
        noise,
        constructors.sam(rho=rho),
    )
