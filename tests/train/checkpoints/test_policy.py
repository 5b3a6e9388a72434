"""When signals stop a run: at once before it has begun, and after its step from then on."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from gradreg import cli
from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.checkpoints.policy import Saver, Stopped
from gradreg.train.configuration import CheckpointConfig, Config
from gradreg.train.data.datasets import ImageFiles
from gradreg.train.devices import Devices
from tests.train.data.cases import image_tree

STOPPING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture
def saver(tmp_path):
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}  # whatever the tests were started with
    yield Saver(Checkpoints(tmp_path, keep=1), CheckpointConfig(), Devices(Config(device="cpu", threads=1)))
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_before_the_run_has_begun_a_signal_ends_it_at_once(saver, number):
    with saver.listening(), pytest.raises(Stopped, match=f"stopped by {number.name} before it began"):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", STOPPING)
def test_from_then_on_it_waits_for_the_step(saver, number):
    with saver.listening():
        saver.begin()
        os.kill(os.getpid(), number)


def test_where_what_it_raised_was_lost_the_run_does_not_begin(saver):
    """As in a destructor, whose exceptions Python ignores."""
    with saver.listening():
        with contextlib.suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="before it began"):
            saver.begin()


def test_an_ignored_signal_stays_ignored(saver):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with saver.listening():
        os.kill(os.getpid(), signal.SIGHUP)
        saver.begin()


def test_a_signal_is_not_taken_for_an_image_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    image_tree(tmp_path / "images", {"train": 2, "val": 1})
    opened = ImageFiles.open

    def told_to_stop(self: ImageFiles, index: int):
        os.kill(os.getpid(), signal.SIGTERM)
        return opened(self, index)

    monkeypatch.setattr(ImageFiles, "open", told_to_stop)
    words = [
        "--data.name",
        "folder",
        "--data.root",
        str(tmp_path / "images"),
        "--data.train_size",
        "null",
        "--data.validation",
        "null",
        "--data.label_noise",
        "0",
    ]
    for corrupt in ("error", "skip"):
        more = ["--data.workers", "0", "--data.corrupt", corrupt, "--trackers", "[]", "--out", str(tmp_path / corrupt)]
        assert cli.main(["train", "digits-noisy-labels", *words, *more]) == 128 + signal.SIGTERM
        assert "stopped by SIGTERM before it began. Start it with the same command\n" in capsys.readouterr().out
        assert not (tmp_path / corrupt).exists()
