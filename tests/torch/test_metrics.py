"""``regularizer.metrics``: what the last step did, without waiting for the device until a value is looked at."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer, norms

from . import twins
from .cases import BASE, OF_EACH_TRAIT, PENALTIES, every_penalty, plain_gradients, regularizer_at, tanh_problem


class Operations(TorchDispatchMode):
    """Records the name of every operation that is dispatched while ``recording``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.recording = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.recording:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@every_penalty
def test_values(penalty: GradientPenalty) -> None:
    problem, step = tanh_problem(), 4
    regularizer = regularizer_at(step, problem.model, penalty)
    norm = float(twins.norm(plain_gradients(problem)))
    regularizer.backward(problem.closure())
    metrics = regularizer.metrics
    if penalty.starts_unperturbed_at(step):
        assert metrics.gradient_norm == metrics["gradient_norm"] == pytest.approx(norm, rel=1e-12)
    else:
        assert math.isnan(metrics.gradient_norm)
    assert metrics.strength == penalty.strength_at(step)
    assert metrics.evaluations == penalty.evaluations_at(step)
    if penalty.difference == "exact":
        assert math.isnan(metrics.radius)
        assert math.isnan(metrics.coefficient)
    else:
        assert metrics.radius == penalty.radius_at(step)
        assert metrics.coefficient == penalty.coefficient_at(step)


@pytest.mark.parametrize("penalty", [None, gradreg.sam(rho=0.3).every(2), gradreg.friendly_sam(rho=0.3).every(2)], ids=str)
def test_the_norm_of_a_plain_pass_is_measured_on_demand(penalty: GradientPenalty | None) -> None:
    def two_steps(*, measure_norm: bool) -> tuple[list[float], int]:
        problem = tanh_problem()
        regularizer = GradientRegularizer(problem.model, penalty, measure_norm=measure_norm)
        norms = []
        with Operations() as operations:
            for _ in range(2):
                regularizer.backward(problem.closure())
                norms.append(regularizer.metrics.gradient_norm)
                problem.model.zero_grad()
        return norms, operations.names.count("aten::linalg_vector_norm")

    (norms, reads), (fewer, spared) = two_steps(measure_norm=True), two_steps(measure_norm=False)
    assert spared < reads
    # ``every(2)`` penalises the first step of two, by a direction of the gradient's length or, if friendly, of a length of its own.
    needs_norm = penalty is not None and penalty.direction.is_gradient
    assert fewer[0] == norms[0] if needs_norm else math.isnan(fewer[0])
    assert math.isnan(fewer[1])
    assert not math.isnan(norms[1])


def test_evaluations_add_up_through_a_warmup() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1).warmup("zero", steps=2))
    seen = []
    for _ in range(4):
        regularizer.backward(problem.closure())
        seen.append(regularizer.metrics.evaluations)
    assert seen == [1, 2, 4, 6]
    assert regularizer.step == 4


def test_before_the_first_step_everything_is_unknown() -> None:
    metrics = GradientRegularizer(tanh_problem().model, gradreg.sam(rho=0.1)).metrics
    assert metrics["evaluations"] == 0
    assert all(math.isnan(value) for key, value in metrics.items() if key != "evaluations")


def test_plain_step_onto_a_gradient_has_no_norm_of_its_own() -> None:
    problem = tanh_problem()
    problem.loss().backward()
    regularizer = GradientRegularizer(problem.model, None)
    regularizer.backward(problem.closure())
    assert math.isnan(regularizer.metrics.gradient_norm)


def test_is_a_mapping_that_loggers_take() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1))
    regularizer.backward(problem.closure())
    plain = dict(regularizer.metrics)
    assert list(plain) == ["gradient_norm", "strength", "radius", "coefficient", "cosine", "evaluations"]
    assert len(regularizer.metrics) == 6
    assert all(isinstance(value, (int, float)) for value in plain.values())
    assert "gradient_norm" in repr(regularizer.metrics)


def test_an_older_step_s_metrics_stay_what_they_were() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1))
    regularizer.backward(problem.closure())
    first = regularizer.metrics
    regularizer.backward(problem.closure())
    assert first.evaluations == 2
    assert regularizer.metrics.evaluations == 4


def test_unknown_name_lists_the_known() -> None:
    metrics = GradientRegularizer(tanh_problem().model, None).metrics
    with pytest.raises(AttributeError, match=r"metrics has no 'grad_norm'; it has gradient_norm, strength, radius"):
        _ = metrics.grad_norm
    with pytest.raises(KeyError, match="grad_norm"):
        _ = metrics["grad_norm"]


@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
def test_nothing_waits_for_the_device_until_a_value_is_read(penalty: GradientPenalty | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)  # as on an accelerator
    problem = tanh_problem()
    regularizer = regularizer_at(4, problem.model, penalty)
    if penalty is not None:
        regularizer.backward(problem.closure())  # the first step looks for writers, and at what rounding leaves
        problem.model.zero_grad()
        regularizer.decoupled_step(torch.optim.SGD(problem.model.parameters(), lr=0.0))
    with Operations() as operations:
        regularizer.backward(problem.closure(), step=4)
        assert "aten::mm" in operations.names or "aten::addmm" in operations.names
        assert not {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"} & set(operations.names)
        float(regularizer.metrics.gradient_norm)
        if penalty is None or penalty.starts_unperturbed_at(4):
            assert "aten::_local_scalar_dense" in operations.names


@pytest.mark.parametrize("penalty", [None, *OF_EACH_TRAIT.values()], ids=["none", *OF_EACH_TRAIT])
def test_own_operations_do_not_grow_with_the_number_of_tensors(penalty: GradientPenalty | None) -> None:
    """What is dispatched outside the closure and the backward pass; the double backward's products are autograd's own."""
    if penalty is not None and (penalty.difference == "exact" or isinstance(penalty.direction, gradreg.Random)):
        pytest.skip("an exact penalty forms one product of gradient and direction per tensor; random directions are drawn tensor by tensor")

    def own_operations(layers: int) -> int:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(layers)])
        x = torch.randn(2, 3)
        regularizer, optimizer = regularizer_at(10, model, penalty), torch.optim.SGD(model.parameters(), lr=0.1)
        with Operations() as operations:

            def closure() -> torch.Tensor:
                operations.recording = False
                loss = model(x).square().mean()
                operations.recording = True
                return loss

            def backward(loss: torch.Tensor) -> None:
                operations.recording = False
                loss.backward()
                operations.recording = True

            regularizer.backward(closure, backward=backward)  # allocates its copies, a tensor each
            regularizer.decoupled_step(optimizer)
            model.zero_grad()
            operations.names.clear()
            regularizer.backward(closure, backward=backward)
        return len(operations.names)

    few, many = own_operations(2), own_operations(40)
    assert few == many
    assert many < 60


FROM_THE_GRADIENT = [*(p for p in BASE.values() if p.difference != "exact"), *(PENALTIES[name] for name in ("asam", "friendly"))]


@pytest.mark.parametrize("penalty", FROM_THE_GRADIENT, ids=str)
def test_the_cosine_between_the_two_gradients_on_request(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    regularizer, seen = regularizer_at(4, problem.model, penalty, measure_cosine=True), []
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)  # what was there before is not part of either

    def closure() -> torch.Tensor:
        found = torch.autograd.grad(problem.loss(), list(problem.model.parameters()))
        seen.append(torch.cat([g.flatten() for g in found]))
        return problem.loss()

    regularizer.backward(closure)
    expected = torch.nn.functional.cosine_similarity(seen[0], seen[1], dim=0)
    assert expected < 0.999
    assert regularizer.metrics.cosine == pytest.approx(float(expected), abs=1e-9)


def test_there_is_no_cosine_where_no_perturbed_parameter_has_a_gradient() -> None:
    problem = tanh_problem()
    problem.model.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
    options = {"parameters": lambda name, _: name == "idle", "measure_cosine": True}
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3), **options)
    regularizer.backward(lambda: problem.loss() + problem.model.idle.sum())  # at the first step it would be an error
    problem.model.idle.grad = None
    regularizer.backward(problem.closure())
    assert math.isnan(regularizer.metrics.cosine)


def test_without_a_request_there_is_no_cosine() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    regularizer.backward(problem.closure())
    assert math.isnan(regularizer.metrics.cosine)


def test_a_regularizer_can_be_copied_and_pickled() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3))
    regularizer.backward(problem.closure())
    for twin in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert dict(twin.metrics) == pytest.approx(dict(regularizer.metrics), nan_ok=True)
        assert twin.step == 1


def test_the_cosine_is_refused_under_ddp(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(tanh_problem().model)
        with pytest.raises(ValueError, match="measure_cosine must be False under DistributedDataParallel"):
            GradientRegularizer(model, gradreg.sam(rho=0.3), measure_cosine=True)
    finally:
        torch.distributed.destroy_process_group()


SHARED = {name: PENALTIES[name] for name in ("sam", "fan-scaled", "cgr", "fgr-extrapolating", "sparse-random", "friendly", "sam-3-steps")}


@pytest.mark.parametrize("penalty", SHARED.values(), ids=SHARED)
def test_shares_are_those_of_the_perturbation_that_the_closure_sees(penalty: GradientPenalty) -> None:
    problem, seen = tanh_problem(), []

    def closure() -> torch.Tensor:
        seen.append({name: p.detach().clone() for name, p in problem.model.named_parameters()})
        return problem.loss()

    regularizer = GradientRegularizer(problem.model, penalty, measure_shares=True)
    regularizer.backward(closure)
    squares = {name: float((seen[1][name] - seen[0][name]).square().sum()) for name in seen[0]}
    expected = {name: square / sum(squares.values()) for name, square in squares.items()}
    assert regularizer.metrics.shares == pytest.approx(expected, rel=1e-9)
    assert sum(regularizer.metrics.shares.values()) == pytest.approx(1.0)


def test_shares_are_empty_where_nothing_is_perturbed_or_asked_for() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1).every(2))
    assert regularizer.metrics.shares == {}
    regularizer.backward(problem.closure())
    assert regularizer.metrics.shares == {}
    regularizer.measure_shares = True
    regularizer.backward(problem.closure())  # a step of one plain pass
    assert regularizer.metrics.shares == {}
    regularizer.backward(problem.closure())
    assert len(regularizer.metrics.shares) == 4
    assert list(regularizer.metrics) == ["gradient_norm", "strength", "radius", "coefficient", "cosine", "evaluations"]
    zero = GradientRegularizer(problem.model, gradreg.sam(rho=0.1), measure_shares=True)
    zero.backward(lambda: 0.0 * problem.loss())
    assert zero.metrics.shares == {}


def test_shares_are_not_read_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "reading_is_free", lambda tensor: False)  # as on an accelerator
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.1), measure_shares=True)
    regularizer.backward(problem.closure())
    problem.model.zero_grad()
    with Operations() as operations:
        regularizer.backward(problem.closure())
        assert "aten::_local_scalar_dense" not in operations.names
        operations.recording = False
        copied = pickle.loads(pickle.dumps(regularizer.metrics))
    assert copied.shares == regularizer.metrics.shares
    assert len(copied.shares) == 4
