"""Data sets by name, in the layouts of those who publish them."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from .cases import joined, loaded


def fake_mnist(root: Path, train: int = 30, test: int = 12) -> None:
    """MNIST's four files with few images, each filled with its own class's grey."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = bytes(i % 10 for i in range(count))
        images = b"".join(bytes([20 * label]) * 784 for label in labels)
        for part, header in (("labels-idx1", struct.pack(">II", 2049, count)), ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28))):
            content = header + (labels if "labels" in part else images)
            (raw / f"{name}-{part}-ubyte").write_bytes(content)
            (raw / f"{name}-{part}-ubyte.gz").write_bytes(gzip.compress(content))


def test_mnist_keeps_its_own_test_set_and_scales_to_one(tmp_path):
    fake_mnist(tmp_path)
    sets = loaded(name="mnist", train_size=20, validation=5, root=str(tmp_path))
    assert sets.validation is not None
    assert (len(sets.train), len(sets.validation), len(sets.test), sets.classes) == (15, 5, 12, 10)
    for batch in (joined(sets.train.batches(1, 4)), joined(sets.validation.batches(5)), joined(sets.test.batches(5))):
        assert batch.images.shape[1:] == (1, 28, 28)
        torch.testing.assert_close(batch.images[:, 0, 3, 3], batch.labels * 20 / 255)
    assert len(loaded(name="mnist", root=str(tmp_path)).train) == 30
    with pytest.raises(ValueError, match=r"data.train_size must be <= 30, the images of 'mnist'; got 31\.$"):
        loaded(name="mnist", train_size=31, root=str(tmp_path))


def test_missing_files_are_named_and_not_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"data.root must hold MNIST, as .*; got .* let it be fetched with --data.download true"):
        loaded(name="mnist", train_size=10, root=str(tmp_path / "nowhere"))


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("GRADREG_DATA"), reason="needs the folder of data sets in $GRADREG_DATA")
def test_real_mnist_has_its_sixty_thousand_images():
    sets = loaded(name="mnist", root=os.environ["GRADREG_DATA"])
    assert (len(sets.train), len(sets.test)) == (60_000, 10_000)
    assert joined(sets.test.batches(10_000)).labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert joined(sets.train.batches(1, 60_000)).images.mean().item() == pytest.approx(0.1307, abs=1e-4)
