"""What is typed for models, penalties and options of timm reaches the configuration as it was typed, and nothing else changes."""

from __future__ import annotations

import re

import pytest

from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.recipe import configuration

BASE = {
    "model": {"name": "mlp", "hidden": [8], "note": "1e3"},
    "penalty": {"name": "sam", "rho": 0.1},
    "optimizer": {"lr": 0.2, "options": {"dampening": 0.1, "note": "on"}},
}


def typed(*words: str) -> Config:
    return configuration(CommandParser("train", "").settings(["x", *words], BASE))


@pytest.mark.parametrize("words", [[], ["--model.hidden", "[16]"], ["--model.hidden=[16]"], ["--epochs", "3"]])
def test_texts_beside_what_is_typed_stay_texts(words):
    """They look like a number and a truth value, and jsonargparse would make that of them."""
    config = typed(*words)
    assert config.model == {"name": "mlp", "hidden": [16] if "hidden" in str(words) else [8], "note": "1e3"}
    assert config.optimizer.options == {"dampening": 0.1, "note": "on"}


def test_values_are_read_as_in_a_recipe():
    config = typed(
        "--penalty.rho", "1e-2", "--penalty.warmup.kind", "zero", "--penalty.warmup.epochs=1", "--optimizer.options.eps", "'1e3'"
    )
    assert config.penalty == {"name": "sam", "rho": 0.01, "warmup": {"kind": "zero", "epochs": 1}}
    assert config.optimizer.options == {"dampening": 0.1, "note": "on", "eps": "1e3"}


def test_a_mapping_at_once_replaces_the_mapping():
    assert typed("--penalty", "{name: fgr, gamma: 0.1, epsilon: 0.1}").penalty == {"name": "fgr", "gamma": 0.1, "epsilon": 0.1}
    assert typed("--penalty", "null").penalty is None
    assert typed("--flooding.level", "0.5", "--flooding.name", "batch").flooding == {"name": "batch", "level": 0.5}


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("sam:rho=0.3", {"name": "sam", "rho": 0.3}),
        ("fgr:gamma=0.1,epsilon=0.1", {"name": "fgr", "gamma": 0.1, "epsilon": 0.1}),
        ("sam:rho=0.3,warmup={kind: zero, steps: 3}", {"name": "sam", "rho": 0.3, "warmup": {"kind": "zero", "steps": 3}}),
        ("sam", {"name": "sam"}),
        ("none", None),
    ],
)
def test_a_penalty_may_be_written_as_a_comparison_has_it(text, block):
    assert typed("--penalty", text).penalty == typed(f"--penalty={text}").penalty == block
    assert typed("--penalty", "bgr", "--penalty", text).penalty == block


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sam:rho", "must be written NAME:KEY=VALUE"),
        ("sam:rho=0.3@lr=0.1", "--penalty must be a penalty alone; got 'sam:rho=0.3@lr=0.1', which changes lr too. Write --KEY VALUE"),
        ("{name: sam", "--penalty must be valid YAML"),
        ("smam", "unknown penalty 'smam'"),
    ],
)
def test_a_penalty_written_otherwise_is_told_in_words(text, told):
    with pytest.raises((ValueError, TypeError), match=re.escape(told)):
        typed("--penalty", text)


def test_options_may_come_with_their_block():
    config = typed("--optimizer", "{name: adamw, options: {betas: [0.5, 0.6]}}")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.options) == ("adamw", 0.2, {"betas": [0.5, 0.6]})
    assert typed("--optimizer", "{lr: 0.3}").optimizer.options == {"dampening": 0.1, "note": "on"}


def test_one_key_of_a_block_leaves_the_recipes_others():
    config = typed("--optimizer.momentum", "0.5", "--optimizer", "{nesterov: true}", "--optimizer.name=sgd")
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.nesterov) == (0.2, 0.5, True)
    assert config.optimizer.options == BASE["optimizer"]["options"]


def test_under_another_name_no_key_of_the_recipes_is_left():
    assert typed("--model.name", "wrn16_4", "--model.depth", "10").model == {"name": "wrn16_4", "depth": 10}
    assert typed("--model.depth", "10", "--model.name", "wrn16_4").model == {"name": "wrn16_4", "depth": 10}
    assert typed("--model.name", "mlp", "--model.gain", "1").model == {**BASE["model"], "gain": 1}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model.hidden"], ValueError, "--model.hidden must be followed by its value; got nothing."),
        (["--model.hidden", "--epochs", "3"], ValueError, "--model.hidden must be followed by its value; got '--epochs'."),
        (["--model.hidden", "[3"], ValueError, "--model.hidden must be valid YAML; got this from the parser:"),
        (["--penalty", "3"], TypeError, "penalty must be a mapping of keys to values; got 3."),
        (["--model", "null"], TypeError, "model must not be null. Leave it out for its default."),
        (["--model.when", "2020-13-45"], ValueError, "--model.when must be valid YAML; got this from the parser: month must be in 1..12"),
        (["--optimizer", "sgd"], ValueError, "optimizer must be a mapping of keys to values. Write --optimizer.KEY VALUE"),
    ],
)
def test_what_cannot_be_meant_is_said(words, error, message):
    with pytest.raises(error, match=re.escape(message)):
        typed(*words)
