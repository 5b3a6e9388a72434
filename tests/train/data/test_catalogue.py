"""One record for each data set: complete, and in agreement with the files of its publishers where they are read."""

from __future__ import annotations

import pytest

from gradreg.train.data import readers
from gradreg.train.data.catalogue import SETS, all_records, known_set


@pytest.mark.parametrize("record", all_records(), ids=lambda record: record.name)
def test_a_record_is_whole(record):
    assert known_set(record.name) is record
    assert getattr(readers, record.reader.__name__) is record.reader
    assert record.layout
    assert (record.training_images is None) == (record.test_images is None)
    if record.image_shape is not None:
        channels = record.image_shape[0]
        assert (
            channels == 1 if record.normalization is None else len(record.normalization.mean) == len(record.normalization.std) == channels
        )
    assert 0 < record.evaluation_crop <= 1


def test_timms_sets_share_one_record_and_unknown_names_have_none():
    assert known_set("timm:hfds/food101") is known_set("timm:torch/mnist") is all_records()[-1]
    assert known_set("cifar-10") is None
    assert list(SETS) == [record.name for record in all_records()[:-1]]
