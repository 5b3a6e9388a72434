"""Time of one step through each adapter, against its framework's loop with ``GradientRegularizer`` written in by hand.

    python benchmarks/adapter_cost.py --out benchmarks/results/adapter_cost

Every round trains once through the adapter and once by hand, in a random order, from the same model. The time of a run is the median time
from one optimizer step to the next; the reported ratio is the median over rounds of adapter / by hand, so that a machine whose speed drifts
disturbs both alike. By hand means: a plain loop for the closure optimizer and for Fabric, Lightning's manual optimization, a Trainer whose
``training_step`` is overridden. ``--clock processor`` counts the processor's time, which other programs disturb less; with one thread the
two are the same on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradreg
from gradreg.integrations.closure import RegularizedOptimizer
from gradreg.integrations.lightning import GradientRegularization
from gradreg.integrations.transformers import RegularizedTrainer
from gradreg.torch import GradientRegularizer
from reporting import command, environment, report, signature
from rounds import interleaved, ratio_quartiles
from tables import markdown, with_quartiles

PENALTY = gradreg.fgr(gamma=0.05, epsilon=0.1)
PACKAGES = ("torch", "lightning", "transformers", "accelerate")
Note = Callable[[], None]
"""Called after each optimizer step."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)


def images(count: int, batch: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(count)]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64))


def timed(model: nn.Module, note: Note) -> torch.optim.Optimizer:
    """SGD that notes when each of its steps is done."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: note())
    return optimizer


def closure_adapter(steps: int, note: Note) -> None:
    model = vit()
    optimizer = RegularizedOptimizer(timed(model, note), GradientRegularizer(model, PENALTY))
    for x, y in images(steps):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def closure_by_hand(steps: int, note: Note) -> None:
    model = vit()
    optimizer, regularizer = timed(model, note), GradientRegularizer(model, PENALTY)
    for x, y in images(steps):
        optimizer.zero_grad()
        regularizer.backward(lambda x=x, y=y: cross_entropy(model(x), y))
        optimizer.step()


def fabric_run(steps: int, note: Note) -> None:
    from lightning.fabric import Fabric

    fabric, model = Fabric(accelerator="cpu", devices=1), vit()
    wrapped, optimizer = fabric.setup(model, timed(model, note))
    regularizer = GradientRegularizer(wrapped, PENALTY)
    for x, y in images(steps):
        optimizer.zero_grad()
        regularizer.backward(lambda x=x, y=y: cross_entropy(wrapped(x), y), backward=fabric.backward)
        optimizer.step()


class Module(pl.LightningModule):
    def __init__(self, note: Note, manual: bool) -> None:
        super().__init__()
        self.model = vit()
        self.note = note
        self.automatic_optimization = not manual
        self.regularizer = GradientRegularizer(self.model, PENALTY) if manual else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        def closure() -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        if self.regularizer is None:
            loss = closure()
            self.log("loss", loss)
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.log("loss", self.regularizer.backward(closure, backward=self.manual_backward))
        optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return timed(self.model, self.note)


def lightning_run(steps: int, note: Note, *, manual: bool) -> None:
    quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    callbacks: list[pl.Callback] = [] if manual else [GradientRegularization(PENALTY)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, default_root_dir=folder, **quiet)
        trainer.fit(Module(note, manual), DataLoader(images(steps), batch_size=None))  # type: ignore[arg-type]


class ByHand(Trainer):
    """``training_step`` as one would write it for one batch a step."""

    regularizer: GradientRegularizer | None = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self.regularizer is None:
            self.regularizer = GradientRegularizer(model, PENALTY)
        return self.regularizer.backward(
            lambda: self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch), backward=self.accelerator.backward
        )


def trainer_run(steps: int, note: Note, *, manual: bool) -> None:
    torch.manual_seed(1)
    model, ids = llama(), torch.randint(1000, (8 * steps, 64))
    data = [{"input_ids": row, "labels": row} for row in ids]
    optimizer = timed(model, note)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=8, **options)
        common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": data, "optimizers": (optimizer, schedule)}
        trainer = ByHand(**common) if manual else RegularizedTrainer(**common, penalty=PENALTY)
        trainer.train()


Run = Callable[[int, Note], None]
ADAPTERS: dict[str, tuple[str, Run, Run]] = {
    "closure": ("ViT-Ti/4, 6 blocks, batch 8", closure_adapter, closure_by_hand),
    "lightning": (
        "ViT-Ti/4, 6 blocks, batch 8",
        lambda steps, note: lightning_run(steps, note, manual=False),
        lambda steps, note: lightning_run(steps, note, manual=True),
    ),
    "fabric": ("ViT-Ti/4, 6 blocks, batch 8", fabric_run, closure_by_hand),
    "transformers": (
        "Llama 4 × 128, batch 8 × 64 tokens",
        lambda steps, note: trainer_run(steps, note, manual=False),
        lambda steps, note: trainer_run(steps, note, manual=True),
    ),
}


def seconds(run: Run, steps: int, clock: Callable[[], float]) -> float:
    """Median time of a step, those of warming up left out."""
    times: list[float] = []
    run(steps, lambda: times.append(clock()))
    return statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def measure(adapter: Run, by_hand: Run, rounds: int, steps: int, clock: Callable[[], float]) -> dict[str, Any]:
    candidates = {name: partial(seconds, run, steps, clock) for name, run in (("adapter", adapter), ("by_hand", by_hand))}
    found = interleaved(candidates, range(rounds))
    low, middle, high = ratio_quartiles(found["adapter"], found["by_hand"])
    return {
        **{f"{name}_milliseconds": round(1000 * statistics.median(times), 2) for name, times in found.items()},
        "ratio": round(middle, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
    }


def table(results: dict[str, Any]) -> str:
    rows = [
        (name, r["workload"], f"{r['by_hand_milliseconds']:.1f}", f"{r['adapter_milliseconds']:.1f}", with_quartiles(r, 3))
        for name, r in results["adapters"].items()
    ]
    found = markdown(("adapter", "model", "by hand, ms", "adapter, ms", "ratio (quartiles)"), rows)
    where = signature(results, *PACKAGES, setting=f", {results['clock']} clock")
    return f"{found}\n\n{where}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), help="which to measure")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="whose time counts")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 4:
        parser.error(f"--rounds must be >= 1 and --steps >= 4; got {options.rounds} and {options.steps}.")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    results: dict[str, Any] = {
        "command": command(),
        "rounds": options.rounds,
        "steps": options.steps,
        "clock": options.clock,
        "environment": environment(PACKAGES),
        "adapters": {},
    }
    for name in options.adapters:
        workload, adapter, by_hand = ADAPTERS[name]
        results["adapters"][name] = {
            "workload": workload,
            **measure(adapter, by_hand, options.rounds, options.steps, CLOCKS[options.clock]),
        }
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
