"""What a step costs in JAX: gradreg beside optax.contrib.sam, in units of two plain gradients.

Every variant is one jitted training step (gradient, SGD with momentum, new parameters). They take turns in one process, so that whatever
else the machine does hits all of them; the figure is the median over rounds of the ratio to "two plain gradients" in the same round. Beside
the clock's seconds stand the processor's, over all threads, which a busy machine disturbs less.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python benchmarks/jax_step_cost.py --rounds 20 --output benchmarks/results/jax_step_cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradreg
from gradreg.jax import value_and_grad
from rounds import interleaved, ratio_quartiles

RADIUS = 0.05
UNIT = "two plain gradients"


def mlp(params: Any, x: jax.Array) -> jax.Array:
    *hidden, (weight, bias) = params
    x = x.reshape(len(x), -1)
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def mlp_parameters(key: jax.Array) -> Any:
    sizes = [3072, 512, 512, 512, 10]
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o)) for k, i, o in pairs]


def cnn(params: Any, x: jax.Array) -> jax.Array:
    kernels, weight = params
    for kernel in kernels:
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x.mean((1, 2)) @ weight


def cnn_parameters(key: jax.Array) -> Any:
    channels = [3, 32, 64, 128]
    keys = jax.random.split(key, 4)
    pairs = zip(keys[:3], channels[:-1], channels[1:], strict=True)
    kernels = [jax.random.normal(k, (3, 3, i, o)) * (2 / (9 * i)) ** 0.5 for k, i, o in pairs]
    return kernels, jax.random.normal(keys[3], (128, 10)) / 12


def vit(params: Any, x: jax.Array) -> jax.Array:
    """Patches of 4 × 4, four heads of 32, layer normalization before each half of a block."""
    patches = x.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 64, 48)
    x = patches @ params["embed"] + params["position"]
    for block in params["blocks"]:
        q, k, v = jnp.moveaxis((_normalized(x) @ block["qkv"]).reshape(*x.shape[:2], 3, 4, 32), 2, 0)
        x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(_normalized(x) @ block["up"]) @ block["down"]
    return _normalized(x).mean(1) @ params["head"]


def _normalized(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, axis=-1)


def vit_parameters(key: jax.Array) -> Any:
    def matrix(i: int, o: int) -> jax.Array:
        nonlocal key
        key, drawn = jax.random.split(key)
        return jax.random.normal(drawn, (i, o)) / i**0.5

    blocks = [{"qkv": matrix(128, 384), "out": matrix(128, 128), "up": matrix(128, 512), "down": matrix(512, 128)} for _ in range(4)]
    return {"embed": matrix(48, 128), "position": matrix(64, 128) * 0.02, "blocks": blocks, "head": matrix(128, 10)}


CASES: dict[str, tuple[Any, Any, int]] = {
    "MLP 3072-512-512-512-10, batch 128": (mlp, mlp_parameters, 128),
    "CNN 32-64-128, 32 px, batch 64": (cnn, cnn_parameters, 64),
    "ViT 4 blocks of width 128, 64 patches, batch 16": (vit, vit_parameters, 16),
}

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def variants(model: Any, batch: tuple[jax.Array, jax.Array], params: Any) -> dict[str, tuple[Step, Any, int]]:
    """Name -> (jitted step, optimizer state, calls that make up one step)."""
    x, y = batch
    sgd = optax.sgd(0.01, momentum=0.9)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean()

    plain = jax.grad(loss)

    def trained(gradient: Callable[[Any, jax.Array], Any]) -> tuple[Step, Any, int]:
        def step(params: Any, state: Any, number: jax.Array) -> tuple[Any, Any]:
            updates, state = sgd.update(gradient(params, number), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step), sgd.init(params), 1

    def two(params: Any, number: jax.Array) -> Any:
        first = plain(params, x, y)
        # The second must not run beside the first nor be merged with it: its batch waits for what backpropagation reaches last.
        waited = x[::-1] + 0.0 * jax.tree.leaves(first)[0].ravel()[0]
        return jax.tree.map(lambda a, b: 0.5 * (a + b), first, plain(params, waited, y[::-1]))

    def ours(penalty: gradreg.GradientPenalty, **options: Any) -> tuple[Step, Any, int]:
        oracle = value_and_grad(loss, penalty, **options)
        return trained(lambda params, number: oracle(params, x, y, step=number)[1])

    def optax_sam(*, opaque: bool) -> tuple[Step, Any, int]:
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
        optimizer = optax.contrib.sam(sgd, ascent, sync_period=2, opaque_mode=opaque)

        def step(params: Any, state: Any, number: jax.Array) -> tuple[Any, Any]:
            extra = {"grad_fn": lambda at, _: plain(at, x, y)} if opaque else {}
            updates, state = optimizer.update(plain(params, x, y), state, params, **extra)
            return optax.apply_updates(params, updates), state

        return jax.jit(step), optimizer.init(params), 1 if opaque else 2

    late = gradreg.sam(rho=RADIUS).warmup("zero", steps=1_000_000_000)
    early = gradreg.sam(rho=RADIUS).warmup("zero", steps=1)
    return {
        UNIT: trained(two),
        "one plain gradient": trained(lambda params, number: plain(params, x, y)),
        "gradreg SAM": ours(gradreg.sam(rho=RADIUS)),
        "gradreg GNP, alpha 0.8": ours(gradreg.gnp(r=RADIUS, alpha=0.8)),
        "gradreg F-GR, gamma 0.5 epsilon": ours(gradreg.fgr(gamma=RADIUS / 2, epsilon=RADIUS)),
        "gradreg SAM, zero-warm-up over": ours(early),
        "gradreg SAM, in its zero-warm-up": ours(late),
        'the same, over, branch="cond"': ours(early, branch="cond"),
        'the same, in it, branch="cond"': ours(late, branch="cond"),
        'the same, over, branch="select"': ours(early, branch="select"),
        'the same, in it, branch="select"': ours(late, branch="select"),
        "gradreg C-GR": ours(gradreg.cgr(gamma=RADIUS, epsilon=RADIUS)),
        "gradreg exact": ours(gradreg.exact(gamma=RADIUS)),
        "optax.contrib.sam, opaque": optax_sam(opaque=True),
        "optax.contrib.sam, transparent": optax_sam(opaque=False),
    }


def measure(name: str, rounds: int) -> dict[str, Any]:
    model, parameters, size = CASES[name]
    key = jax.random.key(0)
    params = parameters(key)
    batch = jax.random.normal(key, (size, 32, 32, 3)), jax.random.randint(key, (size,), 0, 10)
    candidates = {variant: timed(*made, params) for variant, made in variants(model, batch, params).items()}
    interleaved(candidates, range(3))  # compiles
    found = interleaved(candidates, range(rounds))
    seconds, processor = ({variant: [both[i] for both in own] for variant, own in found.items()} for i in range(2))
    return {
        f"milliseconds of {UNIT}": round(1e3 * statistics.median(seconds[UNIT]), 3),
        f"ratio to {UNIT}": _ratios(seconds),
        "ratio in processor time": _ratios(processor),
    }


def timed(step: Step, state: Any, calls: int, params: Any) -> Callable[[], tuple[float, float]]:
    """A function that trains for one step and returns its seconds, by the wall's clock and by the processor's."""
    at, number = (params, state), 0

    def train() -> tuple[float, float]:
        nonlocal at, number
        number += 1
        begin, begin_processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            at = step(*at, jnp.int32(number))
        jax.block_until_ready(at)
        return time.perf_counter() - begin, time.process_time() - begin_processor

    return train


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    return {variant: round(ratio_quartiles(own, times[UNIT])[1], 3) for variant, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, help="where to store the result as JSON")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "rounds": arguments.rounds,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "optax")},
        "models": {},
    }
    for name in CASES:
        measured = result["models"][name] = measure(name, arguments.rounds)
        print(f"{name}: {UNIT} take {measured[f'milliseconds of {UNIT}']} ms")
        for variant, ratio in measured[f"ratio to {UNIT}"].items():
            print(f"  {ratio:6.3f}  {measured['ratio in processor time'][variant]:6.3f}  {variant}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
