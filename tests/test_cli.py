"""The command line: help at once, errors in words, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from gradreg import __version__, cli


def run(*words: str) -> int:
    return cli.main(list(words))


def test_help_lists_the_commands_and_loads_no_framework():
    script = (
        "import sys; from gradreg.cli import main; main(['--help']);"
        "loaded = {'torch', 'jax', 'numpy', 'timm', 'rich', 'jsonargparse'} & set(sys.modules); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(f"  {command}" in done.stdout for command in cli.COMMANDS)


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"gradreg {__version__}"


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "gradreg", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"gradreg: error: unknown command 'trian'. Did you mean 'train'? Known: {', '.join(cli.COMMANDS)}."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["tune", "mine.py", "--penalty", "sam"], "optuna", "tune"),
        (["tune", "mine.py"], "jsonargparse", "study"),
        (["compare", "mine.py", "--penalties", "sam"], "rich", "study"),
        (["compare", "digits-noisy-labels"], "safetensors", "train"),
        (["train", "digits-noisy-labels"], "torch", "train"),
        (["lab", "flooding"], "matplotlib", "theory"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, words, package, extra):
    (tmp_path / "mine.py").write_text(
        "from gradreg import study\n\n@study.task(metric='accuracy')\ndef train(run: study.Run, *, lr: float = 0.1) -> None:\n    pass\n"
    )
    script = f"""
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from gradreg.cli import main
sys.exit(main({words!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"{words[0]} needs the package {package!r}" in done.stderr.replace(f"{package}.distributions", package)
    assert f"pip install 'gradreg[{extra}]'" in done.stderr


def test_help_of_a_search_explains_its_own_penalty(capsys):
    """Which is no key of a recipe there, but what is searched."""
    with pytest.raises(SystemExit, match="0"):
        run("tune", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "strengths left out are searched" in text
    assert "learning rate at its peak" in text


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_of_a_command_explains_every_key(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for key, explanation in {
        "--optimizer.lr": "learning rate at its peak",
        "--data.label_noise": "share of the training labels",
        "--penalty": "the gradient penalty by",
        "--batch_size": "training examples of an optimizer step",
        "--schedule.warmup_epochs": "epochs of linear warm-up",
    }.items():
        assert key in text
        assert explanation in text


BAD_INPUT = {
    "no recipe": (["train"], "train needs a recipe or --resume RUN; got neither"),
    "unknown recipe": (["train", "digits-noisy-label"], "unknown recipe 'digits-noisy-label'. Did you mean 'digits-noisy-labels'?"),
    "unknown key": (["train", "digits-noisy-labels", "--epoch", "3"], "unknown option '--epoch'. Did you mean '--epochs'?"),
    "unknown nested key": (
        ["train", "digits-noisy-labels", "--optimizer.lrr=3"],
        "unknown option '--optimizer.lrr'. Did you mean '--optimizer.lr'?",
    ),
    "wrong type": (["train", "digits-noisy-labels", "--epochs", "many"], 'key "epochs": Expected a int. Got value: many'),
    "zero epochs": (["train", "digits-noisy-labels", "--epochs", "0"], "epochs must be >= 1; got 0."),
    "negative radius": (
        ["train", "digits-noisy-labels", "--penalty", "{name: sam, rho: -0.1}"],
        "rho must be finite and > 0; got -0.1. Use penalty=None to train without one.",
    ),
    "NaN radius": (
        ["train", "digits-noisy-labels", "--penalty", "{name: sam, rho: .nan}"],
        "rho must be a number > 0 and finite; got nan.",
    ),
    "gnp without r": (
        ["train", "digits-noisy-labels", "--penalty", "{name: gnp, alpha: 0.8}"],
        "penalty 'gnp' needs r; got only alpha=0.8.",
    ),
    "unknown penalty": (["train", "digits-noisy-labels", "--penalty.name", "smam"], "unknown penalty 'smam'. Did you mean 'sam'?"),
    "unknown variant of train": (
        ["train", "digits-noisy-labels", "--variant", "smam"],
        "unknown variant of recipe 'digits-noisy-labels': 'smam'. Did you mean 'sam'?",
    ),
    "unknown variant of compare": (
        ["compare", "digits-noisy-labels", "--penalties", "none", "gpn"],
        "unknown variant or penalty 'gpn'. Did you mean 'gnp'?",
    ),
    "no seeds": (["compare", "--seeds", "0"], "--seeds must be >= 1; got 0."),
    "no workers": (["compare", "--workers", "-1"], "--workers must be >= 0; got -1."),
    "nothing to compare": (
        ["compare", "--penalties", "none"],
        "a comparison needs at least one variant beside the baseline 'none'; got none.",
    ),
    "unknown model": (["train", "digits-noisy-labels", "--model.name", "mpl"], "unknown model 'mpl'. Did you mean 'mlp'?"),
    "unknown optimizer": (["train", "digits-noisy-labels", "--optimizer.name", "adamv"], "unknown optimizer 'adamv'. Did you mean 'adam"),
    "too many training images": (
        ["train", "digits-noisy-labels", "--data.train_size", "1797"],
        "data.train_size must be < 1797, the images of 'digits'; got 1797.",
    ),
    "unknown device": (["train", "digits-noisy-labels", "--device", "gpu7"], "device must name one that this machine has; got 'gpu7'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_answered_in_words(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = BAD_INPUT[case]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradreg: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(command, "digits-noisy-labels", "--out", str(tmp_path / "file" / "out")) == 2
    assert "--out must name a folder that can be written to" in capsys.readouterr().err


def test_an_empty_recipe_is_refused(tmp_path, capsys):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert run("train", str(path)) == 2
    assert "recipe 'empty' must hold a configuration; got an empty file." in capsys.readouterr().err


def as_process(*words: str, **keywords: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **keywords.pop("environment", {})}
    return subprocess.run([sys.executable, "-m", "gradreg", *words], env=environment, check=False, capture_output=True, **keywords)


SMALL = ["digits-noisy-labels", "--epochs", "2", "--model.hidden", "[8]", "--trackers", "[]"]


@pytest.mark.slow
def test_an_ascii_terminal_gets_ascii(tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii", "COLUMNS": "40", "NO_COLOR": "1", "TERM": "dumb"}
    done = as_process("train", *SMALL, "--out", str(tmp_path / "größe ± \x1b[31m"), environment=ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"gr\\xf6\\xdfe +- \\x1b[31m\n" in done.stdout
    assert all(byte < 128 and byte != 27 for byte in done.stdout)
    assert done.stdout.count(b"epoch ") == 2
    failed = as_process("train", "größer", environment=ascii_only)
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"gradreg: error: unknown recipe 'gr\\xf6\\xdfer'.")


@pytest.mark.slow
def test_a_run_outlives_whoever_reads_its_output(tmp_path):
    """A terminal that is closed, or ``| head``: the output goes to a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "gradreg", "train", *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, check=False, stdout=writing, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run" / "result.json").is_file()
    listing = subprocess.run([*command[:3], "--help"], env=environment, check=False, stdout=writing, stderr=subprocess.PIPE)
    assert listing.returncode in (0, 128 + signal.SIGPIPE)  # 0 if nothing was written before the end
    assert listing.stderr == b""
    os.close(writing)


def test_errors_do_not_move_the_cursor(tmp_path, capsys):
    path = tmp_path / "\x1b[31m\u202ered.yaml"
    path.write_text("a: [")
    assert run("train", str(path)) == 2
    error = capsys.readouterr().err
    assert "\\x1b[31m\\u202ered.yaml" in error
    assert not {"\x1b", "\u202e"} & set(error)


def test_unforeseen_failures_are_one_line_too(monkeypatch, capsys):
    from gradreg.train import command

    def broken(words):
        raise RuntimeError("out of order")

    monkeypatch.setattr(command, "main", broken)
    assert run("train") == 1
    assert capsys.readouterr().err == "gradreg: error: RuntimeError: out of order (set GRADREG_TRACEBACK=1 to see where)\n"
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(RuntimeError, match="out of order"):
        run("train")
