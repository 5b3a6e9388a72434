"""Bi-LoRA against the equations of its paper, in float64, in a loop and in a Trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers import Trainer as PlainTrainer

import gradreg
from gradreg.integrations.peft import NAME, BiLora
from gradreg.integrations.transformers import RegularizedTrainer
from gradreg.torch import GradientRegularizer

from .digits import largest_difference
from .test_transformers import SAVING
from .text import examples, language_model
from .trainers import arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")

RHO, SCALING = 0.02, 2.0
X, Y = torch.linspace(-2, 2, 40, dtype=torch.float64).view(8, 5), torch.linspace(0, 1, 24, dtype=torch.float64).view(8, 3)


def network() -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(base, config).double()  # type: ignore[arg-type, return-value]


def prepared(rho: float = RHO) -> tuple[PeftModel, BiLora]:
    model = network()
    torch.manual_seed(1)
    return model, BiLora(model.double(), rho=rho)


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - Y).square().mean()


def factors(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


def merged_loss(base: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    """L(W + s·B₁A₁ + s·B₂A₂), the network written out."""
    h = X
    for i in ("0", "2"):
        weight = base[f"base_model.model.{i}.base_layer.weight"]
        for factor, name in ((first, "default"), (second, NAME)):
            prefix = f"base_model.model.{i}.lora_"
            weight = weight + SCALING * factor[f"{prefix}B.{name}.weight"] @ factor[f"{prefix}A.{name}.weight"]
        h = h @ weight.T + base[f"base_model.model.{i}.base_layer.bias"]
        h = torch.tanh(h) if i == "0" else h
    return (h - Y).square().mean()


def norm_of(second: dict[str, Tensor]) -> float:
    prefix = "base_model.model"
    pairs = [(second[f"{prefix}.{i}.lora_B.{NAME}.weight"], second[f"{prefix}.{i}.lora_A.{NAME}.weight"]) for i in ("0", "2")]
    products = [SCALING * b @ a for b, a in pairs]
    return math.sqrt(sum(float(p.square().sum()) for p in products))


@pytest.mark.parametrize("penalized", [False, True])
def test_steps_are_those_of_the_paper(penalized: bool):
    """Equation 9 with SGD, then equation 10; ``penalized``, through a regularizer, which gets the loss and has no penalty."""
    model, bi_lora = prepared()
    with torch.no_grad():  # the second adapter begins at 0; start where the ball is left in the first steps
        for p in bi_lora.parameters:
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    first, second, lr = factors(model, "default"), factors(model, NAME), 0.1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    bi_lora.attach(optimizer)
    regularizer = GradientRegularizer(model, None)
    clipped = 0
    for _ in range(4):
        optimizer.zero_grad()
        if penalized:
            regularizer.backward(lambda: loss_of(model))
        else:
            loss_of(model).backward()
        optimizer.step()
        down = grad(lambda theta, second=second: merged_loss(base, theta, second))(first)
        up = grad(lambda theta, first=first: merged_loss(base, first, theta))(second)
        first = {n: p - lr * down[n] for n, p in first.items()}
        second = {n: p + lr * up[n] for n, p in second.items()}
        size = norm_of(second)
        if size > RHO:
            clipped += 1
            second = {n: math.sqrt(RHO / size) * p for n, p in second.items()}
        assert largest_difference(factors(model, "default"), first) <= 1e-12
        assert largest_difference(factors(model, NAME), second) <= 1e-12
        assert bi_lora.norm().item() == pytest.approx(norm_of(second), rel=1e-12)
    assert 0 < clipped < 4  # outside of the ball, and inside


def test_a_perturbation_inside_of_the_ball_is_left_as_it_is():
    model, bi_lora = prepared(rho=1e3)
    before = factors(model, NAME)
    bi_lora.clip()
    assert largest_difference(factors(model, NAME), before) == 0.0


def test_it_climbs():
    """With the first adapter frozen, ascent raises the loss until the ball ends it."""
    model, bi_lora = prepared(rho=0.5)
    optimizer = torch.optim.Adam(bi_lora.parameters, lr=0.02)
    bi_lora.attach(optimizer)
    losses: list[float] = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] > losses[20] > losses[0]
    assert bi_lora.norm().item() == pytest.approx(0.5, rel=1e-6)


def test_evaluation_and_what_is_left_have_the_first_adapter_alone():
    model, bi_lora = prepared()
    plain = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    bi_lora.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert bi_lora.norm() > 0
    training = loss_of(model).item()
    model.eval()
    evaluated = loss_of(model).item()
    model.train()
    assert loss_of(model).item() == training != evaluated
    bi_lora.remove()
    assert model.active_adapters == ["default"]
    assert loss_of(model).item() == pytest.approx(evaluated, rel=1e-12)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer.step()  # its hook is gone too
    loss_of(model).backward()
    other = functional_call(model, {}, (X,))
    assert other.shape == (8, 3)


def in_a_trainer(folder: Path, *, seed: int = 2, kind: Any = RegularizedTrainer, resume: Path | None = None, **options: Any) -> Any:
    """A tiny Llama with LoRA, trained by AdamW as the Trainer makes it, without the callback if ``callback=False``; and its Bi-LoRA."""
    base, config = language_model(dropout=0.0), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    bi_lora = BiLora(model, rho=0.05)  # type: ignore[arg-type]
    own = {"penalty": options.pop("penalty", None), "parameters": lambda name, _: NAME not in name} if kind is RegularizedTrainer else {}
    callbacks = [bi_lora.callback] if options.pop("callback", True) else []
    args = arguments(folder, **{"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "max_steps": 4, **options})
    trainer = kind(model, args, train_dataset=examples(), callbacks=callbacks, **own)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, bi_lora


def test_in_a_trainer(tmp_path: Path):
    trainer, bi_lora = in_a_trainer(tmp_path, max_steps=6)
    assert 0 < bi_lora.norm().item() <= 0.05 * (1 + 1e-5)
    assert trainer.regularizer.metrics.evaluations == 6
    _, free = in_a_trainer(tmp_path, max_steps=6, callback=False)
    assert free.norm().item() > 0.05


@pytest.mark.parametrize(("kind", "penalty"), [(PlainTrainer, None), (RegularizedTrainer, gradreg.friendly_sam(rho=0.3))])
def test_a_resumed_run_of_a_trainer_equals_the_uninterrupted_one(kind: Any, penalty: Any, tmp_path: Path):
    """The checkpoint has both adapters and the optimizer's state of both, and both go on being trained."""
    more = {"penalty": penalty} if penalty is not None else {}
    whole, bi_lora = in_a_trainer(tmp_path, kind=kind, **SAVING, **more)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / NAME / "adapter_model.safetensors").is_file()
    resumed, again = in_a_trainer(tmp_path / "again", seed=5, kind=kind, resume=checkpoint, **SAVING, **more)
    for name in ("default", NAME):
        assert largest_difference(factors(resumed.model, name), factors(whole.model, name)) == 0.0
    assert again.norm() == bi_lora.norm() > 0
    assert all(p.requires_grad for p in again.parameters)
    again.remove()
    assert resumed.model.active_adapters == ["default"]
    assert not any(NAME in name for name, _ in resumed.model.named_parameters())
    resumed.model.set_adapter("default")  # the model's own again
    assert resumed.model.active_adapters == ["default"]


def test_a_resumed_loop_equals_the_uninterrupted_one():
    def steps(model: PeftModel, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    def begun() -> tuple[PeftModel, torch.optim.Optimizer]:
        model, bi_lora = prepared()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        bi_lora.attach(optimizer)
        return model, optimizer

    whole, optimizer = begun()
    steps(whole, optimizer, 2)
    states = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, 2)
    again, other = begun()
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    steps(again, other, 2)
    assert largest_difference(dict(again.state_dict()), dict(whole.state_dict())) == 0.0


def test_what_it_cannot_do_is_an_error():
    with pytest.raises(TypeError, match=r"model must be a peft\.PeftModel; got"):
        BiLora(nn.Linear(2, 2), rho=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rho must be finite and > 0; got 0"):
        BiLora(network(), rho=0.0)
    with pytest.raises(ValueError, match=r"rank must be .*got 0"):
        BiLora(network(), rho=0.1, rank=0)
    model, _ = prepared()
    with pytest.raises(ValueError, match=r"model must have one active adapter.*got \['default', 'bi_lora'\]"):
        BiLora(model, rho=0.1)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    whole = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have one active adapter, of plain LoRA without modules_to_save"):
        BiLora(whole, rho=0.1)  # type: ignore[arg-type]


def test_its_second_adapter_can_be_left_out_of_a_penalty():
    model, bi_lora = prepared()
    left_out = set(bi_lora.parameters)
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.1), parameters=lambda name, p: p not in left_out)
    before = factors(model, NAME)
    seen: list[float] = []

    def closure() -> Tensor:
        seen.append(largest_difference(before, factors(model, NAME)))
        return loss_of(model)

    regularizer.backward(closure)
    assert seen == [0.0, 0.0]
