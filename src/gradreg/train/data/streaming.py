"""Images decoded anew whenever they are wanted, by the worker processes of PyTorch's DataLoader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gradreg.train.data import draws, pools, samples
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.pools import Encoded
from gradreg.train.data.requests import Request

_PIECE = 256
"""Images that a worker decodes before it hands them over, where a whole set is read through."""


class StreamedImages:
    """The images of a set, decoded and transformed one by one in worker processes, and brought together on the device.

    Args:
        images: what is decoded.
        transform: a PIL image to uint8 of ``shape``.
        shape: (channels, height, width) of what comes out.
        workers: processes that decode; 0 for none beside this one.
        seed: of the transform's random numbers: they follow from it, the epoch and the image's position alone. None draws none.
        keep_workers: whether the workers stay from epoch to epoch. Then one epoch at a time can be read.
        device: where batches are wanted.
    """

    def __init__(
        self,
        images: Encoded,
        transform: Callable[..., Tensor],
        shape: tuple[int, int, int],
        *,
        workers: int,
        seed: int | None,
        keep_workers: bool,
        device: torch.device,
    ) -> None:
        self._device, self._wanted = device, _Wanted()
        decoding = _Decoding(images, transform, shape, seed)
        self._loader = _loader(decoding, self._wanted, workers, keep_workers=keep_workers, pinned=device.type == "cuda")

    def batches(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """See ``Images.batches``.

        Raises:
            Unreadable: an image cannot be decoded.
            RuntimeError: another epoch was begun before this one ended.
        """
        wanted = self._wanted.now = [_Piece(request.epoch, request.positions[request.rows].tolist()) for request in requests]
        loaded = iter(self._loader)
        while True:
            if self._wanted.now is not wanted:
                raise RuntimeError("an epoch of streamed images must be over before another begins, since one set of workers serves both.")
            batch = next(loaded, None)
            if batch is None:
                return
            yield _sound(batch).to(self._device, non_blocking=True)


def decode_all(images: Encoded, transform: Callable[..., Tensor], shape: tuple[int, int, int], *, workers: int) -> Tensor:
    """All of ``images``, transformed: uint8 (n, channels, height, width)."""
    pieces = _loader(_Decoding(images, transform, shape, seed=None), _everything(images), workers)
    return torch.cat([torch.empty(0, *shape, dtype=torch.uint8), *map(_sound, pieces)])


def first(images: Encoded, transform: Callable[..., Tensor]) -> Tensor:
    """The first of ``images``, transformed: uint8 (channels, height, width)."""
    return transform(pools.decoded(images, 0))


def only_readable(images: Encoded, *, workers: int) -> Encoded:
    """``images`` without those that cannot be decoded. All are tried, which takes part of the time of an epoch."""
    found = torch.cat([_sound(piece) for piece in _loader(_Trying(images), _everything(images), workers)])
    return images if bool(found.all()) else images.take(found.nonzero().squeeze(1))


def workers(config: DataConfig) -> int:
    """Processes that decode images: those asked for, or one a core that this process may use, at most 8."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


@dataclass(frozen=True)
class _Piece:
    """Which images a worker decodes at once: those at ``positions``, as they are drawn in ``epoch``."""

    epoch: int
    positions: list[int]


class _Wanted(Sampler[_Piece]):
    """What the workers are asked for next; replaced from epoch to epoch, while they go on."""

    def __init__(self) -> None:
        self.now: Sequence[_Piece] = []

    def __iter__(self) -> Iterator[_Piece]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class _Decoding(Dataset[Tensor | Exception]):
    """Images at the positions asked for, decoded, transformed and put together; or what went wrong, to be raised where it is seen."""

    def __init__(self, images: Encoded, transform: Callable[..., Tensor], shape: tuple[int, int, int], seed: int | None) -> None:
        self._images, self._transform, self._shape, self._seed = images, transform, torch.Size(shape), seed

    def __getitem__(self, wanted: _Piece) -> Tensor | Exception:
        out = torch.empty(len(wanted.positions), *self._shape, dtype=torch.uint8)
        try:
            with torch.random.fork_rng(devices=[]):  # without workers the run's own generator is used here
                for row, position in zip(out, wanted.positions, strict=True):
                    row.copy_(self._one(wanted.epoch, position))
        except ValueError as error:
            return error
        return out

    def _one(self, epoch: int, position: int) -> Tensor:
        if self._seed is not None:
            torch.default_generator.manual_seed(draws.seed_of(self._seed, epoch, position, draws.Purpose.IMAGE))
        image = self._transform(pools.decoded(self._images, position))
        if image.shape != self._shape:
            raise ValueError(samples.sizes_differ(f"image {self._images.describe(position)!r}", image, self._shape))
        return image


class _Trying(Dataset[Tensor]):
    """Whether the images at the positions asked for can be decoded."""

    def __init__(self, images: Encoded) -> None:
        self._images = images

    def __getitem__(self, wanted: _Piece) -> Tensor:
        return torch.tensor([pools.readable(self._images, position) for position in wanted.positions])


def _everything(images: Encoded) -> _Wanted:
    wanted = _Wanted()
    wanted.now = [_Piece(0, part.tolist()) for part in torch.arange(len(images)).split(_PIECE)]
    return wanted


def _loader(
    dataset: Dataset[Any], wanted: _Wanted, workers: int, *, keep_workers: bool = False, pinned: bool = False
) -> DataLoader[Tensor | Exception]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        persistent_workers=keep_workers and workers > 0,
        generator=torch.Generator(),  # a loader draws a seed for its workers, which must not come out of the run's own numbers
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _sound(batch: Tensor | Exception) -> Tensor:
    if isinstance(batch, Exception):
        # A copy: its own traceback would hold the frames that hold it, and with them the workers, until garbage is collected.
        raise type(batch)(*batch.args)
    return batch
