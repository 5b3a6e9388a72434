"""Digits with wrong labels, in Equinox and optax: the test accuracy with F-GR, after a warm-up of the penalty, and without.

python examples/equinox_digits.py --epochs 60 --seeds 3
"""

import argparse
import statistics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradreg
from gradreg.jax import value_and_grad

BATCH = 100


def digits(seed):
    """1,000 images to train on, 30 % of whose labels are drawn at random, and 797 to test on."""
    generator = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = generator.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    noisy = np.where(generator.random(1000) < 0.3, generator.integers(0, 10, 1000), y[:1000])
    return (x[:1000], noisy), (x[1000:], y[1000:])


def accuracy(penalty, *, epochs, seed):
    (x, y), (x_test, y_test) = digits(seed)
    steps = epochs * len(x) // BATCH
    model = eqx.nn.MLP(64, 10, width_size=256, depth=2, key=jax.random.key(seed))
    # The activation function inside the model is not a parameter, so only the arrays are passed.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9)
    state = optimizer.init(params)

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    regularized = value_and_grad(loss, penalty)

    @jax.jit
    def train(params, state, step, x, y):
        value, gradients = regularized(params, x, y, step=step)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    order = np.random.default_rng(seed)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            permutation = order.permutation(len(x))
        rows = permutation[step * BATCH % len(x) :][:BATCH]
        params, state, _ = train(params, state, step, x[rows], y[rows])
    return float(jnp.mean(logits(params, x_test).argmax(-1) == y_test))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    fgr = gradreg.fgr(gamma=0.5, epsilon=0.5)
    for name, penalty in {"no penalty": None, "F-GR": fgr, "F-GR after a zero-warm-up": fgr.warmup("zero", steps=50)}.items():
        found = [100 * accuracy(penalty, epochs=arguments.epochs, seed=seed) for seed in range(arguments.seeds)]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(f"{name}: test accuracy {statistics.mean(found):.2f}{spread} % over {len(found)} seeds")


if __name__ == "__main__":
    main()
