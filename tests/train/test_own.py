"""Models, data sets, losses and metrics of one's own in recipes."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import safetensors.torch
import torch

from gradreg import cli, own_code
from gradreg.study.tasks import Metric
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.data import samples
from gradreg.train.evaluation import evaluate
from gradreg.train.loop import train
from gradreg.train.recipe import configuration

MINE = """
import random
import torch
from torch import nn
from torch.utils.data import IterableDataset

CONSTANT = 3


class Line:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def dataset(split, *, seed, size=40, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size + 20, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + noise * torch.randn(len(x), generator=generator)
    part = {"train": slice(0, size), "validation": slice(size, size + 7), "test": slice(size + 7, None)}[split]
    return Line(x[part], y[part, None])


def without_validation(split, *, seed):
    return None if split == "validation" else dataset(split, seed=seed)


def one_set(split, *, seed):
    return dataset(split, seed=seed) if split == "train" else None


def drawn(split):
    return Line(torch.randn(5, 3), torch.randn(5, 1))


def unsized(split):
    class Unsized:
        def __getitem__(self, index):
            return 1
    return Unsized()


def stream(split):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])
    return Stream()


def nothing(split):
    return Line([], [])


def ragged(split):
    return [(torch.zeros(i + 1), 0) for i in range(6)]


def classes(split):
    return [(torch.full((2,), float(i % 3)), i % 3) for i in range(6)]


class Noisy(Line):
    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(3) + random.random(), self.y[index]


def noisy(split, *, seed):
    made = dataset(split, seed=seed)
    return Noisy(made.x, made.y)


class Dicts(Line):
    def __getitem__(self, index):
        return {"length": index % 3 + 1, "x": self.x[index], "y": self.y[index]}


def dicts(split, *, seed):
    made = dataset(split, seed=seed)
    return Dicts(made.x, made.y)


def collate(samples):
    return {"x": torch.stack([s["x"] for s in samples]), "y": torch.stack([s["y"] for s in samples]), "n": len(samples)}


class OnDicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, batch):
        return {"prediction": self.linear(batch["x"])}


def loss_of_dicts(outputs, batch):
    return (outputs["prediction"] - batch["y"]).square().mean()


def build(*, width=4, bias=True):
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.ReLU(), nn.Linear(width, 1))


def for_images(num_classes, in_chans, img_size, depth=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size**2, num_classes))


def classifier(*, num_classes):
    return nn.Linear(2, num_classes)


def no_module():
    return 7


def squared(outputs, targets, *, scale=1.0):
    return scale * (outputs - targets).square().mean()


def each(outputs, targets):
    return (outputs - targets).square()


def error(outputs, targets):
    return (outputs - targets).square().mean()


def moments(outputs, targets):
    return targets.mean(), targets.square().mean()


def deviation(means):
    return (means[1] - means[0] ** 2) ** 0.5


def never(outputs, targets):
    return float("nan")


def with_mode(outputs, targets, mode="a"):
    return 0.0


def with_root_of_keys(split, *, train_size=3):
    return None
"""

RECIPE = """
data: {name: "mine:dataset"}
model: {name: "mine:build"}
loss: {name: "mine:squared"}
metric: {name: "mine:error", label: rmse, mode: min, finish: sqrt}
optimizer: {lr: 0.02}
epochs: 3
batch_size: 10
trackers: []
threads: 1
device: cpu
variants:
  none: {}
  sam: {penalty: {name: sam, rho: 0.05}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with mine.py and a recipe, which is not the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def config_of(folder: Path, *words: str, variant: str | None = None) -> Config:
    recipe = recipes.load(str(folder / "own.yaml"))
    return recipe.configuration(CommandParser("train", "").settings(["own", *words], recipe.settings(variant)), variant)


def test_the_loop_equals_ten_lines_of_plain_pytorch(folder):
    config = config_of(folder, "--model.width", "6", "--data.noise", "0.3", "--optimizer.momentum", "0")
    outcome = train(config)
    data = samples.load(config.data, code=config.code, seed=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = own_code.load("mine:build", config.code, key="model")(width=6)
    made = own_code.load("mine:dataset", config.code, key="data")("train", seed=0, noise=0.3)
    generator, order = torch.Generator().manual_seed(0), torch.empty(0)
    kept = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 12)) / 2
        if step % 4 == 0:
            order = torch.randperm(40, generator=generator)
        batch = kept[order[10 * (step % 4) : 10 * (step % 4) + 10]]
        optimizer.zero_grad()
        (model(made.x[batch]) - made.y[batch]).square().mean().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-6, atol=1e-7)
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (40, 7, 13)


def test_a_metric_is_that_of_the_whole_set_whatever_the_batches(folder):
    config = config_of(folder, "--precision", "fp64")
    data = samples.load(config.data, code=config.code, seed=0, device=torch.device("cpu"))
    model = own_code.load("mine:build", config.code, key="model")().double()
    test = own_code.load("mine:dataset", config.code, key="data")("test", seed=0)
    expected = (model(test.x.double()) - test.y.double()).square().mean().item()
    for size in (1, 4, 5, 13):
        found = evaluate(model, data.test, batch_size=size, precision="fp64", objective=config.objective)
        assert found.metrics == pytest.approx({"rmse": expected**0.5}, rel=1e-12)
        assert found.loss == pytest.approx(expected, rel=1e-12)


def test_several_means_make_one_metric(folder):
    config = config_of(folder, "--metric", "{name: 'mine:moments', finish: 'mine:deviation', mode: min, label: sd}")
    data = samples.load(config.data, code=config.code, seed=0, device=torch.device("cpu"))
    test = own_code.load("mine:dataset", config.code, key="data")("test", seed=0)
    model = own_code.load("mine:build", config.code, key="model")()
    found = evaluate(model, data.test, batch_size=4, objective=config.objective)
    assert found.metrics["sd"] == pytest.approx(float(test.y.double().std(correction=0)), rel=1e-6)


def test_the_best_epoch_is_the_one_with_the_smallest_error_where_smaller_is_better(folder, tmp_path):
    outcome = train(config_of(folder, "--optimizer.lr", "0.1", "--schedule.name", "constant", "--epochs", "8", "--data.noise", "1"))
    values = [epoch.own["validation_rmse"] for epoch in outcome.history]
    best = outcome.history[values.index(min(values))]
    assert best.epoch < 8  # else the last or the largest might be taken for it
    assert outcome.best_epoch == best
    assert outcome.metric == Metric("rmse", "min")
    assert outcome.summary()["best"] == {
        "epoch": best.epoch, "by": "validation_rmse", "validation_rmse": min(values), "test_rmse": best.own["test_rmse"]
    }  # fmt: skip


def test_a_run_is_judged_everywhere_by_its_metric(folder, capsys):
    assert cli.main(["train", str(folder / "own.yaml"), "--data.size=30", "--model.width", "8", "--ema", "0.9", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert "accuracy" not in printed + str(record)
    assert f"validation rmse {record['validation_rmse']:.5g}, test rmse {record['test_rmse']:.5g}" in printed
    assert {"ema_test_rmse", "ema_validation_rmse"} <= set(record)
    assert "top5" not in str(record)
    assert cli.main(["evaluate", "run", "--split", "validation", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rmse"] == pytest.approx(record["validation_rmse"], rel=1e-6)
    assert (found["samples"], "images" in found) == (7, False)
    assert cli.main(["evaluate", "run", "--metric", "{name: loss}"]) == 0
    assert capsys.readouterr().out == f"test, 13 samples, last weights: loss {record['test_loss']:.4f}\n"
    held = recipes.read_yaml("held", Path("run/config.yaml").read_text())
    assert held["code"] == {"mine": {"file": str(folder / "mine.py"), "sha256": own_code.digest(folder / "mine.py")}}
    assert held["data"]["options"] == {"size": 30}


def test_a_study_judges_by_it_in_the_right_direction(folder, capsys):
    words = ["compare", str(folder / "own.yaml"), "--seeds", "2", "--workers", "0", "--data.noise", "0.5", "--out", "out"]
    assert cli.main(words) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["metric"] == {"name": "rmse", "mode": "min", "percent": False}
    runs = [run for run in results["runs"] if run["variant"] == "none" and run["budget"] == "epochs"]
    assert all(run["validation_rmse"] > 0 and run["best_test_rmse"] > 0 for run in runs)
    assert [row["gradient_evaluations"] for row in results["table"]] == [12, 24, 24]
    assert "rmse" in capsys.readouterr().out
    assert "test rmse" in Path("out/report.html").read_text()
    assert "accuracy" not in Path("out/table.md").read_text()


def test_a_run_resumes_from_its_folder_alone_and_not_with_another_file(folder, capsys):
    words = ["train", str(folder / "own.yaml"), "--data.name", "mine:noisy", "--checkpoint.every_epochs", "1", "--out"]
    assert cli.main([*words, "whole", "--checkpoint.keep", "9"]) == 0
    assert cli.main([*words, "cut", "--checkpoint.keep", "9"]) == 0
    for path in (Path("cut/result.json"), Path("cut/weights.safetensors")):
        path.unlink()
    import shutil

    for checkpoint in sorted(Path("cut/checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert cli.main(["train", "--resume", "cut"]) == 0
    one, other = (safetensors.torch.load_file(f"{run}/weights.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    Path("cut/result.json").unlink()
    (folder / "mine.py").write_text(MINE + "\n# another")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "cut"]) == 2
    assert "code.mine must be the file that the run was made with" in capsys.readouterr().err
    assert cli.main([*words, "cut", "--checkpoint.keep", "9"]) == 2
    assert "differs in code.mine.sha256 (the content of that file has changed)" in capsys.readouterr().err


def test_a_file_may_move_as_long_as_it_stays_the_same(folder):
    config = config_of(folder)
    (folder / "mine.py").rename(folder / "elsewhere" / "mine.py")
    moved = configuration({**recipes.load(str(folder / "own.yaml")).base, "code": config.code})
    assert moved.code == {"mine": {"file": str(folder / "elsewhere" / "mine.py"), "sha256": config.code["mine"]["sha256"]}}


def test_a_file_beside_the_recipe_is_taken_before_one_in_the_working_directory(folder):
    (folder / "elsewhere" / "mine.py").write_text("raise RuntimeError('the other')")
    assert config_of(folder).code["mine"]["file"] == str(folder / "mine.py")
    (folder / "mine.py").unlink()
    with pytest.raises(ValueError, match=r"mine.py' cannot be imported: RuntimeError in line 1: the other"):
        config_of(folder)


def test_samples_may_be_dictionaries(folder):
    words = ["--data", "{name: 'mine:dicts', collate: 'mine:collate'}", "--model.name", "mine:OnDicts", "--loss.name", "mine:loss_of_dicts"]
    config = config_of(folder, *words, "--metric", "{name: loss}")
    whole, parts = train(config), train(replace(config, accumulation=3))
    assert whole.history[-1].test_loss < whole.history[0].test_loss
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-6)


def test_workers_give_the_same_samples_with_their_random_numbers(folder):
    config = config_of(folder, "--data.name", "mine:noisy")
    alone, helped = train(config), train(replace(config, data=replace(config.data, workers=2)))
    assert all(torch.equal(alone.weights[name], helped.weights[name]) for name in alone.weights)


def test_samples_reach_a_process_that_has_not_imported_the_file(folder):
    config = config_of(folder, "--data.name", "mine:noisy")
    data = samples.load(config.data, code=config.code, seed=0, device=torch.device("cpu"))
    held = folder / "samples.pickle"
    fetched = data.train._batches._samples  # type: ignore[attr-defined]
    held.write_bytes(pickle.dumps(fetched))
    script = f"import pickle, pathlib; print(len(pickle.loads(pathlib.Path({str(held)!r}).read_bytes())))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "40\n"


def test_validation_samples_are_held_out_of_the_training_samples(folder):
    config = config_of(folder, "--data", "{name: 'mine:without_validation', validation: 0.25, train_size: 20}")
    data = samples.load(config.data, code=config.code, seed=0, device=torch.device("cpu"))
    assert (len(data.train), len(data.validation or ()), len(data.test), config.steps_per_epoch()) == (15, 5, 13, 2)

    def rows(part) -> set[tuple[float, ...]]:
        batches = part.batches(1, 100) if part is data.train else part.batches(100)
        return {tuple(row.tolist()) for batch in batches for row in batch.labeled()[0]}

    assert len(rows(data.train) | rows(data.validation)) == 20
    rest = samples.load(replace(config.data, name="mine:one_set", validation=None), code=config.code, seed=0, device=torch.device("cpu"))
    assert (len(rest.train), len(rest.test), rest.validation) == (20, 20, None)


def test_images_meet_a_model_and_a_metric_of_ones_own(folder):
    text = {"data": {"train_size": 100}, "model": {"name": "mine:for_images", "depth": 2}, "epochs": 1, "trackers": []}
    config = configuration(text, folder)
    outcome = train(config)
    assert outcome.weights["1.weight"].shape == (10, 64)
    assert outcome.history[-1].test_accuracy is not None


def test_the_classes_of_a_data_set_may_be_said_by_the_model(folder):
    text = {"data": {"name": "mine:classes"}, "model": {"name": "mine:classifier", "num_classes": 3}, "epochs": 1, "trackers": []}
    last = train(configuration(text, folder)).history[-1]
    assert last.test_accuracy is not None
    assert last.test_top5 == 1.0


def test_a_loss_below_zero_does_not_diverge_by_coming_closer_to_zero(folder):
    (folder / "mine.py").write_text(MINE + "\n\ndef shifted(outputs, targets):\n    return squared(outputs, targets) - 100\n")
    outcome = train(config_of(folder, "--loss.name", "mine:shifted"))
    assert not outcome.diverged


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model.name", "mne:build"], ValueError, r"'mne:build' must name a function in .*got no mne\.py in .*no installed"),
        (["--model.name", "lib/mine.py:build"], ValueError, r"got no lib/mine\.py in "),
        (["--model.name", "mine:buidl"], ValueError, r"unknown function of .*mine\.py: 'buidl'. Did you mean 'build'\?"),
        (["--model.name", "mine:CONSTANT"], TypeError, r"model.name must name a function or a class; got 'mine:CONSTANT', which is 3"),
        (["--model.widht", "3"], ValueError, r"unknown option of model 'mine:build': 'widht'. Did you mean 'width'\?"),
        (["--data.nois", "3"], ValueError, r"unknown option of data 'mine:dataset': 'nois'. Did you mean 'noise'\?"),
        (["--data.image_size", "3"], ValueError, "data.image_size must be left out for 'mine:dataset', which makes its samples itself"),
        (["--augmentation.flip", "true"], ValueError, "augmentation.flip must be left out for 'mine:dataset'"),
        (["--data.name", "mine:with_root_of_keys"], ValueError, "data 'mine:with_root_of_keys' must have no parameter 'train_size'"),
        (["--loss.name", "mse"], ValueError, r"loss.name must be a function, as in mine:loss or torch\.nn\.functional:mse_loss; got 'mse'"),
        (["--loss.scal", "3"], ValueError, r"unknown option of loss 'mine:squared': 'scal'. Did you mean 'scale'\?"),
        (["--loss.name", "mine:deviation"], ValueError, r"loss must be callable as mine:deviation\(outputs, targets\)"),
        (["--metric", "{name: 'mine:error'}"], ValueError, "metric.mode must say what is better, max or min, for 'mine:error'; got none"),
        (["--metric.mode", "most"], ValueError, "unknown mode 'most'"),
        (["--metric.finish", "sqr"], ValueError, r"unknown metric.finish 'sqr'. Did you mean 'sqrt'\?"),
        (["--metric.label", "loss"], ValueError, "metric.label must not be 'loss', which is recorded beside the metric"),
        (["--metric", "{name: 'mine:with_mode', mode: max}"], ValueError, "metric 'mine:with_mode' must have no parameter 'mode'"),
        (["--metric", "{name: loss, mode: max}"], ValueError, "metric.mode must be left out for 'loss'"),
        (["--label_smoothing", "0.1"], ValueError, "label_smoothing must be 0 with a loss of your own"),
        (["--flooding", "{name: individual, level: 0.1}"], ValueError, "flooding must be 'batch' with a loss of your own"),
        (["--weight_decay.schedule", "auto"], ValueError, "weight_decay.trigger must be 'loss' with a data set of your own"),
        (["--data.collate", "mine:colate"], ValueError, r"unknown function of .*'colate'. Did you mean 'collate'\?"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_training(folder, words, error, message):
    with pytest.raises(error, match=message):
        config_of(folder, *words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model.name", "mine:no_module"], TypeError, "model 'mine:no_module' must return a torch.nn.Module; got 7"),
        (["--data.name", "mine:drawn"], ValueError, r"mine:drawn\('train'\) must draw from a generator of its own"),
        (["--data.name", "mine:unsized"], TypeError, r"mine:unsized\('train'\) must return a data set with a length"),
        (["--data.name", "mine:stream"], TypeError, r"mine:stream\('train'\) must return a map-style data set"),
        (["--data.name", "mine:nothing"], ValueError, r"mine:nothing\('train'\) must return at least one sample"),
        (["--data.name", "mine:one_set"], ValueError, r"mine:one_set\('test'\) must return a data set; got None. Or give data.train_size"),
        (["--data.name", "mine:ragged"], ValueError, r"samples of 'mine:ragged' must be tensors, .* collate: mine:collate"),
        (["--data.validation", "5"], ValueError, "data.validation must be null for 'mine:dataset' with validation samples"),
        (["--data.train_size", "41"], ValueError, r"data.train_size must be <= 40, the samples of mine:dataset\('train'\); got 41"),
        (["--loss.name", "mine:each"], ValueError, r"loss must return a scalar tensor, the mean over the batch; got float32 \(10, 1\)"),
        (["--loss", "null"], ValueError, r"loss must be given for outputs float32 \(10, 1\) and targets float32 \(10, 1\)"),
        (["--metric", "null"], ValueError, r"metric must be given for outputs float32 \(10, 1\) and targets .*: accuracy needs"),
        (["--metric", "{name: 'mine:each', mode: min}"], ValueError, "metric 'mine:each' must return a number, the mean"),
        (["--metric", "{name: 'mine:moments', mode: min}"], ValueError, "metric 'mine:moments' must return a number, the mean"),
        (["--metric", "{name: 'mine:never', mode: min}"], ValueError, "metric 'never' must be a number; got nan on the test set"),
        (["--metric", "{name: 'mine:error', mode: min, percent: true}"], ValueError, "metric 'mine:error' must be a share"),
        (["--model", "{name: mlp}"], ValueError, "model 'mlp' must get images .channels, height, width., which the data set does not say"),
    ],
)  # fmt: skip
def test_mistakes_are_found_in_training(folder, words, error, message):
    with pytest.raises(error, match=message):
        train(config_of(folder, *words))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:", r"mine\.py' cannot be imported: SyntaxError in line 1"),
        ("import torch\n1 / 0", r"mine\.py' cannot be imported: ZeroDivisionError in line 2: division by zero\. Mend it"),
        (
            "import no_such_package",
            r"cannot be imported: ModuleNotFoundError in line 1: No module named .*Run: pip install no_such_package",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_says_why_and_where(folder, text, message):
    (folder / "mine.py").write_text(dedent(text))
    with pytest.raises(ValueError, match=message):
        config_of(folder)


def test_an_option_is_given_once_and_goes_with_its_data_set(folder):
    with pytest.raises(ValueError, match=r"data\.size must be given once; got it in data and in data\.options"):
        recipes.read_recipe("x", "data: {name: 'mine:dataset', size: 3, options: {size: 4}}")
    with pytest.raises(ValueError, match="unknown key in recipe 'x', block 'data': 'size'"):
        recipes.read_recipe("x", "data: {name: digits, size: 3}")
    recipe = recipes.read_recipe("x", "data: {name: 'mine:dataset', size: 30}\nvariants: {more: {data: {size: 35, noise: 1}}}")
    assert recipe.settings("more")["data"] == {"name": "mine:dataset", "options": {"size": 35, "noise": 1}}
    settings = CommandParser("train", "").settings(["x", "--data.name", "digits"], recipe.base)
    assert settings["data"] == {"name": "digits"}
    with pytest.raises(ValueError, match=r"unknown option '--data\.size'"):
        CommandParser("train", "").settings(["x", "--data.name", "digits", "--data.size", "3"], recipe.base)


def test_variants_are_judged_by_one_metric(folder, capsys):
    (folder / "own.yaml").write_text(RECIPE + "  other: {metric: {name: loss}}\n")
    assert cli.main(["compare", str(folder / "own.yaml"), "--out", "out"]) == 2
    assert "metric must be the same for all variants of recipe 'own'" in capsys.readouterr().err


def test_a_dotted_module_is_found_beside_the_recipe(folder):
    (folder / "parts").mkdir()
    (folder / "parts" / "nets.py").write_text("from torch import nn\n\n\ndef small():\n    return nn.Linear(3, 1)\n")
    config = config_of(folder, "--model.name", "parts.nets:small")
    assert set(config.code) == {"parts.nets", "mine"}
    assert train(config).weights["weight"].shape == (1, 3)


def test_an_installed_module_needs_no_record(folder):
    config = config_of(
        folder, "--loss.name", "torch.nn.functional:mse_loss", "--model", "{name: 'torch.nn:Linear', in_features: 3, out_features: 1}"
    )
    assert set(config.code) == {"mine"}
    assert not train(config).diverged


@pytest.mark.slow
def test_the_example_trains():
    example = Path(__file__).parents[2] / "examples" / "recipes" / "point_sets.yaml"
    recipe = recipes.load(str(example))
    outcome = train(recipe.configuration({**recipe.settings("sam"), "epochs": 2, "trackers": []}))
    assert outcome.history[-1].own["test_f1"] > outcome.history[0].own["test_f1"] > 0
