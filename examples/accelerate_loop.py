"""Accelerate's own loop with gradient regularization: accumulation, clipping, a schedule, mixed precision, and resuming.

    accelerate launch examples/accelerate_loop.py [--epochs 10] [--checkpoint folder]

No adapter is needed. One call replaces ``accelerator.backward``, at the end of each accumulation, so that one perturbation is made from the
whole gradient; the closures of the micro-batches wait for it in a list.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.torch import GradientRegularizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="a folder: resume from it if it exists, and save to it at the end")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    data = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)

    # After prepare(), because the regularizer must be built with the wrapped model.
    regularizer = GradientRegularizer(model, gradreg.fgr(gamma=0.3, epsilon=0.5))
    accelerator.register_for_checkpointing(regularizer)
    if options.checkpoint is not None and options.checkpoint.exists():
        accelerator.load_state(str(options.checkpoint))

    closures: list[Callable[[], Tensor]] = []
    mean = torch.zeros(())
    for _ in range(options.epochs):
        for images, digits in data:
            with accelerator.accumulate(model):

                def closure(images: Tensor = images, digits: Tensor = digits) -> Tensor:
                    return cross_entropy(model(images), digits)

                closures.append(closure)
                if accelerator.sync_gradients:
                    loss = regularizer.backward(closures, backward=accelerator.backward, scaler=accelerator.scaler)
                    mean = loss / len(closures)
                    closures.clear()
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    if options.checkpoint is not None:
        accelerator.save_state(str(options.checkpoint))
    model.eval()
    accuracy = (model(x[1000:].to(accelerator.device)).argmax(1).cpu() == y[1000:]).float().mean()
    accelerator.print(f"loss {mean:.3f}, test accuracy {accuracy:.3f} after {regularizer.step} regularized steps")


if __name__ == "__main__":
    main()
