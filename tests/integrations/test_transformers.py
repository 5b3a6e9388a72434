"""``RegularizedTrainer`` against a hand-written loop, plain training, itself resumed, and two processes against one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback

import gradreg
from gradreg import GradientPenalty
from gradreg.integrations.transformers import RegularizedTrainer, RegularizedTrainerMixin, without_embeddings
from gradreg.torch import GradientRegularizer
from tests.penalties import each_trait

from .digits import check_a_penalty_of_any_kind, largest_difference, weights
from .text import examples, language_model
from .trainers import FGR, SAM, arguments, optimizers, trained


def by_hand(
    penalty: gradreg.GradientPenalty | None, *, steps: int = 4, accumulate: int = 3, clip: float = 1.0, **options: Any
) -> nn.Module:
    """The loop that ``RegularizedTrainer`` stands for."""
    model = language_model()
    sgd, schedule = optimizers(model)
    regularizer = GradientRegularizer(model, penalty, **options)
    data = examples()
    per_step = 4 * accumulate
    for step in range(steps):
        torch.manual_seed(step)
        start = step * per_step % len(data)
        micro = [data[start + 4 * i : start + 4 * (i + 1)] for i in range(accumulate)]
        batches = [{name: torch.stack([e[name] for e in m]) for name in m[0]} for m in micro]
        tokens = sum((b["labels"][:, 1:] != -100).sum() for b in batches)

        def closure(batch: dict[str, Tensor], count: Any = tokens) -> Tensor:
            return model(**batch, num_items_in_batch=count).loss

        model.train()
        regularizer.backward([lambda b=b, c=closure: c(b) for b in batches])
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        sgd.step()
        schedule.step()
        sgd.zero_grad()
    return model


PENALTIES = {
    "none": None,
    "sam": SAM,
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "fgr": FGR,
    "cgr": gradreg.cgr(gamma=0.2, epsilon=0.4),
    "friendly": gradreg.friendly_sam(rho=0.3),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_training_is_the_hand_written_loop(name: str, tmp_path: Path):
    trainer = trained(tmp_path, PENALTIES[name])
    assert largest_difference(weights(trainer.model), weights(by_hand(PENALTIES[name]))) <= 1e-6
    assert trainer.regularizer.step == 4


@each_trait
def test_with_a_penalty_of_every_kind_too(penalty: GradientPenalty, tmp_path: Path):
    check_a_penalty_of_any_kind(penalty, lambda p: weights(trained(tmp_path, p).model), lambda p: weights(by_hand(p)), last=3, within=1e-6)


def test_without_a_penalty_it_is_the_plain_trainer(tmp_path: Path):
    mine, plain = trained(tmp_path / "a", None), trained(tmp_path / "b", None, trainer_class=PlainTrainer)
    assert largest_difference(weights(mine.model), weights(plain.model)) <= 1e-6
    for ours, theirs in zip(mine.state.log_history, plain.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5), name


def test_the_penalty_changes_the_gradient_and_not_the_first_logged_loss(tmp_path: Path):
    mine, plain = trained(tmp_path / "a", SAM), trained(tmp_path / "b", None, trainer_class=PlainTrainer)
    ours, theirs = mine.state.log_history[0], plain.state.log_history[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["first_gradient_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert abs(ours["grad_norm"] - theirs["grad_norm"]) > 0.01
    assert [log["gradient_evaluations"] for log in mine.state.log_history[:4]] == [2, 4, 6, 8]
    assert sum("loss" in log for log in mine.state.log_history) == 4


def test_a_model_without_token_counts_is_averaged_over_the_accumulation(tmp_path: Path):
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(32, 1).double()

        def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"loss": torch.tanh(self.linear(input_ids.double() / 300)).square().mean()}

    trainer = trained(tmp_path, SAM, model=Mean(), max_steps=1, max_grad_norm=0.0)
    model = Mean()
    sgd, _ = optimizers(model)
    ids = torch.stack([e["input_ids"] for e in examples()[:12]])
    GradientRegularizer(model, SAM).backward(lambda: model(ids, ids, ids)["loss"])
    sgd.step()
    assert largest_difference(weights(trainer.model), weights(model)) <= 1e-7
    assert largest_difference(weights(model), weights(Mean())) > 1e-3


def test_an_epoch_whose_last_accumulation_is_incomplete(tmp_path: Path):
    class Counts(RegularizedTrainer):
        sizes: tuple[int, ...] = ()

        def _regularized(self, backward: Any) -> Tensor:
            self.sizes += (len(self._waiting),)
            return super()._regularized(backward)

    trainer = trained(tmp_path, SAM, trainer_class=Counts, data=examples()[:20], max_steps=-1, num_train_epochs=2)
    assert trainer.sizes == (3, 2, 3, 2)
    assert trainer.state.global_step == trainer.regularizer.step == 4


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(restore_callbacks: bool, tmp_path: Path):
    penalty = gradreg.gnp(r=0.4, alpha=0.8).warmup("radius", steps=4)
    options = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore_callbacks}
    whole = trained(tmp_path, penalty, **options)
    resumed = trained(tmp_path, penalty, model=language_model(seed=1), resume=str(tmp_path / "checkpoint-2"), **options)
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0.0
    assert resumed.regularizer.step == 4
    assert resumed.regularizer.metrics.evaluations == whole.regularizer.metrics.evaluations == 7  # no radius, no second pass, at step 0
    assert resumed.state.log_history[:4] == whole.state.log_history[:4]


SAVING = {"save_strategy": "steps", "save_steps": 2}
STATEFUL = {
    "friendly_sam": gradreg.friendly_sam(rho=0.3),
    "auto": gradreg.auto(),
    "remembered": gradreg.remembered(epsilon=0.3),
    "msam": gradreg.msam(rho=0.3),
    "looksam": gradreg.looksam(rho=0.3, k=3, a=0.7),  # step 2 reuses what step 0 found
    "sparse": SAM.sparse(0.5, every=3),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_has_the_state_of_its_penalty(name: str, tmp_path: Path):
    penalty = STATEFUL[name]
    whole = trained(tmp_path, penalty, **SAVING)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = trained(tmp_path / "again", penalty, model=language_model(seed=1), resume=str(checkpoint), **SAVING)
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0.0
    (checkpoint / "gradreg-0-of-1.pt").unlink()
    with pytest.warns(UserWarning, match=r"has no state of .* for each of 1 processes, so it starts from zero\. .*save_only_model=False"):
        begun = trained(tmp_path / "anew", penalty, model=language_model(seed=1), resume=str(checkpoint), **SAVING)
    assert largest_difference(weights(begun.model), weights(whole.model)) > 1e-5


def test_checkpoints_without_an_optimizer_or_a_stateful_penalty_hold_no_state(tmp_path: Path):
    trained(tmp_path / "weights", STATEFUL["msam"], save_only_model=True, **SAVING)
    trained(tmp_path / "sam", SAM, **SAVING)
    assert (tmp_path / "weights" / "checkpoint-2").is_dir()
    assert list(tmp_path.rglob("gradreg*")) == []
    with pytest.warns(UserWarning, match="has no state of"):
        trained(tmp_path, STATEFUL["msam"], resume=str(tmp_path / "weights" / "checkpoint-2"), **SAVING)


def test_a_state_that_is_damaged_or_of_another_penalty_is_named(tmp_path: Path):
    trained(tmp_path, STATEFUL["looksam"], **SAVING)
    file = tmp_path / "checkpoint-2" / "gradreg-0-of-1.pt"
    with pytest.raises(
        ValueError, match=r"'.*checkpoint-2/gradreg-0-of-1\.pt' must hold the state of .*memory must hold average and period"
    ):
        trained(tmp_path, STATEFUL["msam"], resume=str(tmp_path / "checkpoint-2"))
    for content in (b"", file.read_bytes()[:200]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"gradreg-0-of-1\.pt' must hold the state of .* Resume from another checkpoint"):
            trained(tmp_path, STATEFUL["looksam"], resume=str(tmp_path / "checkpoint-2"))


def test_a_batch_size_that_is_too_large_is_halved(tmp_path: Path):
    class TooLarge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")

    class Trained(RegularizedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(TooLarge())

    found = trained(tmp_path, SAM, trainer_class=Trained, auto_find_batch_size=True, gradient_accumulation_steps=1)
    assert found.state.train_batch_size == 2
    assert found.regularizer.step == 4
    assert found.regularizer.metrics.evaluations == 8  # the regularizer too begins again


def test_training_again_starts_the_clock_again(tmp_path: Path):
    trainer = trained(tmp_path, SAM.warmup("zero", steps=2))
    assert trainer.regularizer.metrics.evaluations == 6
    trainer.train()
    assert trainer.regularizer.step == 4
    assert trainer.regularizer.metrics.evaluations == 6


def test_what_a_repeated_pass_logs_and_counts_is_undone(tmp_path: Path):
    class Logs(RegularizedTrainer):
        coefficient = 1.0
        seen: tuple[tuple[bool, float, bool], ...] = ()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._metrics: dict[str, list[float]] = {"loss": []}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            entry = (self.repeats_pass, self.coefficient, self.accelerator.sync_gradients)
            Logs.seen += (entry,)
            loss = super().compute_loss(*args, **kwargs)
            self._metrics["loss"].append(loss.item())
            self.coefficient /= 2
            self.log({"inside": 1.0})
            return loss

    trainer = trained(tmp_path, SAM, trainer_class=Logs, max_steps=1, gradient_accumulation_steps=2)
    # First passes at coefficients 1 and 1/2; each repeated at its own, with the synchronisation flag it had.
    assert trainer.coefficient == 0.25
    assert len(trainer._metrics["loss"]) == 2
    assert sum("inside" in log for log in trainer.state.log_history) == 2
    assert Logs.seen == ((False, 1.0, False), (False, 0.5, True), (True, 1.0, False), (True, 0.5, True))


def test_a_loss_of_ones_own(tmp_path: Path):
    class Squares(RegularizedTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return model(inputs["input_ids"]).logits.square().mean()

    class Beneath(PlainTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return model(inputs.pop("input_ids")).logits.square().mean()

    class Mixed(RegularizedTrainerMixin, Beneath):
        pass

    above, beneath = (trained(tmp_path, FGR, trainer_class=c, max_steps=2) for c in (Squares, Mixed))
    assert largest_difference(weights(above.model), weights(beneath.model)) == 0.0
    assert largest_difference(weights(above.model), weights(language_model())) > 1e-5


def test_selection_speaks_the_models_own_names(tmp_path: Path):
    names: list[str] = []

    def no_head(name: str, parameter: nn.Parameter) -> bool:
        names.append(name)
        return "lm_head" not in name

    trainer = trained(tmp_path, FGR, parameters=no_head)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    expected = by_hand(FGR, parameters=lambda name, p: "lm_head" not in name)
    assert largest_difference(weights(trainer.model), weights(expected)) <= 1e-6
    assert largest_difference(weights(trainer.model), weights(by_hand(FGR))) > 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_can_be_left_out(tied: bool):
    model = language_model(tie_word_embeddings=tied)
    chosen = [name for name, p in model.named_parameters() if without_embeddings(model)(name, p)]
    assert chosen
    assert all("layers" in name or name == "model.norm.weight" for name in chosen)


def test_bf16_autocast(tmp_path: Path):
    mine, plain = trained(tmp_path / "a", FGR, bf16=True), trained(tmp_path / "b", FGR)
    assert 0 < largest_difference(weights(mine.model), weights(plain.model)) < 0.05
    assert math.isfinite(mine.state.log_history[-1]["train_loss"])


def test_exact_fails_on_fused_attention_naming_fgr_and_works_on_eager(tmp_path: Path):
    penalty = gradreg.exact(gamma=0.1)
    with pytest.raises(RuntimeError, match=r"twice differentiable.*gradreg\.fgr"):
        trained(tmp_path, penalty, model=language_model(dropout=0.0, attn_implementation="sdpa"), max_steps=1)
    trained(tmp_path, penalty, model=language_model(dropout=0.0, attn_implementation="eager"), max_steps=1)


def test_what_it_cannot_do_is_refused_at_the_start(tmp_path: Path):
    with pytest.raises(ValueError, match=r"optim must not step during the backward pass; got .*LOMO"):
        RegularizedTrainer(language_model(), arguments(tmp_path, optim="lomo"), train_dataset=examples(), penalty=SAM)
    with pytest.raises(ValueError, match="parameters must select at least one"):
        RegularizedTrainer(language_model(), arguments(tmp_path), train_dataset=examples(), penalty=SAM, parameters=lambda n, p: False)
    decoupled = gradreg.wsam(rho=0.1, gamma=0.4, decoupled=True)
    with pytest.raises(ValueError, match=r"penalty must not be decoupled under the Trainer.*Use gradreg\.wsam"):
        RegularizedTrainer(language_model(), arguments(tmp_path), train_dataset=examples(), penalty=decoupled)
    learned = gradreg.sam(rho=gradreg.LETS())
    with pytest.raises(ValueError, match=r"^penalty must not learn its radius from held-out data under the Trainer, .*; got SAM"):
        RegularizedTrainer(language_model(), arguments(tmp_path), train_dataset=examples(), penalty=learned)
    with pytest.raises(TypeError, match=r"penalty must be a GradientPenalty or None; got 0\.05"):
        RegularizedTrainer(language_model(), arguments(tmp_path), train_dataset=examples(), penalty=0.05)  # type: ignore[arg-type]


def test_a_failing_step_leaves_nothing_behind(tmp_path: Path):
    class Fails(RegularizedTrainer):
        def _regularized(self, backward: Any) -> Tensor:
            self._waiting[-1].forward = lambda: 1 / 0  # type: ignore[assignment,return-value]
            return super()._regularized(backward)

    trainer = Fails(language_model(), arguments(tmp_path), train_dataset=examples(), penalty=SAM)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        trainer.train()
    assert trainer._waiting == []
    assert "backward" not in vars(trainer.accelerator)
