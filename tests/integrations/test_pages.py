"""The code of docs/integrations.md, language-models.md and coming-from-sam.md runs as it stands there, on tiny models.

Blocks that are executed when the site is built have ``<!-- run -->`` above them and are left out here. ``...`` among arguments stands for
what the reader fills in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from trl import GRPOConfig, SFTConfig, SFTTrainer

import gradreg
from gradreg.torch import GradientRegularizer

from .digits import batch, largest_difference, network, weights
from .test_trl import COMMON, different_words, prompts
from .text import examples, language_model, text, tokenizer
from .trainers import arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated"),
]

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^## (?P<heading>[^\n]+)$|^(?P<run><!-- run -->\n)?```python\n(?P<code>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
Names = dict[str, Any]


def blocks(page: str) -> dict[str, list[str]]:
    """The code below each heading of a page that is not executed with it."""
    found: dict[str, list[str]] = {}
    heading = ""
    for match in BLOCK.finditer((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        if match["heading"]:
            heading = match["heading"]
        elif not match["run"]:
            found.setdefault(heading, []).append(match["code"])
    return found


def run(code: str, names: Names, **more: Any) -> Names:
    """Execute ``code`` with ``names``, and ``more`` in the place of ``...`` among arguments; returns all names."""
    filled = re.sub(r"(?<=[( ])\.\.\.(?=[,)])", "**more", code)
    exec(compile(filled, "<page>", "exec"), names := {"gradreg": gradreg, "torch": torch, **names, "more": more})
    return names


def with_accelerate(code: str, folder: Path) -> None:
    accelerator, model = Accelerator(cpu=True), network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (x, y), before = batch(0), weights(model)
    own = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "x": x, "y": y, "closures": []}
    names = run(code, {"GradientRegularizer": GradientRegularizer, "criterion": nn.CrossEntropyLoss(), **own})
    assert names["regularizer"].metrics.evaluations == 2
    assert names["loss"] > 0
    assert largest_difference(weights(model), before) > 1e-4


def with_the_trainer(code: str, folder: Path) -> None:
    args = arguments(folder, max_steps=1)
    trainer = run(code, {"model": language_model(), "args": args, "data": examples()})["trainer"]
    trainer.train()
    assert trainer.regularizer.metrics.evaluations == 2


def loaded(folder: Path) -> LlamaForCausalLM:
    """A model from a folder that has its tokenizer too, which TRL looks for there."""
    language_model(dropout=0.0).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def with_grpo(code: str, folder: Path) -> None:
    own = {"GRPOConfig": GRPOConfig, "model": loaded(folder), "reward": different_words, "prompts": prompts()}
    options = {"output_dir": str(folder), "max_steps": 1, "num_generations": 4, "max_completion_length": 4, **COMMON}
    trainer = run(code, own, **options)["trainer"]
    trainer.train()
    assert trainer.regularizer.metrics.evaluations == 2


def with_bi_lora(code: str, folder: Path) -> None:
    own: Names = {"get_peft_model": get_peft_model, "LoraConfig": LoraConfig, "SFTTrainer": SFTTrainer, "model": loaded(folder)}
    own["args"] = SFTConfig(str(folder), max_steps=1, max_length=32, **COMMON)
    own["data"] = Dataset.from_list([{"text": piece} for piece in text().split("\n\n")[:8]])
    names = run(code, own, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert names["trainer"].state.global_step == 1
    assert names["model"].active_adapters == ["default"]


def with_lightning(code: str, folder: Path) -> None:
    (callback,) = (c for c in run(code, {"pl": pl})["trainer"].callbacks if type(c).__module__.startswith("gradreg"))
    assert callback.penalty == gradreg.gnp(r=0.1, alpha=0.8)


def with_a_closure(code: str, folder: Path) -> None:
    model, (x, y) = network(), batch(0)
    own = {"model": model, "GradientRegularizer": GradientRegularizer, "closure": lambda: nn.functional.cross_entropy(model(x), y)}
    assert run(code, own)["optimizer"].regularizer.metrics.evaluations == 2


FRAMEWORKS: dict[str, Callable[[str, Path], None]] = {
    "Accelerate": with_accelerate,
    "Hugging Face Trainer": with_the_trainer,
    "TRL: F-GR in place of the KL penalty": with_grpo,
    "LoRA": with_bi_lora,
    "Lightning": with_lightning,
    "`optimizer.step(closure)`": with_a_closure,
}


def test_the_page_of_frameworks_has_no_other_code():
    assert {heading: len(codes) for heading, codes in blocks("integrations").items()} == dict.fromkeys(FRAMEWORKS, 1)


@pytest.mark.parametrize("heading", FRAMEWORKS)
def test_the_code_of_a_framework(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    FRAMEWORKS[heading](blocks("integrations")[heading][0], tmp_path)


def test_what_a_task_logs_of_a_language_model():
    ((code,),) = blocks("language-models").values()
    model, logged = language_model(dropout=0.0), dict[str, Any]()
    earlier = [torch.stack([row["input_ids"] for row in examples(padded=False)[:2]])]
    run_ = type("Run", (), {"log": staticmethod(logged.update)})
    own = {"model": model, "earlier": earlier, "logits": torch.eye(3), "labels": torch.arange(3), "run": run_}
    own["closures"] = [lambda: model(input_ids=earlier[0], labels=earlier[0]).loss]
    run(code, own)
    assert logged["forgetting"] == 0.0
    assert logged["loss_in_4_bits"] > 0
    assert 0 < logged["calibration_error"] < 1
    assert set(logged) == {"test_loss", "forgetting", "loss_in_4_bits", "calibration_error", "nll"}


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


@pytest.mark.parametrize("heading", ["davda54/sam", "pytorch_optimizer"])
def test_their_lines_and_ours_end_in_the_same_weights(heading: str):
    """davda54/sam is run by the class of pytorch_optimizer, which has its calls."""
    from pytorch_optimizer import SAM

    loader = [(x.double(), y) for x, y in (batch(i) for i in range(3))]
    ended: list[dict[str, Tensor]] = []
    yours, ours = blocks("coming-from-sam")[heading]
    plain = ours.replace("gradreg.sam(rho=0.05)", "None")
    assert plain != ours
    for code in (yours, ours, plain):
        model = classifier()
        run(
            code,
            {"SAM": SAM, "GradientRegularizer": GradientRegularizer, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()},
        )
        ended.append(weights(model))
    changed = largest_difference(ended[1], ended[2])
    assert largest_difference(ended[0], ended[1]) <= 1e-6 * changed
    assert changed > 1e-5


def test_the_lines_of_optax_and_ours_give_the_same_updates():
    import jax
    import jax.numpy as jnp
    import optax

    from gradreg.jax import value_and_grad

    with jax.enable_x64(True):
        x, y = (jnp.linspace(*ends, 12).reshape(4, 3) for ends in ((-1.0, 1.0), (0.0, 2.0)))
        params = {"w": jnp.linspace(-0.5, 0.7, 9).reshape(3, 3)}
        own: Names = {"jax": jax, "optax": optax, "value_and_grad": value_and_grad, "params": params, "x": x, "y": y}
        own["loss"] = lambda params, x, y: jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)
        updates = []
        for code in blocks("coming-from-sam")["optax.contrib.sam"]:
            begun, step = code.split("\n\n")
            names = run(begun, own)
            updates.append(run(step, {**names, "state": names["tx"].init(params)})["updates"]["w"])
        assert jnp.abs(updates[0] - updates[1]).max() <= 1e-9 * jnp.abs(updates[1]).max()


def test_the_other_lines_of_ours():
    """Composer and the GNP repository are not installed where the tests run."""
    import jax.numpy as jnp

    from gradreg.jax import value_and_grad

    pages = blocks("coming-from-sam")
    model, before = classifier(), weights(classifier())
    loader = [(x.double(), y) for x, y in (batch(i) for i in range(6))]
    own = {"GradientRegularizer": GradientRegularizer, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()}
    _, ours = pages["Composer"]
    names = run(ours, {**own, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    assert names["regularizer"].metrics.evaluations == 8  # steps 0 and 5 take two
    assert largest_difference(weights(model), before) > 1e-4

    (ours,) = pages["The GNP repository (zhaoyang-0204/gnp)"]
    here: Names = {"params": jnp.arange(3.0), "x": jnp.ones(3), "y": 1.0, "loss": lambda w, x, y: ((w @ x - y) ** 2).mean()}
    early, late = (
        run(ours, {**copy.copy(here), "value_and_grad": value_and_grad, "warmup_steps": 2, "step": step})["grads"] for step in (0, 5)
    )
    assert jnp.isfinite(late).all()
    assert jnp.abs(early - late).max() > 1e-3
    assert set(pages) == {"davda54/sam", "pytorch_optimizer", "optax.contrib.sam", "Composer", "The GNP repository (zhaoyang-0204/gnp)"}
