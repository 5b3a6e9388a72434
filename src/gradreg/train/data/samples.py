"""Data sets of one's own: any map-style data set, whose samples need not be images, collated into batches.

The order of the batches and the random numbers of a sample depend only on seed, epoch and position, as for images.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from gradreg import checks, own_code
from gradreg.own_code import Code
from gradreg.train.data import streaming
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.loader import Data
from gradreg.train.data.sampler import BatchIndices, BatchSampler, EpochOrder, Purpose, seed_of

SPLITS = ("train", "validation", "test")

_SUPPLIED = ("seed", "root")
"""Arguments that the function gets if it has parameters of these names."""


def check(config: DataConfig, code: Code | None) -> None:
    """Import the function that ``config.name`` names, and check its options.

    Raises:
        ValueError, TypeError: no such function, or options that do not fit it.
    """
    function = own_code.load(config.name, code, key="data.name")
    keys = set(asdict(config)) - set(_SUPPLIED)
    own_code.check_call(function, config.name, "split", key="data", options=config.options, supplied=_SUPPLIED, reserved=keys)
    if config.collate is not None:
        own_code.check_call(
            own_code.load(config.collate, code, key="data.collate"), config.collate, "samples", key="data.collate", options={}
        )


def training_samples(config: DataConfig, code: Code | None, *, seed: int) -> int:
    """How many samples are trained on; the training set is made to be counted, once in a process."""
    size = config.train_size
    if size is None:
        key = json.dumps([asdict(config), code], sort_keys=True, default=str)
        if key not in _counted:
            _counted[key] = _length(_made(config, code, "train", seed), config, "train")
        size = _counted[key]
    return size - config.validation_images(size)


_counted: dict[str, int] = {}


def load(
    config: DataConfig,
    *,
    code: Code | None,
    seed: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    kept_out: Callable[[int], int] = lambda samples: 0,
) -> Data:
    """The data sets that the function of ``config.name`` makes; the other arguments are those of ``loader.load``.

    Raises:
        ValueError, TypeError: what the function returns is no data set, or too small for the sizes wanted.
    """
    made = {split: _made(config, code, split, seed) for split in SPLITS}
    train, test = made["train"], made["test"]
    sizes = {split: _length(dataset, config, split) for split, dataset in made.items() if dataset is not None}
    if train is None:
        raise ValueError(f"{config.name}('train') must return a data set; got None.")
    if config.validation is not None and made["validation"] is not None:
        raise ValueError(
            f"data.validation must be null for {config.name!r} with validation samples of its own, {sizes['validation']}; got "
            f"{config.validation}. Leave it out, or return None for 'validation'."
        )
    generator = torch.Generator().manual_seed(seed if config.split_seed is None else config.split_seed)
    order = torch.randperm(sizes["train"], generator=generator)
    size = sizes["train"] if config.train_size is None else config.train_size
    if test is None and config.train_size is None:
        raise ValueError(
            f"{config.name}('test') must return a data set; got None. Or give data.train_size: the rest of the training samples is then "
            "the test set."
        )
    if size > sizes["train"] - (test is None):
        raise ValueError(
            f"data.train_size must be {'<' if test is None else '<='} {sizes['train']}, the samples of {config.name}('train'); got {size}."
        )
    held = config.validation_images(size)
    kept, aside, rest = order[: size - held], order[size - held : size], order[size:]
    tested = rest if test is None else torch.arange(sizes["test"])
    if config.test_size is not None:
        if config.test_size > len(tested):
            raise ValueError(f"data.test_size must be <= {len(tested)}, the test samples of {config.name!r}; got {config.test_size}.")
        tested = tested[torch.randperm(len(tested), generator=generator)[: config.test_size]]
    sampler = BatchSampler(rank, processes)
    collate = default_collate if config.collate is None else own_code.load(config.collate, code, key="data.collate")

    def batches(dataset: Any, positions: Tensor, *, train: bool = False) -> SampleBatches:
        samples = _Samples(dataset, positions, seed, _files(code))
        return SampleBatches(samples, collate, config, seed=seed, device=device, sampler=sampler, keep_workers=train)

    trained = len(kept) - kept_out(len(kept))
    kept, apart = kept[:trained], kept[trained:]
    training = batches(train, kept, train=True)
    validation = made["validation"]
    return Data(
        train=TrainingSamples(training),
        test=EvaluationSamples(batches(train if test is None else test, tested)),
        validation=EvaluationSamples(batches(validation, torch.arange(sizes["validation"])))
        if validation is not None
        else EvaluationSamples(batches(train, aside))
        if held
        else None,
        classes=_classes(train),
        image_shape=_image_shape(training.first()),
        in_memory=False,
        unaugmented=lambda n: EvaluationSamples(batches(train, kept[:n])),
        kept_out=TrainingSamples(batches(train, apart)) if len(apart) else None,
    )


@dataclass(frozen=True)
class SampleBatch:
    """One process's part of a batch of samples.

    Args:
        samples: n of them, as the data set returned them.
        collate: makes a batch of a list of samples.
        device: where its tensors go.
        name: of the data set, for errors.
        share: n over the samples of the whole batch in all processes.
        fewest: samples that every process has at least.
    """

    samples: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    device: torch.device
    name: str
    share: float
    fewest: int

    @property
    def size(self) -> int:
        """n."""
        return len(self.samples)

    def part(self, rows: slice, precision: str = "fp32") -> tuple[Any, Any]:
        """Inputs and targets of some samples: a collated pair is both, anything else is given whole to the model and to the loss.

        Raises:
            ValueError: samples that cannot be stacked.
        """
        try:
            batch = self.collate(list(self.samples[rows]))
        except (TypeError, RuntimeError, KeyError) as error:
            if self.collate is not default_collate:
                raise
            raise ValueError(
                f"the samples of {self.name!r} must be tensors, numbers, or lists and mappings of such, alike in shape, to be "
                f"stacked: {str(error).splitlines()[0]}. Write a function that makes a batch of a list of samples, and name it: "
                "collate: mine:collate."
            ) from error
        batch = _moved(batch, self.device, torch.float64 if precision == "fp64" else None)
        if isinstance(batch, (list, tuple)) and len(batch) == 2:
            return batch[0], batch[1]
        return batch, batch

    def labeled(self, precision: str = "fp32") -> tuple[Any, Any]:
        """All inputs and targets."""
        return self.part(slice(None), precision)


class SampleBatches:
    """Fetches samples in batches: in this process, or in ``data.workers`` others.

    Args:
        samples: of one set.
        collate: makes a batch of a list of them.
        config: the block ``data``.
        seed: of the order, and of the samples' own random numbers.
        device: the device of the batches.
        sampler: says which part of each batch is this process's.
        keep_workers: whether the workers stay from epoch to epoch.
    """

    def __init__(
        self,
        samples: _Samples,
        collate: Callable[[list[Any]], Any],
        config: DataConfig,
        *,
        seed: int,
        device: torch.device,
        sampler: BatchSampler,
        keep_workers: bool,
    ) -> None:
        self._samples, self._collate, self._name, self._device = samples, collate, config.name, device
        self.sampler: BatchSampler = sampler
        self.order: EpochOrder = EpochOrder(len(samples), seed=seed)
        self._fetcher = streaming.ChunkFetcher(samples, workers=config.workers or 0, keep_workers=keep_workers)

    def __len__(self) -> int:
        return len(self._samples)

    def first(self) -> Any:
        """The inputs of the first sample, as a model gets them but for the batch."""
        batch = SampleBatch(self._samples[streaming.Chunk(0, [0])], self._collate, torch.device("cpu"), self._name, 1.0, 1)
        return batch.labeled()[0]

    def batches(self, batches: Sequence[BatchIndices]) -> Iterator[SampleBatch]:
        """The samples of each batch."""
        for indices, samples in zip(batches, self._fetcher.fetch(batches), strict=True):
            yield SampleBatch(samples, self._collate, self._device, self._name, indices.share, indices.fewest)


class TrainingSamples:
    """Samples in a new order every epoch."""

    def __init__(self, batches: SampleBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        """Samples in an epoch, over all processes."""
        return len(self._batches)

    def batches(self, epoch: int, size: int, *, start: int = 0) -> Iterator[SampleBatch]:
        """See ``loader.TrainingSet.batches``."""
        order = self._batches.order(checks.whole("epoch", epoch, minimum=1))
        return self._batches.batches(self._batches.sampler.batches(order, size, epoch=epoch, start=start))


class EvaluationSamples:
    """Samples in a fixed order."""

    def __init__(self, batches: SampleBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        """Samples over all processes."""
        return len(self._batches)

    def batches(self, size: int) -> Iterator[SampleBatch]:
        """See ``loader.EvaluationSet.batches``."""
        batches = self._batches.sampler.batches(torch.arange(len(self)), size, epoch=0)
        return self._batches.batches([indices for indices in batches if indices.share])


class _Samples:
    """Chunks of samples of a data set, each with random numbers of its own.

    In a process that is not forked the files of one's own functions are imported before the data set is unpickled.
    """

    def __init__(self, dataset: Any, positions: Tensor, seed: int, files: Sequence[str]) -> None:
        self._dataset, self._positions, self._seed, self._files = dataset, positions.tolist(), seed, files

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, chunk: streaming.Chunk) -> list[Any]:
        held = random.getstate(), np.random.get_state()
        first = seed_of(self._seed, chunk.epoch, 0, Purpose.IMAGE)
        samples: list[Any] = []
        try:
            with torch.random.fork_rng(devices=[]):
                for position in chunk.positions:
                    _seed_all(first + 0x9E3779B97F4A7C15 * position)
                    samples.append(self._dataset[self._positions[position]])
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_dataset": pickle.dumps(self._dataset)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for file in state["_files"]:
            own_code.load_file(Path(file))
        vars(self).update({**state, "_dataset": pickle.loads(state["_dataset"])})


def _made(config: DataConfig, code: Code | None, split: str, seed: int) -> Any:
    """The data set of ``split``.

    Raises:
        ValueError: the function draws from global generators: its calls for two splits might then draw the same, or overlapping, samples.
    """
    function = own_code.load(config.name, code, key="data.name")
    given = {"seed": seed if config.split_seed is None else config.split_seed, "root": config.root}
    given = {name: value for name, value in given.items() if own_code.accepts(function, name)}
    before = _random_states()
    dataset = function(split, **{**given, **config.options})
    if _random_states() != before:
        raise ValueError(
            f"{config.name}({split!r}) must draw from a generator of its own, so that its splits are of the same draw and do not overlap; "
            "it drew from Python's, NumPy's or PyTorch's global one. Take a parameter seed, and use torch.Generator().manual_seed(seed) or "
            "numpy.random.default_rng(seed)."
        )
    if dataset is None:
        return None
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{config.name}({split!r}) must return a map-style data set, with samples by number and a length; got "
            f"{checks.describe(dataset)}. Read it into a list."
        )
    return dataset


def _length(dataset: Any, config: DataConfig, split: str) -> int:
    try:
        length = len(dataset)
    except TypeError as error:
        raise TypeError(
            f"{config.name}({split!r}) must return a data set with a length; got {checks.describe(dataset)}. Write def __len__(self): ..."
        ) from error
    if length < 1:
        raise ValueError(f"{config.name}({split!r}) must return at least one sample; got none. Return None for no validation samples.")
    return length


def _random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (name, np.asarray(keys).tobytes(), *rest)


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed % 2**63)
    random.seed(seed % 2**63)
    np.random.seed(seed % 2**32)


def _files(code: Code | None) -> list[str]:
    """The files that are imported under names of ours."""
    return [held["file"] for where, held in (code or {}).items() if where.endswith(".py") or "." not in where]


def _classes(dataset: Any) -> int | None:
    """How many classes the data set says that it has, in an attribute ``classes``: a number, or their names as torchvision has it."""
    found = getattr(dataset, "classes", None)
    if isinstance(found, int):
        return found
    return len(found) if isinstance(found, (list, tuple)) else None


def _image_shape(inputs: Any) -> tuple[int, int, int] | None:
    """The shape of the samples' inputs, if they are images."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return None
    _, channels, height, width = inputs.shape
    return channels, height, width


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """``value`` with its tensors on ``device``, those of floats in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _moved(part, device, dtype) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts: list[Any] = [_moved(part, device, dtype) for part in value]
        make: Any = type(value)
        return make(*parts) if hasattr(value, "_fields") else make(parts)
    movable: Any = value
    return movable.to(device) if hasattr(movable, "to") else movable
