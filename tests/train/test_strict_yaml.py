"""YAML in which everything means what it seems to, or is an error that says where."""

from __future__ import annotations

import math
import time

import pytest
import yaml

from gradreg.train import recipe as recipes
from gradreg.train.strict_yaml import DEEPEST, LONGEST, MOST_VALUES, read_text, read_yaml


def read(text: str, **keys: bool):
    return read_yaml("recipe 'x'", text, **keys)


WRONG = {
    "an unquoted no": ("a: 1\nb: no", r"line 2 has no without quotes, which YAML takes for false\. Write false, or 'no' for the text"),
    "an unquoted on": ("b: [On]", r"line 1 has On without quotes, which YAML takes for true\. Write true, or 'On' for the text"),
    "a key that is a word for false": (
        "a: 1\noff: {}",
        r"line 2 has the key off without quotes, which YAML takes for true or false\. Quote it",
    ),
    "a key that is a number": ("variants:\n  1: {}", r"line 2 has the key 1 without quotes, which YAML takes for a number\. Quote it"),
    "a key that is a float": ("1.5: {}", "the key 1.5 without quotes, which YAML takes for a number"),
    "a key that is nothing": ("~: 1", "the key ~ without quotes, which YAML takes for nothing"),
    "a key that is a date": ("2020-01-01: 1", "the key 2020-01-01 without quotes, which YAML takes for a date"),
    "a key that is a list": ("? [a]\n: 1", "line 1 has a list or mapping for a key"),
    "a key twice": ("a: 1\nb: 2\na: 3", r"the key 'a' is in line 1, column 1 and again in line 3, column 1, and the first would be lost"),
    "a key twice, quoted": ("a: {b: 1, 'b': 2}", r"the key 'b' is in line 1, column 5 and again in line 1, column 11"),
    "base 60": ("a: 1:30", r"line 1 has 1:30 without quotes, which YAML takes for a number to the base 60"),
    "base 60 with a fraction": ("a: 1:30.5", r"line 1 has 1:30\.5 without quotes, which YAML takes for a number to the base 60"),
    "octal": ("a: 010", r"line 1 has 010 without quotes, which YAML takes for an octal number"),
    "a tag": ("a: !!python/object:os.system x", r"line 1 has the tag !!python/object:os\.system, and tags are not taken"),
    "a tag of YAML's own": ("a: !!int ''", "line 1 has the tag !!int, and tags are not taken"),
    "a part of itself": ("a: &x\n  b: *x", r"line 2 has the alias \*x within &x of line 1, and nothing must be a part of itself"),
    "no such alias": ("a: *x", "must be valid YAML; got this from the parser: found undefined alias 'x'"),
    "no such day": ("a: 2020-02-31", "must be valid YAML; got this from the parser: day is out of range"),
    "no such character": ('a: "\\UFFFFFFFF"', "must be valid YAML; got this from the parser: "),
    "no such offset": ("a: 2020-01-01 00:00:00 +99:00", "must be valid YAML; got this from the parser: offset must be"),
    "too many digits": ("a: " + 5000 * "1", "must be valid YAML; got this from the parser: Exceeds the limit"),
    "a control character": ("a: '\x1b'", "special characters are not allowed"),
    "too long": ("#" * (LONGEST + 1), r"must have at most 100,000 characters; got 100,001"),
    "too deep": ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"line 1 lies more than {DEEPEST} lists and mappings deep"),
    "endlessly deep": ("[" * 50_000, f"line 1 lies more than {DEEPEST} lists and mappings deep"),
    "a bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        f"by line 5 there are more than {MOST_VALUES:,} values, counted as often as aliases repeat them",
    ),
    "a bomb of merged mappings": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "counted as often as aliases repeat them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_at_once_and_where(case):
    text, words = WRONG[case]
    started = time.perf_counter()
    with pytest.raises(ValueError, match=rf"^recipe 'x'.*{words}"):
        read(text)
    assert time.perf_counter() - started < 2
    if case != "no such alias":
        with pytest.raises(ValueError, match=words):
            read(text, exponents=False)


def test_what_is_right_is_read():
    assert read("a: {b: [1, 2.5, -0, 0x1f, 1e-3, .inf]}\n'no': 'no'\n'1': \"1:30\"\nc: true\nd: ~\ne: y\n") == {
        "a": {"b": [1, 2.5, 0, 31, 0.001, math.inf]},
        "no": "no",
        "1": "1:30",
        "c": True,
        "d": None,
        "e": "y",
    }
    assert read("a: &x {b: 1, c: 2}\nd: *x\ne: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 2}, "e": {"b": 1, "c": 3}}
    assert read("[" * DEEPEST + "]" * DEEPEST) is not None
    assert read("a: " + "1" * 90_000 + "x") == {"a": "1" * 90_000 + "x"}  # no time lost over what is nearly a number


@pytest.mark.parametrize(
    "value", ["no", "1:30", "010", "1e3", "1e-05", 1e-05, 1e300, "null", "~", "", "=", "<<", "y", 0, -8, True, None, "é\u2028\udc80"[:1]]
)
def test_what_pyyaml_writes_is_read_back(value):
    """The configuration in a run's folder, whose text 1e3 is unquoted."""
    content = {"key": value, "list": [value]} | ({value: 1} if isinstance(value, str) else {})
    assert read(yaml.safe_dump(content), exponents=False) == content


def test_every_shipped_recipe_is_read():
    assert all(recipes.load(name).base for name in recipes.shipped())


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("# eins\n# größer\nepochs: 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml' must be text in UTF-8; line 2 has the byte 0xf6, which is none\. Save it as UTF-8"):
        recipes.load(str(path))
    path.write_bytes(b"\xef\xbb\xbfepochs: 1\n")  # as editors on Windows begin a file
    assert recipes.load(str(path)).base == {"epochs": 1}
    path.write_bytes(b"#" * 500_000)
    with pytest.raises(ValueError, match=r"latin\.yaml' must have at most 400,000 bytes; it has more"):
        read_text(path)


def test_an_error_in_a_recipe_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 1\nvariants:\n  no: {}\n")
    with pytest.raises(ValueError, match=r"^.*/mine\.yaml: recipe 'mine': line 3 has the key no without quotes"):
        recipes.load(str(path))
