"""Images decoded again in every epoch, by the worker processes of PyTorch's DataLoader."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gradreg.environment import usable_cores
from gradreg.train.data import datasets
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.datasets import EncodedImages
from gradreg.train.data.sampler import BatchIndices, Purpose, seed_of

_CHUNK_SIZE = 256
"""Images that a worker decodes at a time when a whole set is read once."""


class StreamingLoader:
    """Loads images from their files: decoded and transformed one by one in worker processes, and stacked on the device.

    Args:
        images: to be decoded.
        transform: a PIL image to uint8 of ``shape``.
        shape: (channels, height, width) of the results.
        workers: processes that decode; 0 decodes in this process.
        seed: of the transform's random numbers, which depend only on it, the epoch and the image's position. None if it draws none.
        keep_workers: whether the workers stay from epoch to epoch. Then only one epoch can be read at a time.
        device: the device of the batches.
    """

    def __init__(
        self,
        images: EncodedImages,
        transform: Callable[..., Tensor],
        shape: tuple[int, int, int],
        *,
        workers: int,
        seed: int | None,
        keep_workers: bool,
        device: torch.device,
    ) -> None:
        self._device, self._chunks = device, _ChunkSampler()
        decoded = _DecodedImages(images, transform, shape, seed)
        self._loader = _data_loader(decoded, self._chunks, workers, keep_workers=keep_workers, pinned=device.type == "cuda")

    def batches(self, batches: Sequence[BatchIndices]) -> Iterator[Tensor]:
        """See ``loader.ImageLoader.batches``.

        Raises:
            UnreadableImage: an image cannot be decoded.
            RuntimeError: another epoch was started before this one ended.
        """
        chunks = self._chunks.current = [Chunk(indices.epoch, indices.selected.tolist()) for indices in batches]
        loaded = _started(self._loader)
        while True:
            if self._chunks.current is not chunks:
                raise RuntimeError("an epoch of streamed images must be over before another begins, since one set of workers serves both.")
            batch = next(loaded, None)
            if batch is None:
                return
            yield _raise_errors(batch).to(self._device, non_blocking=True)


class ChunkFetcher:
    """Fetches chunks of a data set of one's own, in worker processes or in this one.

    Args:
        dataset: gives the samples of a ``Chunk`` as a list.
        workers: processes that fetch; 0 fetches in this process.
        keep_workers: whether the workers stay from epoch to epoch. Then only one epoch can be read at a time.
    """

    def __init__(self, dataset: Any, *, workers: int, keep_workers: bool) -> None:
        self._dataset, self._workers, self._chunks = dataset, workers, _ChunkSampler()
        self._loader = _data_loader(dataset, self._chunks, workers, keep_workers=keep_workers) if workers else None

    def fetch(self, batches: Sequence[BatchIndices]) -> Iterator[list[Any]]:
        """The samples of each of ``batches``.

        Raises:
            RuntimeError: another epoch was started before this one ended.
        """
        chunks = [Chunk(indices.epoch, indices.selected.tolist()) for indices in batches]
        if self._loader is None:
            yield from (self._dataset[chunk] for chunk in chunks)
            return
        self._chunks.current = chunks
        loaded: Iterator[Any] = _started(self._loader)
        while True:
            if self._chunks.current is not chunks:
                raise RuntimeError("an epoch of samples must be over before another begins, since one set of workers serves both.")
            samples = next(loaded, None)
            if samples is None:
                return
            yield samples


def decode_all(images: EncodedImages, transform: Callable[..., Tensor], shape: tuple[int, int, int], *, workers: int) -> Tensor:
    """All of ``images``, transformed: uint8 (n, channels, height, width)."""
    chunks = _data_loader(_DecodedImages(images, transform, shape, seed=None), _all_chunks(images), workers)
    return torch.cat([torch.empty(0, *shape, dtype=torch.uint8), *map(_raise_errors, _started(chunks))])


def first(images: EncodedImages, transform: Callable[..., Tensor]) -> Tensor:
    """The first of ``images``, transformed: uint8 (channels, height, width)."""
    return transform(datasets.decode(images, 0))


def only_readable(images: EncodedImages, *, workers: int) -> EncodedImages:
    """``images`` without those that cannot be decoded. All are tried, which takes part of an epoch's time."""
    loader = _data_loader(_ReadableImages(images), _all_chunks(images), workers)
    found = torch.cat([_raise_errors(chunk) for chunk in _started(loader)])
    return images if bool(found.all()) else images.take(found.nonzero().squeeze(1))


def workers(config: DataConfig) -> int:
    """The number of processes that decode images: ``config.workers``, or one per core that this process may use, at most 8."""
    if config.workers is not None:
        return config.workers
    return min(8, usable_cores())


@dataclass(frozen=True)
class Chunk:
    """Images that a worker decodes at once: those at ``positions``, with the random numbers of ``epoch``."""

    epoch: int
    positions: list[int]


class _ChunkSampler(Sampler[Chunk]):
    """The chunks that the workers decode next; replaced for every epoch, while the workers stay."""

    def __init__(self, chunks: Sequence[Chunk] = ()) -> None:
        self.current = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)


class _DecodedImages(Dataset[Tensor | Exception]):
    """Chunks of images, decoded, transformed and stacked; or the error, returned so that it can be raised in the main process."""

    def __init__(self, images: EncodedImages, transform: Callable[..., Tensor], shape: tuple[int, int, int], seed: int | None) -> None:
        self._images, self._transform, self._shape, self._seed = images, transform, torch.Size(shape), seed

    def __getitem__(self, chunk: Chunk) -> Tensor | Exception:
        out = torch.empty(len(chunk.positions), *self._shape, dtype=torch.uint8)
        try:
            with torch.random.fork_rng(devices=[]):  # without workers this is the run's own generator
                for row, position in zip(out, chunk.positions, strict=True):
                    row.copy_(self._one(chunk.epoch, position))
        except ValueError as error:
            return error
        return out

    def _one(self, epoch: int, position: int) -> Tensor:
        if self._seed is not None:
            torch.default_generator.manual_seed(seed_of(self._seed, epoch, position, Purpose.IMAGE))
        image = self._transform(datasets.decode(self._images, position))
        if image.shape != self._shape:
            raise ValueError(datasets.size_mismatch(f"image {self._images.describe(position)!r}", image, self._shape))
        return image


class _ReadableImages(Dataset[Tensor]):
    """Whether the images of a chunk can be decoded."""

    def __init__(self, images: EncodedImages) -> None:
        self._images = images

    def __getitem__(self, chunk: Chunk) -> Tensor:
        return torch.tensor([datasets.is_readable(self._images, position) for position in chunk.positions])


def _all_chunks(images: EncodedImages) -> _ChunkSampler:
    return _ChunkSampler([Chunk(0, positions.tolist()) for positions in torch.arange(len(images)).split(_CHUNK_SIZE)])


def _data_loader(
    dataset: Dataset[Any], chunks: _ChunkSampler, workers: int, *, keep_workers: bool = False, pinned: bool = False
) -> DataLoader[Tensor | Exception]:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=chunks,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pinned,
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # a loader draws a seed for its workers, which must not come from the run's own generator
    )


def _started(loader: DataLoader[Tensor | Exception]) -> Iterator[Tensor | Exception]:
    """Iterate over ``loader``, whose workers leave signals to the run, which may get them with its whole group and needs their batches to
    end its step: they inherit that these signals are blocked, from their first instruction on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker: int) -> None:
    """In a worker: die when the run does, however that dies; PyTorch's own workers look every five seconds whether it is there."""
    if sys.platform == "linux":
        sys.excepthook = _unless_it_ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it died before this was asked for
            os._exit(1)


def _unless_it_ends(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """In a worker: tell an error that nothing caught, but not that of a connection to a run which is being killed.

    Its files are closed before this process gets the signal that ends it: the thread that hands over tensors would tell of it in between.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        time.sleep(1.0)
    sys.__excepthook__(kind, error, where)


def _identity(batch: Any) -> Any:
    return batch


def _raise_errors(batch: Tensor | Exception) -> Tensor:
    if isinstance(batch, Exception):
        # A copy: its own traceback would hold the frames that hold it, and with them the workers, until garbage is collected.
        raise type(batch)(*batch.args)
    return batch
