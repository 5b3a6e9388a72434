"""``DistributedDataParallel`` inside other modules, in several parts, with a static graph, and with uneven inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg.torch import GradientRegularizer

from . import twins
from .cases import DURING_WARMUP, PENALTIES, assert_close, gradients, regularizer_at, said, values
from .ranks import Job, run_ranks
from .test_data_parallel import average_and_count, problem_of, two_steps


class Inside(nn.Module):
    """A module of one's own around a parallel one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class LikeFabric(nn.Module):
    """What Lightning Fabric returns: the parallel module beside the one that it wraps, so that every parameter is found twice."""

    def __init__(self, inner: DistributedDataParallel) -> None:
        super().__init__()
        self._original_module = inner.module
        self._forward_module = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)


def in_two_parts(model: nn.Module, **options: Any) -> nn.Module:
    """Encoder and head each in a parallel module of its own."""
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(DistributedDataParallel(model[:2], **options), DistributedDataParallel(model[2:], **options))


WRAPPERS: dict[str, Callable[..., nn.Module]] = {
    "inside a module": lambda model, **options: Inside(DistributedDataParallel(model, **options)),
    "two levels down": lambda model, **options: Inside(Inside(DistributedDataParallel(model, **options))),
    "like Fabric": lambda model, **options: LikeFabric(DistributedDataParallel(model, **options)),
    "in two parts": in_two_parts,
}
HERE = ("sam", "gnp", "cgr", "friendly", "gsam", "looksam", "wsam-decoupled", "sparse-fisher")
VIEWS = {"gradients": {}, "bucket views": {"gradient_as_bucket_view": True}}
SETTINGS = [
    *(("local", wrapper, view) for wrapper in ("inside a module", "like Fabric", "in two parts") for view in VIEWS),
    *(("global", wrapper, "bucket views") for wrapper in ("like Fabric", "in two parts")),
    ("local", "two levels down", "bucket views"),
    ("global", "inside a module", "gradients"),
]
UNEVEN = ("sam", "gsam", "friendly")
STATIC = {"sam": "plain sum", "gsam": "another average", "cgr": "three passes"}


def parallel_modules(model: nn.Module) -> Iterator[DistributedDataParallel]:
    return (m for m in model.modules() if isinstance(m, DistributedDataParallel))


def in_a_wrapper(rank: int, world: int, wrapper: str, scope: str, options: dict[str, Any]) -> dict[str, Any]:
    """For each penalty the gradients of two steps, and how many all-reduces of gradients the first took."""
    found: dict[str, Any] = {}
    for name in HERE:
        problem = problem_of(rank, world)
        base = problem.model
        wrapped = WRAPPERS[wrapper](base, **options)
        all_reduces: list[int] = []
        for parallel in parallel_modules(wrapped):
            parallel.register_comm_hook(all_reduces, average_and_count)
        problem.model = wrapped
        base_names = {p: n for n, p in base.named_parameters()}
        regularizer = regularizer_at(DURING_WARMUP, wrapped, PENALTIES[name], scope=scope)
        steps = []
        for _ in range(2):
            wrapped.zero_grad()
            regularizer.backward(problem.closure())
            steps.append(({base_names[p]: p.grad.clone() for p in base.parameters() if p.grad is not None}, len(all_reduces)))
            regularizer.decoupled_step(torch.optim.SGD(wrapped.parameters(), lr=0.0))
        found[name] = (*(gradient for gradient, _ in steps), steps[0][1])
    return found


def refusals_inside(rank: int, world: int) -> list[str | None]:
    """What is refused for a parallel model is refused inside another module, too."""
    problem = problem_of(rank, world)
    problem.model = Inside(DistributedDataParallel(problem.model))
    (parallel,) = parallel_modules(problem.model)
    regularizer = regularizer_at(DURING_WARMUP, problem.model, PENALTIES["sam"], scope="global")

    def without_averages() -> None:
        with parallel.no_sync():
            regularizer.backward(problem.closure())

    def without_averages_remembering() -> None:
        with parallel.no_sync():
            regularizer_at(DURING_WARMUP, problem.model, PENALTIES["friendly"]).backward(problem.closure())

    return [
        said(without_averages),
        said(without_averages_remembering),
        said(lambda: GradientRegularizer(problem.model, PENALTIES["sam"], measure_cosine=True)),
    ]


def static_graph(rank: int, world: int, name: str, afterwards: bool) -> dict[str, Any]:
    problem = problem_of(rank, world)
    base = problem.model
    parallel = DistributedDataParallel(base, static_graph=not afterwards)
    if afterwards:
        parallel._set_static_graph()
    problem.model = parallel
    found: list[dict[str, Tensor]] = []

    def two_steps() -> None:
        regularizer = regularizer_at(DURING_WARMUP, parallel, PENALTIES[name])
        for _ in range(2):
            parallel.zero_grad()
            regularizer.backward(problem.closure())
            found.append(gradients(base))

    return {"error": said(two_steps), "gradients": found}


def uneven_inputs(rank: int, world: int, name: str) -> tuple[str | None, dict[str, Tensor]]:
    """Rank 0 has one batch more than rank 1, inside ``join()``."""
    problem = problem_of(rank, world)
    base = problem.model
    problem.model = parallel = DistributedDataParallel(base)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)

    def epoch() -> None:
        regularizer = regularizer_at(DURING_WARMUP, parallel, PENALTIES[name])
        with parallel.join():
            for _ in range(3 - rank):
                optimizer.zero_grad()
                regularizer.backward(problem.closure())
                optimizer.step()

    return said(epoch), values(base)


@cache
def expected_of(scope: str) -> dict[str, list[dict[str, Tensor]]]:
    """The gradients of two steps that the scope promises, in one process."""
    problems = [problem_of(rank, 2) for rank in range(2)] if scope == "local" else [problem_of(0, 1)]
    losses = [twins.loss_of(problem.model, problem.x, problem.y) for problem in problems]
    theta = twins.parameters_of(problems[0].model)
    return {name: two_steps(PENALTIES[name], losses, theta) for name in HERE}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    jobs: dict[str, Job] = {}
    for scope, wrapper, view in SETTINGS:
        jobs[f"{wrapper}, {view}, {scope}"] = (in_a_wrapper, (wrapper, scope, VIEWS[view]))
    for name in STATIC:
        for afterwards in (False, True):
            jobs[f"static, {name}, {afterwards}"] = (static_graph, (name, afterwards))
    jobs["refusals"] = (refusals_inside, ())
    for name in UNEVEN:
        jobs[f"uneven, {name}"] = (uneven_inputs, (name,))
    return run_ranks(2, jobs, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("scope", "wrapper", "view"), SETTINGS)
def test_data_parallelism_inside_another_module(scope: str, wrapper: str, view: str, two_ranks: dict[str, list[Any]]) -> None:
    expected = expected_of(scope)
    for found in two_ranks[f"{wrapper}, {view}, {scope}"]:
        for name, (gradient, next_gradient, all_reduces) in found.items():
            assert_close(gradient, expected[name][0])
            assert_close(next_gradient, expected[name][1])
            passes = 1 if scope == "local" else 2
            assert all_reduces == passes * (2 if wrapper == "in two parts" else 1), f"{name}: {all_reduces} all-reduces"


def test_what_is_refused_of_a_parallel_model_is_refused_inside_another_module(two_ranks: dict[str, list[Any]]) -> None:
    for messages in two_ranks["refusals"]:
        patterns = (
            r"ValueError: scope must be 'local' inside no_sync\(\)",
            r"ValueError: penalty must neither remember gradients nor mix them .* inside no_sync\(\)",
            "ValueError: measure_cosine must be False under DistributedDataParallel",
        )
        for pattern, message in zip(patterns, messages, strict=True):
            assert message is not None, pattern
            assert re.match(pattern, message), message


@pytest.mark.parametrize("afterwards", [False, True], ids=["argument", "_set_static_graph"])
@pytest.mark.parametrize("name", STATIC)
def test_a_static_graph_with_local_perturbations(name: str, afterwards: bool, two_ranks: dict[str, list[Any]]) -> None:
    """Right, or an error in words; PyTorch's own is an internal assertion."""
    expected = expected_of("local")[name]
    for found in two_ranks[f"static, {name}, {afterwards}"]:
        if found["error"] is not None:
            assert re.match(r"(ValueError|RuntimeError): .*static_graph.*scope='global'", found["error"]), found["error"]
            assert not found["gradients"], "at the first step at the latest"
        else:
            assert len(found["gradients"]) == 2
            for gradient, right in zip(found["gradients"], expected, strict=True):
                assert_close(gradient, right)


@pytest.mark.parametrize("name", ["gsam", "friendly"])
def test_uneven_inputs_with_averages_of_our_own(name: str, two_ranks: dict[str, list[Any]]) -> None:
    """A rank that has joined shadows DDP's collectives and not the engine's: an error in words, on every rank, not an abort."""
    for error, _ in two_ranks[f"uneven, {name}"]:
        assert error is not None
        assert re.match(r"(ValueError|RuntimeError): .*join\(\)", error), error


def test_uneven_inputs_with_one_average_a_step(two_ranks: dict[str, list[Any]]) -> None:
    (first, second) = two_ranks["uneven, sam"]
    assert first[0] is None
    assert second[0] is None
    assert_close(first[1], second[1])
