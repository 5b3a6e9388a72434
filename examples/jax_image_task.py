"""CIFAR-10 in JAX: a WideResNet or a ViT in Flax NNX, trained by optax, compared by gradreg.

    gradreg compare examples/jax_image_task.py --penalties none gnp:r=0.1,alpha=0.8 sam:rho=0.1 --root DATA --seeds 3
    gradreg compare examples/jax_image_task.py --model vit --root DATA --penalties none 'gnp:r=0.1,alpha=1,warmup={kind: zero, steps: 200}'

The settings are those of the recipes wideresnet-cifar and vit-cifar-warmup, made smaller for a CPU. Images come from the data pipeline of
``gradreg train``, with its augmentation, and enter JAX without a copy. ``--devices 8`` divides every batch among as many devices; on a CPU
XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradreg import study
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.loader import load


class Block(nnx.Module):
    """Normalization, ReLU and convolution, twice, beside a shortcut."""

    def __init__(self, incoming, outgoing, stride, rngs):
        def convolution(incoming, size, stride):
            init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
            return nnx.Conv(
                incoming, outgoing, (size, size), strides=stride, padding=size // 2, use_bias=False, kernel_init=init, rngs=rngs
            )

        self.norms = nnx.List([nnx.BatchNorm(channels, momentum=0.9, rngs=rngs) for channels in (incoming, outgoing)])
        self.convolutions = nnx.List([convolution(incoming, 3, stride), convolution(outgoing, 3, 1)])
        self.projection = None if incoming == outgoing else convolution(incoming, 1, stride)

    def __call__(self, x):
        activated = nnx.relu(self.norms[0](x))
        shortcut = x if self.projection is None else self.projection(activated)
        return shortcut + self.convolutions[1](nnx.relu(self.norms[1](self.convolutions[0](activated))))


class WideResNet(nnx.Module):
    """WRN-depth-width, as gradreg.train.models.wide_resnet has it in PyTorch."""

    def __init__(self, depth, width, rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.stem = nnx.Conv(3, 16, (3, 3), padding=1, use_bias=False, kernel_init=init, rngs=rngs)
        self.blocks, channels = nnx.List(), 16
        for group, outgoing in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                self.blocks.append(Block(channels, outgoing, 2 if group and not i else 1, rngs))
                channels = outgoing
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        bound = 1 / math.sqrt(channels)
        self.head = nnx.Linear(channels, 10, kernel_init=uniform(bound), bias_init=uniform(bound), rngs=rngs)

    def __call__(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


def uniform(bound):
    """PyTorch's default: uniform between -bound and bound."""
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


class Layer(nnx.Module):
    """Attention and a perceptron, each behind normalization and beside the identity."""

    def __init__(self, width, heads, rngs):
        init = nnx.initializers.truncated_normal(0.02)
        self.norms = nnx.List([nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, kernel_init=init, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.out(nnx.gelu(self.hidden(self.norms[1](x)), approximate=False))


class VisionTransformer(nnx.Module):
    """Patches of 4 pixels, a class token, learned positions: timm's, with its initialization."""

    def __init__(self, depth, width, heads, side, rngs):
        init = nnx.initializers.truncated_normal(0.02)
        self.patches = nnx.Conv(3, width, (4, 4), strides=4, padding="VALID", kernel_init=init, rngs=rngs)
        self.token = nnx.Param(1e-6 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.position = nnx.Param(init(rngs.params(), (1, (side // 4) ** 2 + 1, width)))
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(width, 10, kernel_init=init, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images).reshape(len(images), -1, self.token.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1])), x], axis=1) + self.position[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def cosine(peak, steps, warmup):
    """From 0 to the peak in the warm-up, then half a cosine to 0 at the end: the schedule of ``gradreg train``."""

    def at(step):
        return jnp.where(step < warmup, peak * step / max(warmup, 1), peak * 0.5 * (1 + jnp.cos(math.pi * step / steps)))

    return at


@study.task(metric="accuracy")
def train(
    run: study.Run,
    *,
    model: str = "wrn",
    root: str = "data",
    train_size: int = 2000,
    validation: int = 0,
    test_size: int = 2000,
    image_size: int = 32,
    epochs: int = 10,
    batch_size: int = 100,
    lr: float = 0.0,
    warmup_epochs: int = 0,
    depth: int = 0,
    width: int = 0,
    heads: int = 2,
    devices: int = 1,
) -> None:
    """CIFAR-10 by a small WideResNet (``--model wrn``) or ViT (``--model vit``)."""
    if model not in ("wrn", "vit"):
        raise ValueError(f"model must be wrn or vit; got {model!r}.")
    # Images are decoded in this process: JAX has threads, and a process with threads must not fork.
    shapes = {"train_size": train_size, "validation": validation or None, "test_size": test_size, "image_size": image_size}
    data = load(
        DataConfig(name="cifar10", root=root, workers=0, **shapes),
        AugmentationConfig(flip=True, crop_padding=4),
        seed=run.seed,
        device=torch.device("cpu"),
    )
    rngs = nnx.Rngs(run.seed)
    if model == "wrn":
        network, l2 = WideResNet(depth or 10, width or 1, rngs), 1e-3
    else:
        network, l2 = VisionTransformer(depth or 4, width or 64, heads, image_size, rngs), 0.0
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def loss(params, rest, images, labels):
        network = nnx.merge(graph, params, rest, copy=True)
        network.train()
        value = optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()
        if l2:  # over all parameters, inside the loss, as the GNP repository has it: the penalty sees it
            value += l2 / 2 * optax.tree.norm(params, squared=True)
        return value, nnx.state(network, nnx.Not(nnx.Param))

    length, epochs_run = math.ceil(len(data.train) / batch_size), run.epochs(epochs)
    schedule = cosine(lr or {"wrn": 0.1, "vit": 1e-3}[model], length * run.total_epochs, length * warmup_epochs)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0),  # clips the regularized gradient, once
        optax.sgd(schedule, momentum=0.9, nesterov=True) if model == "wrn" else optax.adamw(schedule, weight_decay=0.3),
    )
    regularized = run.value_and_grad(loss, has_aux=True, state=True, total_steps=length * run.total_epochs)

    @jax.jit
    def update(params, rest, moments, memory, step, images, labels):
        images = images.transpose(0, 2, 3, 1)  # of PyTorch's order
        (value, rest), gradients, memory = regularized(params, rest, images, labels, state=memory, step=step)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), rest, moments, memory, value

    @jax.jit
    def right(params, rest, images, labels):
        network = nnx.merge(graph, params, rest, copy=True)
        network.eval()
        return (network(images.transpose(0, 2, 3, 1)).argmax(-1) == labels).sum()

    # The same program for any number of devices: parameters on all, a part of every batch on each. XLA sums the gradients, and BatchNorm
    # takes its means over the whole batch.
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def placed(batch):
        divided = parts if batch.size % devices == 0 else whole
        return [jax.device_put(jnp.from_dlpack(tensor.contiguous()), divided) for tensor in (batch.images, batch.labels)]

    def share(samples):
        count = sum(right(params, rest, *placed(batch)) for batch in samples.batches(1000))
        return float(count) / len(samples)

    params, rest = jax.device_put((params, rest), whole)
    moments, memory = jax.device_put((optimizer.init(params), regularized.init(params)), whole)
    step = 0
    for epoch in epochs_run:
        losses, batches = [], data.train.batches(epoch + 1, batch_size)
        for _, batch in zip(run.steps(length), batches, strict=True):  # inside jit the steps cannot be seen: this declares them
            params, rest, moments, memory, value = update(params, rest, moments, memory, step, *placed(batch))
            losses.append(value)
            step += 1
        held_out = {} if data.validation is None else {"validation_accuracy": share(data.validation)}
        run.log(loss=np.mean(jax.device_get(losses)), test_accuracy=share(data.test), **held_out)
