"""An optax loop without a framework and without epochs: diabetes regressed by a network of plain arrays, judged by RMSE. No PyTorch.

gradreg compare examples/studies/optax_loop.py --penalties none sam:rho=0.1 fgr:gamma=0.5,epsilon=0.1 --seeds 3
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes

from gradreg import study

EVERY = 20
"""Steps between two looks at the metric."""


@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, steps: int = 400, width: int = 64, lr: float = 0.02, batch_size: int = 32) -> None:
    """Progression of diabetes, with a cosine schedule: 242 patients to train on, 100 to select by, 100 to test on."""
    generator = np.random.default_rng(run.seed)
    inputs, targets = load_diabetes(return_X_y=True)
    order = generator.permutation(len(inputs))
    x, y = inputs[order].astype(np.float32), targets[order].astype(np.float32)
    x, location, scale = (x - x[200:].mean(axis=0)) / x[200:].std(axis=0), y[200:].mean(), y[200:].std()
    y = (y - location) / scale

    widths = [x.shape[1], width, width, 1]
    params = [
        {"w": jnp.asarray(generator.normal(0, (2 / n) ** 0.5, (n, m)), jnp.float32), "b": jnp.zeros(m)}
        for n, m in itertools.pairwise(widths)
    ]

    def predict(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return (x @ params[-1]["w"] + params[-1]["b"])[:, 0]

    def loss(params, x, y):
        return jnp.mean((predict(params, x) - y) ** 2)

    regularized = run.value_and_grad(loss, state=True)
    rounds = run.steps(steps)
    optimizer = optax.sgd(optax.cosine_decay_schedule(lr, run.total_steps), momentum=0.9)

    @jax.jit
    def update(params, momentum, memory, step, x, y):
        value, gradients, memory = regularized(params, x, y, state=memory, step=step)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), momentum, memory, value

    @jax.jit
    def rmse(params, x, y):
        return scale * jnp.sqrt(loss(params, x, y))

    momentum, memory = optimizer.init(params), regularized.init(params)
    for step in rounds:
        rows = generator.choice(np.arange(200, len(x)), batch_size, replace=False)
        params, momentum, memory, value = update(params, momentum, memory, step, x[rows], y[rows])
        if (step + 1) % EVERY == 0 or step + 1 == run.total_steps:
            run.log(loss=value, validation_rmse=rmse(params, x[:100], y[:100]), test_rmse=rmse(params, x[100:200], y[100:200]))
