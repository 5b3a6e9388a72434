"""Whatever is typed or written becomes a run's configuration, or an error in words; and a configuration survives being written down."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradreg import cli
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.recipe import configuration
from gradreg.train.run_folder import CONFIGURATION, RunFolder


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Every key of the configuration, dotted, blocks included."""
    found: list[str] = []
    for name, kind in get_type_hints(schema).items():
        found.append(prefix + name)
        if is_dataclass(kind):
            found += keys_of(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


PARSER = CommandParser("train", "")
EXAMPLES = settings.default.max_examples  # more of them with --soak
KEYS = keys_of(Config)
FREE = ["model.name", "model.hidden", "penalty.name", "penalty.rho", "penalty.warmup", "penalty.warmup.kind", "penalty.ascent_fraction"]

unicode = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates too, as undecodable bytes become on a command line
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), unicode)
names = st.sampled_from(
    ["sam", "gnp", "fgr", "mlp", "sgd", "adamw", "digits", "cosine", "step", "auto", "zero", "name", "rho", "kind", "epochs"]
)
nested = st.recursive(
    st.one_of(plain, names),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(names, st.sampled_from(["class_path", "init_args"]), plain), inner, max_size=3),
    ),
    max_leaves=6,
)
fragments = st.sampled_from(
    [
        *("", "-", "--", "-1", "1e3", "1e999", ".nan", "-.inf", "null", "~", "0x1f", "1:30", "2020-01-01", "yes", "\t", "a: b: c"),
        *("[", "{", "{}", "[]", "[1, 2", "{a: }", "&a [*a]", "? x", "|", ">", "%", "@", "`", "'", '"', "*", "<<", "/", "."),
        *("!!python/object:os.system x", "!!set {a}", "${oc.env:HOME}", "{name: sam, rho: 0.1}"),
    ]
)
values = st.one_of(fragments, unicode, nested.map(str), st.integers().map(str), st.floats().map(str))
options = st.one_of(st.sampled_from([*KEYS, *FREE]), unicode)
words = st.one_of(
    st.tuples(options, values).map(lambda pair: [f"--{pair[0]}", pair[1]]),
    st.tuples(options, values).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
    values.map(lambda value: [value]),
)


@pytest.fixture(scope="module")
def unwritable(tmp_path_factory):
    """A place for a run's folder where there can be none, so that a run that is accepted ends before it trains."""
    file = tmp_path_factory.mktemp("runs") / "file"
    file.touch()
    return str(file / "run")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(typed=st.lists(words, max_size=3))
@example(typed=[])
@example(typed=[["--optimizer", "null"]])
@example(typed=[["--optimizer.lr", "1" + 400 * "0"]])
@example(typed=[["--trackers", "null"]])
@example(typed=[["--config", "x"]])
@example(typed=[["--model.name", "1e3"]])
@example(typed=[["--seed", "4294967296"]])
@example(typed=[["--optimizer.name", "!!int ''"]])
@example(typed=[["--compile", "!!bool x"]])
@example(typed=[["--data.root", "!!timestamp x"]])
@example(typed=[["--data.root", "\udcff"]])
@example(typed=[["--model", "&a {name: mlp, x: *a}"]])
@example(typed=[["--optimizer.options.x", "{class_path: os.system, init_args: {command: 'false'}}"]])
def test_what_is_typed_is_a_run_or_an_error_in_words(typed, unwritable, capsys):
    capsys.readouterr()
    try:
        status = cli.main(["train", "digits-noisy-labels", *(word for pair in typed for word in pair), "--out", unwritable])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    if status == 0:
        assert "usage: gradreg train" in shown.out
        return
    error = shown.err
    assert status == 2, error
    assert error.startswith("gradreg: error: ")
    assert len(error) > len("gradreg: error: \n")
    assert not any(inside in error for inside in ("Traceback", "functools", "object at 0x"))
    if not typed:
        assert "--out must name a folder that can be written to" in error


blocks = st.dictionaries(st.sampled_from(sorted({key.rpartition(".")[2] for key in KEYS + FREE})), nested, max_size=3)
contents = st.dictionaries(
    st.one_of(st.sampled_from([f.name for f in fields(Config)]), st.sampled_from(["variants", "description"]), plain),
    st.one_of(nested, blocks),
    max_size=3,
)
texts = st.one_of(
    st.text(),
    fragments,
    st.tuples(st.sampled_from(KEYS), fragments).map(lambda pair: f"{pair[0].replace('.', ': {')}: {pair[1]}" + "}" * pair[0].count(".")),
    contents.map(lambda content: yaml.dump(content, allow_unicode=True)),
)


@settings(max_examples=3 * EXAMPLES // 2, suppress_health_check=[HealthCheck.too_slow])
@given(text=texts)
@example(text="model: &a {name: mlp, x: *a}")
@example(text="model: {name: mlp, x: 2020-01-01}")
@example(text="model: {name: mlp, x: .nan}")
@example(text="data: {validation: .nan}")
@example(text="seed: 4294967296")
@example(text="variants: {a: {optimizer: null}}")
@example(text="? [a]\n: b")
@example(text="\x00")
def test_what_is_written_is_a_recipe_or_an_error_in_words(text):
    message, recipe = "", None
    try:
        recipe = recipes.parse_recipe("x", text)
    except (ValueError, TypeError) as error:
        message = str(error)
    assert not any(inside in message for inside in ("functools", "object at 0x"))
    if recipe is None:
        assert len(message) > len("recipe 'x'")
        return
    for variant in (None, *recipe.variants):
        assert_survives(configuration(recipe.settings(variant)))


def assert_survives(config: Config) -> None:
    """The configuration can be written down and read again."""
    assert configuration(yaml.safe_load(yaml.safe_dump(asdict(config)))) == config


text_that_looks_like_something_else = st.one_of(st.text(max_size=8), fragments, st.integers().map(str), st.floats().map(str))
option = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text_that_looks_like_something_else),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=2 * EXAMPLES // 5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.dictionaries(st.text(max_size=8), option, max_size=3),
    optimizer=st.dictionaries(st.text(max_size=8), option, max_size=2),
    lr=st.floats(1e-300, 1e300),
    root=text_that_looks_like_something_else,
    seed=st.integers(0, 2**32 - 1),
    radius=st.floats(1e-300, 1e300),
    epochs=st.integers(1, 10**6),
    validation=st.one_of(st.none(), st.integers(1, 999), st.floats(0.01, 0.99)),
)
def test_a_configuration_survives_the_run_folder(model, optimizer, lr, root, seed, radius, epochs, validation, tmp_path):
    given_settings: dict[str, Any] = {
        "data": {"root": root, "validation": validation},
        "model": {**model, "name": "mlp"},
        "optimizer": {"lr": lr, "options": optimizer},
        "penalty": {"name": "sam", "rho": radius, "warmup": {"kind": "zero", "epochs": 0.5}},
        "seed": seed,
        "epochs": epochs,
    }
    config = configuration(given_settings)
    assert (config.model, config.optimizer.options, config.data.root) == ({**model, "name": "mlp"}, optimizer, root)
    assert (config.optimizer.lr, config.seed, config.data.validation, config.penalty) == (lr, seed, validation, given_settings["penalty"])
    assert_survives(config)
    (tmp_path / CONFIGURATION).write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    folder = RunFolder(tmp_path)
    assert folder.configuration() == config
    folder.check_free_for(config)
    assert configuration(PARSER.settings(["x"], asdict(config))) == config
