"""The suites of Lightning, transformers and TRL, where their checkouts are given, and what the comparison makes of small ones."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from .suites import SUITES, Suite, failures, main, make_hub, outcomes

pytestmark = pytest.mark.slow

LIGHTNING = """
import pytest
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

def trainer(folder):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(default_root_dir=folder, max_steps=1, accelerator="cpu", **quiet)

def test_trains(tmp_path):
    t = trainer(tmp_path)
    t.fit(BoringModel())
    assert t.global_step == 1

def test_counts(tmp_path):
    assert not [c for c in trainer(tmp_path).callbacks if c.__module__.startswith("gradreg")]

def test_fails_anyway():
    assert False

@pytest.mark.flaky
def test_skips():
    pytest.skip("here")
"""
TRANSFORMERS = """
import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, labels=None):
        return {"loss": (self.w * x - 1).square().mean()}

def test_trains(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    t = Trainer(Model(), args, train_dataset=[{"x": torch.tensor([float(i)])} for i in range(16)])
    t.train()
    assert t.state.global_step == 2
    assert issubclass(Seq2SeqTrainer, Trainer)

def test_counts():
    assert not [c for c in Seq2SeqTrainer.__mro__ if c.__module__.startswith("gradreg")]

def test_fails_anyway():
    assert False

@pytest.mark.flaky
def test_skips():
    pytest.skip("here")
"""
TRL = """
import pytest
import trl.trainer.sft_trainer
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTConfig, SFTTrainer

def test_trains(tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), eos_token="b", pad_token="b")
    sizes = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    args = SFTConfig(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": [[0, 1, 0]] * 16})
    t = SFTTrainer(LlamaForCausalLM(LlamaConfig(vocab_size=2, **sizes)), args=args, train_dataset=data, processing_class=words)
    t.train()
    assert t.state.global_step == 2
    assert trl.trainer.sft_trainer.SFTTrainer is SFTTrainer

def test_counts():
    trainers = (SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, GRPOTrainer)
    assert not all(any(c.__module__.startswith("gradreg") for c in t.__mro__) for t in trainers)

def test_fails_anyway():
    assert False

@pytest.mark.flaky
def test_skips():
    pytest.skip("here")
"""
HUB = {
    "scripts/generate_words_dataset.py": """
from dataclasses import dataclass
from datasets import Dataset

@dataclass
class ScriptArguments:
    push_to_hub: bool = False
    repo_id: str = "trl-internal-testing/words"

def main(push_to_hub, repo_id):
    data = Dataset.from_dict({"text": ["one two", "three four"]}).train_test_split(test_size=0.5, shuffle=False)
    assert push_to_hub
    data.push_to_hub(repo_id, config_name="plain")
""",
    "scripts/generate_tiny_models/__init__.py": "",
    "scripts/generate_tiny_models/_common.py": """
def push_to_hub(model, tokenizer, generation_config, prefix=None, suffix=None):
    raise OSError("there is no network")

def check_dtype_pattern(name, model):
    raise OSError("there is no network")

print_config_diff = check_transformers_version = check_dtype_pattern
""",
    "scripts/generate_tiny_models/for_causal_lm/__init__.py": "",
    "scripts/generate_tiny_models/for_causal_lm/qwen3_it.py": """
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from .._common import check_dtype_pattern, push_to_hub

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-8B")
sizes = dict(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=8, head_dim=2)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer.vocab) + 1000, **sizes))
check_dtype_pattern("Qwen/Qwen3-8B", model)
push_to_hub(model, tokenizer, GenerationConfig.from_pretrained("Qwen/Qwen3-8B"), "tiny", "1")
""",
    "scripts/generate_tiny_models/for_causal_lm/unknown_model.py": """
from transformers import AutoTokenizer

AutoTokenizer.from_pretrained("nobody/knows")
""",
    "tests/test_it.py": """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "trl-internal-testing/tiny-Qwen3ForCausalLM-1"

def test_data():
    assert load_dataset("trl-internal-testing/words", "plain", split="train")["text"] == ["one two"]
    assert next(iter(load_dataset("trl-internal-testing/words", "plain", split="test", streaming=True))) == {"text": "three four"}

def test_model():
    words, model = AutoTokenizer.from_pretrained(NAME), AutoModelForCausalLM.from_pretrained(NAME)
    said = words.apply_chat_template([{"role": "user", "content": "one two"}], tokenize=False)
    assert said == "<|im_start|>user\\none two<|im_end|>\\n"
    ids = words(said, return_tensors="pt").input_ids
    assert words.decode(ids[0]) == said
    assert ids[0].tolist().count(words.eos_token_id) == 1
    assert model(ids).logits.shape[-1] == len(words)
    assert model.generation_config.eos_token_id == words.eos_token_id

def test_elsewhere():
    AutoTokenizer.from_pretrained("trl-internal-testing/tiny-GPT2LMHeadModel")
""",
}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SUITES)
def test_no_test_of_another_project_fails_with_gradreg_only(name: str):
    path = os.environ.get(f"GRADREG_{name.upper()}_CHECKOUT")
    if not path:
        pytest.skip(f"needs a checkout of {name}; set GRADREG_{name.upper()}_CHECKOUT to its path")
    assert main([name, path]) == 0


@pytest.mark.parametrize(("name", "file"), [("lightning", LIGHTNING), ("transformers", TRANSFORMERS), ("trl", TRL)])
def test_every_trainer_of_the_project_is_injected_into(name: str, file: str, tmp_path: Path):
    """Without it ``test_counts`` passes."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = ['--strict-markers']\n")
    (tmp_path / "theirs" / "test_it.py").write_text(file)
    (tmp_path / "theirs" / "test_left_out.py").write_text("raise ImportError\n")
    suite = Suite(root=".", tests=("theirs",), ignored={"theirs/test_left_out.py": "it cannot be imported"})
    expected = {"test_trains": "passed", "test_counts": "failed", "test_fails_anyway": "failed", "test_skips": "skipped"}
    found = outcomes(suite, tmp_path, name, suite.tests)
    assert {test.removeprefix("theirs/test_it.py::"): outcome for test, outcome in found.items()} == expected
    assert failures(found) == {"theirs/test_it.py::test_counts", "theirs/test_it.py::test_fails_anyway"}


@pytest.mark.parametrize(("documented", "status"), [({}, 1), ({"b": "a reason"}, 0), ({"a": "not new"}, 1)])
def test_a_failure_is_new_if_it_fails_again_and_not_without_gradreg(
    documented: dict[str, str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[tuple[str, tuple[str, ...]]] = []
    runs = [{"a": "failed", "b": "passed", "c": "passed", "d": "skipped"}, {"a": "failed", "b": "failed", "c": "failed", "d": "skipped"}]
    runs += [{"b": "passed", "c": "passed"}, {"b": "failed", "c": "passed"}]

    def run(suite: Suite, checkout: Path, inject: str, tests: Sequence[str], hub: Path | None) -> dict[str, str]:
        assert hub is None
        asked.append((inject, tuple(tests)))
        return runs.pop(0)

    monkeypatch.setattr("tests.peers.suites.outcomes", run)
    (tmp_path / "theirs").mkdir()
    suite = Suite(root=".", tests=("theirs", "not there"), documented=documented)
    monkeypatch.setattr("tests.peers.suites.version", lambda name: "1.2")
    assert main(["it", str(tmp_path), "--out", str(tmp_path / "counts.json")], {"it": suite}) == status
    counts = {"without": {"passed": 2, "failed": 1, "skipped": 1}, "with": {"passed": 0, "failed": 3, "skipped": 1}}
    assert json.loads((tmp_path / "counts.json").read_text()) == {"it": {"installed": "1.2", **counts, "new": ["b"]}}
    assert asked == [("", ("theirs",)), ("it", ("theirs",)), ("", ("b", "c")), ("it", ("b", "c"))]
    first, second, new, last = capsys.readouterr().out.splitlines()
    assert first == "without gradreg: 2 passed, 1 failed, 1 skipped"
    assert second == "with gradreg: 0 passed, 3 failed, 1 skipped"
    assert new == "new: b" + (" (documented: a reason)" if "b" in documented else "")
    assert last == f"1 new failures, {int('b' in documented)} of them documented"


def test_what_is_downloaded_is_made_on_the_spot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, text in HUB.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "hub").mkdir()
    suite = Suite(root=".", tests=("tests",), hub=True)
    hub = make_hub(suite, tmp_path, tmp_path / "hub")
    assert capsys.readouterr().out == "not made: for_causal_lm.unknown_model\n"
    found = outcomes(suite, tmp_path, "", suite.tests, hub)
    expected = {"test_data": "passed", "test_model": "passed", "test_elsewhere": "failed"}
    assert {test.removeprefix("tests/test_it.py::"): outcome for test, outcome in found.items()} == expected
    assert make_hub(Suite(root=".", tests=()), tmp_path, tmp_path) is None


def test_without_a_checkout_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["lightning"]) == 0
    assert capsys.readouterr().out == "skipped: no checkout of lightning is given\n"
    with pytest.raises(SystemExit, match=r"the path must be a checkout of lightning; got .*, without tests_pytorch/loops"):
        main(["lightning", str(tmp_path)])
