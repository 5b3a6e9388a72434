"""A Flax NNX classifier with batch normalization: digits, 30 % of whose training labels are wrong, judged by accuracy. No PyTorch.

gradreg compare examples/studies/nnx_digits.py --penalties none sam:rho=0.1 fgr:gamma=0.5,epsilon=0.5 --seeds 3
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from gradreg import study


class Network(nnx.Module):
    """Two layers with batch normalization between them."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x))))


@study.task(metric="accuracy")
def train(run: study.Run, *, epochs: int = 30, width: int = 128, lr: float = 0.05, batch_size: int = 50) -> None:
    """Digits with wrong labels: 800 to train on, 300 to select by, and the other 697 to test on."""
    generator = np.random.default_rng(run.seed)
    pixels, labels = load_digits(return_X_y=True)
    order = generator.permutation(len(pixels))
    x, y = (pixels[order] / 16).astype(np.float32), labels[order]
    noisy = np.where(generator.random(800) < 0.3, generator.integers(0, 10, 800), y[:800])

    model = Network(width, nnx.Rngs(run.seed))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean(), nnx.state(model, nnx.Not(nnx.Param))

    regularized = run.value_and_grad(loss, has_aux=True, state=True)
    optimizer = optax.sgd(lr, momentum=0.9)

    @jax.jit
    def update(params, rest, momentum, memory, step, x, y):
        (value, rest), gradients, memory = regularized(params, rest, x, y, state=memory, step=step)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), rest, momentum, memory, value

    @jax.jit
    def share(params, rest, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        model.eval()
        return (model(x).argmax(-1) == y).mean()

    momentum, memory, step = optimizer.init(params), regularized.init(params), 0
    for _ in run.epochs(epochs):
        losses, rows = [], generator.permutation(800).reshape(-1, batch_size)
        for i in run.steps(len(rows)):  # inside jit the steps cannot be seen: this declares them
            params, rest, momentum, memory, value = update(params, rest, momentum, memory, step, x[rows[i]], noisy[rows[i]])
            losses.append(value)
            step += 1
        run.log(
            loss=np.mean(losses),
            validation_accuracy=share(params, rest, x[800:1100], y[800:1100]),
            test_accuracy=share(params, rest, x[1100:], y[1100:]),
        )
