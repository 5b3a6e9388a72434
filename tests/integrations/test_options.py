"""Options of the frameworks with a penalty: checkpointing of activations, NEFTune, packing, compiling, 8-bit AdamW; Fabric; FSDP2 by
``accelerate launch``; and that DeepSpeed is an error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback
from trl import SFTConfig

import gradreg
from gradreg.integrations.transformers import RegularizedTrainer, _check_supported
from gradreg.integrations.trl import RegularizedSFTTrainer
from gradreg.torch import GradientRegularizer

from . import launched_fsdp, test_lightning
from .digits import batch, largest_difference, network, weights
from .test_lightning import Digits, fit, loader
from .test_transformers import by_hand
from .test_trl import COMMON
from .text import examples, language_model, text, tokenizer
from .trainers import arguments, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    *test_lightning.pytestmark,
]

ROOT = Path(__file__).parents[2]
SAM = gradreg.sam(rho=0.3)
SAME = gradreg.sam(rho=1e-6)
"""Whose step is the plain one, if both passes evaluate one function: to 1e-5, of which its radius is the cause."""


def test_checkpointing_of_activations_changes_nothing(tmp_path: Path):
    """With dropout, whose masks are drawn in the forward pass of each pass, and again in its backward pass."""
    checkpointed = trained(tmp_path, SAM, gradient_checkpointing=True, max_steps=1, gradient_accumulation_steps=2)
    assert checkpointed.model.is_gradient_checkpointing
    assert largest_difference(weights(checkpointed.model), weights(by_hand(SAM, steps=1, accumulate=2))) <= 1e-6


def test_neftune_draws_the_same_noise_in_both_passes(tmp_path: Path):
    noise: list[torch.Tensor] = []

    class Looks(RegularizedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            table = model.get_input_embeddings()
            hook = table.register_forward_hook(lambda m, i, out: noise.append((out - m.weight[i[0]]).detach()))
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()

    options = {"neftune_noise_alpha": 50.0, "gradient_accumulation_steps": 1}
    # The table is not perturbed, so that what is added to it is the noise and nothing else.
    select = {"parameters": lambda name, p: "embed" not in name}
    trained(tmp_path, SAM, trainer_class=Looks, max_steps=2, **options, **select)
    first, repeated, second, _ = noise
    assert first.abs().max() > 0.1
    torch.testing.assert_close(first, repeated, rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 0.1
    plain, same = (trained(tmp_path, penalty, max_steps=1, **options) for penalty in (None, SAME))
    assert largest_difference(weights(plain.model), weights(same.model)) <= 1e-5
    assert largest_difference(weights(plain.model), weights(by_hand(None, steps=1, accumulate=1))) > 1e-4  # without noise


def test_packed_sequences(tmp_path: Path):
    def sft(penalty: Any, **options: Any) -> Any:
        model = language_model(dropout=0.0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        trainer = RegularizedSFTTrainer(
            model,
            args=SFTConfig(str(tmp_path), max_steps=1, max_length=32, **COMMON, **options),
            train_dataset=Dataset.from_list([{"text": piece} for piece in text().split("\n\n")[:24]]),
            processing_class=tokenizer(),
            optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
            penalty=penalty,
        )
        return trainer

    def stepped(penalty: Any) -> Any:
        trainer = sft(penalty, **packed)
        trainer.train()
        return trainer

    packed = {"packing": True, "packing_strategy": "wrapped"}
    plain, same, sam = stepped(None), stepped(SAME), stepped(SAM)
    assert len(plain.train_dataset) != len(sft(None, packing=False).train_dataset)
    assert largest_difference(weights(plain.model), weights(same.model)) <= 1e-5
    assert largest_difference(weights(plain.model), weights(sam.model)) > 1e-4
    assert sam.state.log_history[0]["num_tokens"] == plain.state.log_history[0]["num_tokens"]


def test_a_compiled_model(tmp_path: Path):
    first, second, begun = (language_model(dropout=0.0, num_hidden_layers=1) for _ in range(3))  # compiling is what takes time
    options = {"max_steps": 2, "gradient_accumulation_steps": 1}
    compiled = trained(tmp_path, SAM, model=first, torch_compile=True, torch_compile_backend="aot_eager", **options)
    plain = trained(tmp_path, SAM, model=second, **options)
    assert largest_difference(weights(compiled.model), weights(plain.model)) <= 1e-5
    assert largest_difference(weights(plain.model), weights(begun)) > 1e-3


@pytest.mark.parametrize(("optim", "package"), [("adamw_torch_8bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")])
def test_8_bit_adamw(optim: str, package: str, tmp_path: Path, request: pytest.FixtureRequest):
    """The optimizer sees a gradient like any other: its step is that of a hand-written loop."""
    pytest.importorskip(package, reason=f"needs {package} for 8-bit AdamW")
    torch.compiler.set_stance("force_eager")  # torchao compiles its step, for a minute on a CPU
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    kept: list[Any] = []

    class Notes(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            kept.extend(getattr(value, "codes", value) for state in optimizer.state.values() for value in state.values())

    model, expected, begun = (language_model(dropout=0.0, intermediate_size=256) for _ in range(3))  # small tensors stay in 32 bits
    args = arguments(tmp_path, optim=optim, learning_rate=1e-2, max_steps=2, gradient_accumulation_steps=1)
    args.lr_scheduler_type = "constant"  # type: ignore[assignment]
    RegularizedTrainer(model, args, train_dataset=examples(), penalty=SAM, callbacks=[Notes()]).train()
    assert any(getattr(value, "dtype", None) == torch.uint8 for value in kept)
    optimizer, regularizer = PlainTrainer(expected, args, train_dataset=examples()).create_optimizer(), GradientRegularizer(expected, SAM)
    for step in range(2):
        rows = examples()[4 * step : 4 * step + 4]
        inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        expected.train()
        regularizer.backward(lambda inputs=inputs: expected(**inputs).loss)
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(weights(model), weights(expected)) <= 1e-6
    assert largest_difference(weights(model), weights(begun)) > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: Any, tmp_path: Path):
    """No adapter: ``backward=fabric.backward``, and ``fabric.save`` holds the regularizer's state."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, plain = network(), network()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    penalty = gradreg.friendly_sam(rho=0.3)
    regularizer, by_hand = GradientRegularizer(wrapped, penalty), GradientRegularizer(plain, penalty)
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = batch(step)
        torch.manual_seed(step)
        regularizer.backward(lambda x=x, y=y: cross_entropy(wrapped(x), y), backward=fabric.backward)
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(step)
        by_hand.backward(lambda x=x, y=y: cross_entropy(plain(x), y))
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        other.step()
        other.zero_grad()
    difference = largest_difference(weights(model), weights(plain))
    assert difference == 0.0 if precision == "32-true" else 0.0 < difference < 0.05
    fabric.save(tmp_path / "state.ckpt", {"model": wrapped, "regularizer": regularizer})
    restored = GradientRegularizer(wrapped, penalty)
    fabric.load(tmp_path / "state.ckpt", {"model": wrapped, "regularizer": restored})
    assert restored.step == 3
    assert largest_difference(*(r.state_dict()["memory"]["average"] for r in (regularizer, restored))) == 0.0


def test_fsdp2_by_accelerate_launch(tmp_path: Path):
    """Two processes with shards of the parameters, against one that sees what both see."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP --fsdp_min_num_params 100 --num_processes 2"
    options += f" --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port {port}"
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options.split(),
        str(launched_fsdp.__file__),
        str(tmp_path / "found.pt"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found_there = torch.load(tmp_path / "found.pt", weights_only=True)
    model = launched_fsdp.network()
    optimizer, regularizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), GradientRegularizer(model, gradreg.sam(rho=0.2))
    for step in range(launched_fsdp.STEPS):
        (x, y), (x2, y2) = launched_fsdp.batch(2 * step), launched_fsdp.batch(2 * step + 1)
        inputs, labels = torch.cat([x, x2]), torch.cat([y, y2])
        regularizer.backward(lambda x=inputs, y=labels: cross_entropy(model(x), y))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(found_there["weights"], dict(weights(model))) <= 1e-6
    assert largest_difference(found_there["weights"], dict(weights(launched_fsdp.network()))) > 1e-3
    assert found_there["evaluations"] == 6


@pytest.mark.parametrize("backend", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_backends_with_a_backward_pass_of_their_own_are_an_error(backend: DistributedType):
    """They are looked at before anything of theirs runs, so that the error does not need them."""
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=backend))
    with pytest.raises(
        ValueError, match=rf"must leave the backward pass to PyTorch for a second one to follow; got {backend.value}\. Use DDP"
    ):
        _check_supported(trainer)


class Adapted(pl.LightningModule):
    """A network of which LoRA's adapters alone are trained; compiled or not."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        base = network(dropout=0.0).requires_grad_(False)
        torch.manual_seed(1)
        self.network = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "4"], init_lora_weights=False))  # type: ignore[arg-type]
        self.compute = torch.compile(self.network, backend="aot_eager") if compiled else self.network

    def training_step(self, rows: Any, batch_idx: int) -> Any:
        return cross_entropy(self.compute(rows[0]), rows[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("compiled", [False, True])
def test_lightning_with_lora(compiled: bool, tmp_path: Path):
    trainer = fit(tmp_path, SAM, module=Adapted(compiled=compiled), max_steps=4)
    found: Any = trainer.lightning_module
    expected = Adapted(compiled=False)
    regularizer, optimizer = GradientRegularizer(expected, SAM), expected.configure_optimizers()
    for x, y in list(loader())[:4]:
        regularizer.backward(lambda x=x, y=y: cross_entropy(expected.network(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(weights(found.network), weights(expected.network)) <= 1e-6
    start = weights(Adapted(compiled=False).network)
    moved = {name for name, value in weights(found.network).items() if not torch.equal(value, start[name])}
    assert {name for name in moved if "lora" in name} == {name for name in start if "lora" in name}
    assert all("lora" in name or "running" in name or "tracked" in name for name in moved)


def test_a_strategy_with_a_backward_pass_of_its_own_is_an_error_in_lightning(tmp_path: Path):
    """As DeepSpeed's, which says so by the same property."""
    assert DeepSpeedStrategy.handles_gradient_accumulation.fget(None) is True  # type: ignore[attr-defined]

    class RunsItsOwn(SingleDeviceStrategy):
        handles_gradient_accumulation = True  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"the strategy must leave the backward pass to PyTorch; got RunsItsOwn"):
        fit(tmp_path, SAM, module=Digits(), strategy=RunsItsOwn("cpu"))
