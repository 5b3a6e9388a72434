"""State that is hard to keep: aliases of parameters, memory that cannot be written, what shows late, what a search leaves behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg.torch import GradientRegularizer, buffers

from .cases import PENALTIES, gradients, tanh_problem

SAM = gradreg.sam(rho=0.5)


class Cubed(nn.Module):
    """Its loss Σw³ is computed from ``read``, which shares memory with the parameter; the gradient of SAM is 3·(1 + .25)²."""

    def __init__(self, alias: Callable[[nn.Module], None], size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        alias(self)

    def forward(self) -> Tensor:
        return self.weight.pow(3).sum()


def flat_buffer(model: nn.Module) -> None:
    flat = torch.ones(model.weight.numel())
    model.weight = nn.Parameter(flat.view(-1))
    model.register_buffer("flat", flat)


def frozen_twin(model: nn.Module) -> None:
    model.twin = nn.Parameter(model.weight.data, requires_grad=False)


ALIASES: dict[str, Callable[[nn.Module], None]] = {
    "data": lambda model: setattr(model, "read", model.weight.data),
    "detached": lambda model: setattr(model, "read", model.weight.detach()),
    "element": lambda model: model.register_buffer("read", model.weight.data[1:2]),
    "flat buffer": flat_buffer,
    "frozen twin": frozen_twin,
}


@pytest.mark.parametrize("size", [4, 40_000], ids=["small", "large"])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_what_shares_memory_with_a_parameter_is_perturbed_and_restored_with_it(alias: Callable[[nn.Module], None], size: int) -> None:
    model = Cubed(alias, size)
    regularizer = GradientRegularizer(model, SAM)
    expected = 3 * (1 + 0.5 / size**0.5) ** 2
    for _ in range(3):
        model.zero_grad()
        regularizer.backward(model)
        torch.testing.assert_close(model.weight.grad, torch.full((size,), expected), rtol=1e-5, atol=0)
        assert torch.equal(model.weight.detach(), torch.ones(size))


@pytest.mark.parametrize("name", ["random", "msam"])
def test_directions_without_a_first_pass_restore_aliases_too(name: str) -> None:
    model = Cubed(ALIASES["data"])
    regularizer = GradientRegularizer(model, PENALTIES[name])
    for _ in range(3):
        regularizer.backward(model)
        assert torch.equal(model.weight.detach(), torch.ones(4))


def test_spectral_norm_by_hooks_as_pytorch_builds_it() -> None:
    """Its hook keeps ``weight.data`` in an attribute until the first forward pass; no conversion of the model has broken that alias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    twin = copy.deepcopy(model)
    twin(x).square().mean().backward()
    GradientRegularizer(model, gradreg.sam(rho=1e-4)).backward(lambda: model(x).square().mean())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4)


class Counted(nn.Module):
    """Its gradient is what ``count`` returns."""

    def __init__(self, count: Callable[[Any], float], **attributes: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.count = count
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self) -> Tensor:
        return self.count(self) * self.w.sum()


def seen(
    model: nn.Module, steps: int = 3, *, change: Callable[[int], None] = lambda step: None, penalty: Any = SAM, **options: Any
) -> list[float]:
    regularizer, found = GradientRegularizer(model, penalty, **options), []
    for step in range(steps):
        change(step)
        model.zero_grad()
        regularizer.backward(model)
        found.append(round(float(model.w.grad[0]), 4))
    return found


def test_an_attribute_that_changes_only_later() -> None:
    def count(model: Any) -> float:
        if model.on:
            model.n += 1
        return model.n + 1

    model = Counted(count, on=False, n=0)
    assert seen(model, 4, change=lambda step: setattr(model, "on", step >= 1)) == [1, 2, 3, 4]


def test_a_tensor_attribute_that_is_added_later() -> None:
    def count(model: Any) -> float:
        if not hasattr(model, "h"):
            return 1.0
        model.h += 1
        return float(model.h)

    model = Counted(count)
    assert seen(model, 4, change=lambda step: setattr(model, "h", torch.zeros(())) if step == 1 else None) == [1, 1, 2, 3]


def test_a_module_without_parameters_that_is_added_later() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    regularizer, x = GradientRegularizer(model, SAM), torch.randn(5, 3)
    regularizer.backward(lambda: model(x).square().mean())
    model.append(nn.BatchNorm1d(4, affine=False))
    regularizer.backward(lambda: model(x).square().mean())
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("replaced", [False, True], ids=["made in the first pass", "replaced between steps"])
def test_generators_that_appear_later(replaced: bool) -> None:
    draws: list[float] = []

    def count(model: Any) -> float:
        if model.g is None:
            model.g = torch.Generator().manual_seed(0)
        draws.append(float(torch.rand((), generator=model.g)))
        return 1.0

    model = Counted(count, g=torch.Generator() if replaced else None)
    seen(model, 3, change=lambda step: setattr(model, "g", torch.Generator().manual_seed(step)) if replaced else None)
    assert [a == b for a, b in zip(draws[::2], draws[1::2], strict=True)] == [True] * 3
    assert len(set(draws)) == 3


def test_an_attribute_that_only_the_ascent_writes_is_what_it_was() -> None:
    model = Counted(lambda model: 1.0, n=0)

    def ascent() -> Tensor:
        model.n += 1
        return model()

    regularizer = GradientRegularizer(model, gradreg.gnp(r=0.1, alpha=0.5))
    for _ in range(3):
        regularizer.backward(model, ascent=ascent)
        assert model.n == 0


def test_what_is_beyond_the_budget_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_AFFORDABLE", 4096)
    monkeypatch.setattr(buffers, "_SMALL", 0)

    def count(model: Any) -> float:
        model.queue += 1
        return float(model.queue[0])

    model = Counted(count, padding=torch.zeros(4000), queue=torch.zeros(100))
    assert seen(model, 4, change=lambda step: model.train(step != 2) and None) == [1, 2, 3, 4]


def test_large_state_is_found_by_its_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_AFFORDABLE", 0)
    monkeypatch.setattr(buffers, "_SMALL", 0)

    def count(model: Any) -> float:
        model.queue.data.roll(1, 0)
        model.queue.data += 1
        return float(model.queue[0])

    model = Counted(count, queue=torch.zeros(100))
    assert seen(model) == [2, 2, 3]  # in the first step alone the second pass starts where the first has ended
    assert float(model.queue[0]) == 3


def test_copies_of_the_search_are_not_kept() -> None:
    model = Counted(lambda model: 1.0, padding=torch.zeros(100_000))
    regularizer = GradientRegularizer(model, SAM)
    regularizer.backward([model, model, model])
    held = sum(t.numel() for copies in regularizer._forward_state._pool for t in copies.by_address.values())
    assert held < 1000


class Counting(nn.Module):
    """Its loss is Σw³ times what a buffer says, which counts passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 5.0))
        self.register_buffer("count", torch.ones(4))
        self.register_buffer("other", torch.zeros(4))
        self.spare = torch.zeros(4)
        self.name: Any = "a"

    def forward(self) -> Tensor:
        self.count += 1
        self.other -= self.count.sum()
        return (self.weight.pow(3) * self.count).sum() + self.other.sum()


def in_the_parameter_s_memory(model: Counting) -> None:
    both = torch.cat([model.weight.data, model.weight.data])
    model.weight.data = both[:4]
    model.other = both[:4].view(2, 2)
    model.count = torch.ones(4)


CHANGES: dict[str, Callable[[Counting], object]] = {
    "none": lambda model: None,
    "another object": lambda model: setattr(model, "count", torch.full((4,), 7.0)),
    "other memory": lambda model: setattr(model.count, "data", torch.full((4,), 7.0)),
    "another shape": lambda model: model.other.resize_(2, 2),
    "more elements": lambda model: model.other.resize_(8).zero_(),
    "another dtype": lambda model: setattr(model, "count", model.count.double()),
    "other numbers in the same memory": lambda model: setattr(model, "count", model.count.view(torch.int32)),
    "a graph": lambda model: model.spare.mul_(torch.ones(4, requires_grad=True)),
    "a tensor in place of a name": lambda model: setattr(model, "name", torch.zeros(3)),
    "a name in place of a tensor": lambda model: setattr(model, "spare", "b"),
    "nothing in place of a tensor": lambda model: setattr(model, "spare", None),
    "no attribute in place of a tensor": lambda model: delattr(model, "spare"),
    "both elsewhere, together": in_the_parameter_s_memory,
    "the buffer where the parameter is": lambda model: setattr(model.other, "data", model.weight.data),
    "the parameter where the buffer is": lambda model: setattr(model.weight, "data", model.other.detach()),
    "a parameter elsewhere": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_is_noticed_though_tensors_are_looked_at_once(change: Callable[[Counting], object]) -> None:
    """A step after a change is that of a regularizer that has seen no step before it."""
    models = [Counting(), Counting()]
    regularizers = [GradientRegularizer(model, SAM) for model in models]
    found: list[list[Tensor]] = []
    for fresh, model in enumerate(models):
        regularizer = regularizers[fresh]
        for _ in range(3):
            regularizer.backward(model)
        change(model)
        for _ in range(2):
            model.weight.grad = None
            (GradientRegularizer(model, SAM) if fresh else regularizer).backward(model)
        assert model.weight.grad is not None
        found.append([model.weight.detach(), model.weight.grad, model.count.detach(), model.other])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_tensors_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    look = buffers.ForwardState._copies_contents_of
    monkeypatch.setattr(buffers.ForwardState, "_copies_contents_of", lambda self, tensor: (looked.append(tensor), look(self, tensor))[1])
    model = Counting()
    regularizer = GradientRegularizer(model, SAM)
    for step in range(6):
        looked.clear()
        regularizer.backward(model)
        assert bool(looked) == (step < 2)
    model.count = torch.ones(4)
    regularizer.backward(model)
    assert looked


def test_a_buffer_that_is_replaced_is_not_kept_alive() -> None:
    model = Counting()
    regularizer = GradientRegularizer(model, SAM)
    for _ in range(3):
        regularizer.backward(model)
    gone, model.count = weakref.ref(model.count), torch.ones(4)
    gc.collect()
    assert gone() is None


def test_a_search_is_made_once_with_every_pass_writing_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = buffers.ForwardState._begin_search
    monkeypatch.setattr(buffers.ForwardState, "_begin_search", lambda self, *rest: (searches.append(1), search(self, *rest))[1])
    seen(Counted(lambda model: 1.0), 4, freeze_batch_statistics=False)
    assert len(searches) == 1


def test_observers_that_grow_in_place() -> None:
    from torch.ao.quantization.observer import MovingAveragePerChannelMinMaxObserver

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), MovingAveragePerChannelMinMaxObserver(ch_axis=1), nn.Linear(4, 2)), torch.randn(5, 3)
    regularizer = GradientRegularizer(model, SAM)
    for _ in range(2):
        regularizer.backward(lambda: model(x).square().mean())
    assert model[1].min_val.shape == (4,)


SPECIAL: dict[str, Callable[[], Any]] = {
    "sparse CSR": lambda: torch.eye(3).to_sparse_csr(),
    "sparse COO": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    "complex32": lambda: torch.zeros(2, dtype=torch.complex32),
    "expanded": lambda: torch.zeros(1).expand(4),
    "empty": lambda: torch.zeros(0),
    "system random": lambda: __import__("random").SystemRandom(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:ComplexHalf:UserWarning", "ignore:Sparse invariant:UserWarning")
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_attributes_of_special_kinds_are_left_alone(make: Callable[[], Any]) -> None:
    value = make()
    model = Counted(lambda model: 1.0, value=value)
    assert seen(model) == [1, 1, 1]
    assert model.value is value


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory_is_not_written_to(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.arange(8, dtype=np.float32))
    model = Counted(lambda model: float(model.table[1]), table=torch.from_numpy(np.load(tmp_path / "table.npy", mmap_mode="r")))
    assert seen(model) == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_model() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    scripted, x = torch.jit.script(copy.deepcopy(eager)), torch.randn(5, 3)
    for model in (eager, scripted):
        regularizer = GradientRegularizer(model, SAM)
        for _ in range(2):
            model.zero_grad()
            regularizer.backward(lambda model=model: model(x).square().mean())
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(gradients(scripted)[name], gradient)
    assert int(scripted.state_dict()["1.num_batches_tracked"]) == 2


def test_a_forward_pass_that_freezes_a_parameter() -> None:
    class Freezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.first.weight.requires_grad_(False)
            return self.second(self.first(x))

    model, x = Freezing(), torch.randn(5, 3)
    regularizer = GradientRegularizer(model, SAM)
    for _ in range(2):
        regularizer.backward(lambda: model(x).square().mean())
    assert not model.first.weight.requires_grad


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_a_regularizer_in_use_is_copied_with_its_model(duplicate: Callable[[Any], Any]) -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, SAM)
    regularizer.backward(problem.closure())
    other = duplicate(regularizer)
    for one in (regularizer, other):
        one.model.zero_grad()
        one.backward(lambda model=one.model: nn.functional.mse_loss(model(problem.x), problem.y))
    for name, gradient in gradients(regularizer.model).items():
        assert torch.equal(gradients(other.model)[name], gradient)
    assert other.step == 2


def test_parameters_in_the_same_memory_are_an_error() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(3))
    model.b = nn.Parameter(model.a.data)
    with pytest.raises(ValueError, match="parameters must each have memory of their own; got 'a' and 'b', which share theirs"):
        GradientRegularizer(model, SAM)


def test_a_layer_that_writes_its_own_weights_is_no_optimizer() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2)

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.embedding(i))

    model, looked = Looked(), []
    model.head.weight.register_post_accumulate_grad_hook(lambda p: looked.append(float(p.grad.norm())))
    GradientRegularizer(model, gradreg.sam(rho=1e-3)).backward(lambda: model(torch.arange(5)).square().mean())
    assert len(looked) == 2


def test_a_buffer_that_comes_to_share_the_memory_of_a_parameter_is_not_put_back() -> None:
    """Which memory is that of parameters is looked up at each step: theirs may be replaced in between."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("alias", torch.zeros(3, dtype=torch.float64))
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self) -> Tensor:
            self.count += 1
            return self.weight.pow(4).sum() / 4

    model = Shares()
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.5))
    for step, mode in enumerate((True, False)):  # a change of mode has the writers looked for again
        model.train(mode)
        model.weight.data = torch.tensor([1.0, 2.0, 3.0 + step], dtype=torch.float64)
        model.alias = model.weight.data
        model.weight.grad = None
        gradient = model.weight.detach() ** 3
        expected = (model.weight.detach() + 0.5 * gradient / gradient.norm()) ** 3
        regularizer.backward(model)
        torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=0)
    assert model.count == 2
