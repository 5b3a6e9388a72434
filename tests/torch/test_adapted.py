"""``flat_lora``: noise on the merged weights, against the formula of the paper, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

import gradreg
from gradreg import GradientPenalty, MergedNoise
from gradreg.hashing import hashed
from gradreg.torch import GradientRegularizer
from gradreg.torch.adapted import adapted_layers

from .adapters import BASES, SCALING, Adapted, X, Y, formula, network
from .cases import assert_close

SIGMA = 0.4


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return (model(X[rows]) - Y[rows]).square().mean()


def noise_at(model: nn.Module, step: int, sigma: float = SIGMA, seed: int = 0) -> dict[str, Tensor]:
    """Li et al. 2025: ε_ij ~ N(0, σ²·‖W'_i‖²/n), an entry at a time."""
    theta, places = dict(model.named_parameters()), {name: i for i, (name, _) in enumerate(model.named_parameters())}
    found: dict[str, Tensor] = {}
    for name in BASES:
        i = name[0]
        merged = theta[name] + SCALING * theta[f"{i}.lora_B.default.weight"] @ theta[f"{i}.lora_A.default.weight"]
        generator = torch.Generator().manual_seed(hashed(hashed(seed, step), places[name]))
        xi, (m, n) = torch.randn(merged.shape, generator=generator, dtype=torch.float64), merged.shape
        rows = [[sigma * float(merged[r].detach().square().sum() / n) ** 0.5 * float(xi[r, c]) for c in range(n)] for r in range(m)]
        found[name] = torch.tensor(rows, dtype=torch.float64)
    return found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def twin(model: nn.Module, noise: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return grad(lambda theta: formula({**frozen, **theta}, noise, rows))(trainable(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_five_steps_as_in_the_paper():
    ours, theirs = network(), network()
    regularizer = GradientRegularizer(ours, gradreg.flat_lora(sigma=SIGMA))
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        loss = regularizer.backward(lambda: loss_of(ours))
        optimizer.step()
        noise = noise_at(theirs, step)
        expected = twin(theirs, noise)
        assert loss.item() == pytest.approx(formula(dict(theirs.named_parameters()), noise).item(), rel=1e-12)
        assert loss.item() != pytest.approx(formula(dict(theirs.named_parameters()), {}).item(), rel=1e-3)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if name in expected:
                    p.sub_(0.1 * expected[name])
        assert_close(trainable(ours), trainable(theirs), tolerance=1e-12)
    assert regularizer.metrics.evaluations == 5  # one pass a step


@pytest.mark.parametrize(
    "penalty",
    [
        GradientPenalty(power=2, strength=0.2, radius=SIGMA, direction=MergedNoise(seed=3)),
        GradientPenalty(power=2, strength=0.2, radius=SIGMA, difference="backward", direction=MergedNoise(seed=3)),
        GradientPenalty(power=2, strength=0.2, radius=SIGMA, difference="central", direction=MergedNoise(seed=3)),
    ],
    ids=lambda penalty: penalty.difference,
)
def test_other_differences_combine_the_same_passes(penalty: GradientPenalty):
    model = network()
    GradientRegularizer(model, penalty).backward(lambda: loss_of(model))
    noise, c = noise_at(model, 0, seed=3), 0.5
    plain, up, down = (twin(model, {n: s * e for n, e in noise.items()}) for s in (0, 1, -1))
    weights = {"forward": (1 - c, c, 0), "backward": (1 + c, 0, -c), "central": (1, c / 2, -c / 2)}[penalty.difference]
    assert_close(gradients(model), {n: weights[0] * plain[n] + weights[1] * up[n] + weights[2] * down[n] for n in plain}, tolerance=1e-12)


def test_micro_batches_of_a_step_share_the_noise():
    model = network()
    halves = (slice(0, 4), slice(4, 8))
    GradientRegularizer(model, gradreg.flat_lora(sigma=SIGMA)).backward([lambda r=r: loss_of(model, r) / 2 for r in halves])
    noise = noise_at(model, 0)
    first, second = (twin(model, noise, rows) for rows in halves)
    assert_close(gradients(model), {n: (first[n] + second[n]) / 2 for n in first}, tolerance=1e-12)


def test_the_noise_has_the_variance_of_the_paper_and_is_new_each_step():
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(400, 300)))
    layers = adapted_layers(model, {p: n for n, p in model.named_parameters()})
    merged = layers[0].base.weight + layers[0].adapters.get_delta_weight("default")
    seen: list[Tensor] = []
    regularizer = GradientRegularizer(model, gradreg.flat_lora(sigma=0.3))

    def closure() -> Tensor:
        with torch.no_grad():  # what the layer adds to its weight in this pass
            seen.append((layers[0].base(torch.eye(400)) - layers[0].base.bias).T - layers[0].base.weight)
        return model(torch.eye(400)).sum()

    regularizer.backward(closure)
    regularizer.backward(closure)
    for added in seen:
        assert added.std().item() == pytest.approx(0.3 * merged.square().mean().sqrt().item(), rel=0.01)
        spread = added.std(dim=1) / (0.3 * torch.linalg.vector_norm(merged, dim=1) / 20)
        assert spread.mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.corrcoef(torch.stack([added.flatten() for added in seen]))[0, 1].abs() < 0.02


def test_nothing_is_left_behind_after_a_step_or_an_exception():
    model = network()
    before = copy.deepcopy(model.state_dict())
    regularizer = GradientRegularizer(model, gradreg.flat_lora(sigma=SIGMA))
    regularizer.backward(lambda: loss_of(model))

    def fails() -> Tensor:
        model(X)
        raise KeyboardInterrupt("here")

    plain = loss_of(model)
    for raised in (fails, lambda: loss_of(model) * float(fails())):  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt, match="here"):
            regularizer.backward(raised)
        assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(plain, loss_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_holds_no_bytes_of_the_frozen_model():
    """Neither between the steps, nor for the backward pass: what autograd keeps is what it keeps in plain training, and the row norms."""

    def saved(penalty: Any) -> tuple[int, GradientRegularizer]:
        model = network()
        regularizer, kept = GradientRegularizer(model, penalty), dict[int, int]()
        own = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def closure() -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return loss_of(model)

        regularizer.backward(closure)
        return sum(kept.values()), regularizer

    plain, _ = saved(None)
    noisy, regularizer = saved(gradreg.flat_lora(sigma=SIGMA))
    assert noisy <= plain
    assert regularizer._perturbation._buffers == {}


def test_a_schedule_and_a_resumed_run():
    """The authors raise sigma from 0 along half a cosine; at 0 the step is plain. The noise depends on the clock, which is in the state."""
    penalty = gradreg.flat_lora(sigma=gradreg.Cosine(start=0.0, end=SIGMA, steps=4), seed=5)
    model, again = network(), network()
    regularizer = GradientRegularizer(model, penalty)
    found: list[dict[str, Tensor]] = []
    for _ in range(3):
        model.zero_grad()
        regularizer.backward(lambda: loss_of(model))
        found.append(gradients(model))
    assert_close(found[0], twin(model, {}), tolerance=1e-12)
    assert_close(found[2], twin(model, noise_at(model, 2, SIGMA / 2, seed=5)), tolerance=1e-12)
    resumed = GradientRegularizer(again, penalty)
    resumed.load_state_dict({"step": 2, "evaluations": 2})
    resumed.backward(lambda: loss_of(again))
    assert_close(gradients(again), found[2], tolerance=0.0)


def test_layers_are_chosen_by_the_names_of_their_weights():
    model = network()
    GradientRegularizer(model, gradreg.flat_lora(sigma=SIGMA), parameters=lambda name, p: name.startswith("4")).backward(
        lambda: loss_of(model)
    )
    assert_close(gradients(model), twin(model, {BASES[1]: noise_at(model, 0)[BASES[1]]}), tolerance=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_noise_again(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    model = network()

    def closure() -> Tensor:
        x = X.clone().requires_grad_()
        return (checkpoint(model, x, use_reentrant=reentrant) - Y).square().mean()  # type: ignore[operator]

    GradientRegularizer(model, gradreg.flat_lora(sigma=SIGMA)).backward(closure)
    assert_close(gradients(model), twin(model, noise_at(model, 0)), tolerance=1e-12)


def test_under_autocast_and_a_gradient_scaler():
    model = network().float()
    plain = network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def closure_of(model: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(X.float())
            return (out.float() - Y.float()).square().mean()

        return closure

    GradientRegularizer(model, gradreg.flat_lora(sigma=SIGMA)).backward(closure_of(model), scaler=scaler)
    GradientRegularizer(plain, gradreg.flat_lora(sigma=SIGMA)).backward(lambda: (plain(X.float()) - Y.float()).square().mean())
    for name, value in gradients(plain).items():
        assert (gradients(model)[name] / 256.0 - value).norm() <= 0.1 * value.norm(), name


def test_what_cannot_be_perturbed_is_an_error():
    penalty = gradreg.flat_lora(sigma=SIGMA)

    def refused(model: nn.Module, words: str) -> None:
        with pytest.raises(ValueError, match=f"low-rank adapters must {words}"):
            GradientRegularizer(model, penalty)

    refused(nn.Linear(2, 2), "be in the model.*got Linear with none")
    refused(nn.Sequential(Adapted(nn.Embedding(4, 3))), r"lie on torch\.nn\.Linear layers; got '0' on Embedding")
    unfrozen = network()
    unfrozen[0].base_layer.requires_grad_(True)
    refused(unfrozen, r"lie on frozen weights; got '0\.base_layer\.weight' with requires_grad=True")
    variant = network()
    variant[4].lora_variant = {"default": object()}
    refused(variant, "be plain LoRA; got '4' with a variant")
    offloaded = network()
    offloaded[0].base_layer.forward = offloaded[0].base_layer.forward  # type: ignore[method-assign]
    refused(offloaded, "lie on layers that compute by themselves; got '0'")
    refused(torch.compile(network()), "not be compiled")  # type: ignore[arg-type]
    model = network()
    regularizer = GradientRegularizer(model, penalty)
    with pytest.raises(ValueError, match=r"closure must run a layer under a low-rank adapter.*got one that ran none of 2"):
        regularizer.backward(lambda: model[5].weight.square().sum())
    with pytest.raises(ValueError, match=r"mask must be left out with direction merged noise\(seed 0\), which perturbs no parameters"):
        penalty.only_norms()


def test_the_specification():
    assert gradreg.flat_lora(sigma=0.05) == GradientPenalty(power=2, strength=0.05, radius=0.05, direction=MergedNoise())
    assert gradreg.flat_lora(sigma=0.05).evaluations_at(0) == 1
    assert GradientPenalty.from_dict({"name": "flat_lora", "sigma": 0.1, "seed": 3}) == gradreg.flat_lora(sigma=0.1, seed=3)
    with pytest.raises(ValueError, match="must go with power 2"):
        GradientPenalty(power=1, strength=0.1, radius=0.1, direction=MergedNoise())
