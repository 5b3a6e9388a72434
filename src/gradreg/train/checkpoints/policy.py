"""When a run is saved: every few epochs or minutes, at its end, and on SIGTERM, SIGHUP or SIGINT."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from safetensors import SafetensorError

from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.checkpoints.save_and_load import TrainingState
from gradreg.train.configuration import CheckpointConfig
from gradreg.train.devices import Devices

_ASK_EVERY = 20
"""Steps between two agreements of several processes on whether to save, each of which costs an all-reduce."""

_SECOND_THOUGHTS = 2.0
"""Seconds after which another SIGINT counts as a second one."""

_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(BaseException):
    """The run was stopped by a signal, and has been saved.

    No ``Exception``, as ``KeyboardInterrupt`` is none: raised while an image is decoded, it would be taken for an unreadable image.

    Args:
        signal_number: the signal.
        step: optimizer steps done; None if the run had not begun, so that there was nothing to save.
    """

    def __init__(self, signal_number: int, step: int | None) -> None:
        when = "before it began" if step is None else f"after step {step}; all that was done is saved"
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {when}")
        self.signal_number = signal_number


class Saver:
    """Writes checkpoints when they are due.

    Args:
        checkpoints: where they go.
        config: when they are due.
        devices: the processes, which must agree on it.
    """

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig, devices: Devices) -> None:
        self.checkpoints = checkpoints
        self._config = config
        self._devices = devices
        self._saved_at = time.monotonic()
        self._signal = 0
        self._begun = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which SIGTERM, SIGHUP and SIGINT make the run save and stop; a second SIGINT some seconds later ends it immediately.

        A signal that is ignored, as ``nohup`` has SIGHUP ignored, stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _STOPPING}
        told_at = float("inf")

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal told_at
            # Launchers forward a signal that the terminal or the scheduler has already sent to every process: that counts once.
            if number == signal.SIGINT and time.monotonic() - told_at > _SECOND_THOUGHTS:
                raise KeyboardInterrupt
            self._signal = self._signal or number
            told_at = min(told_at, time.monotonic())
            if not self._begun and self._devices.processes == 1:  # reading the data may take longer than a scheduler waits
                raise Stopped(number, None)

        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin(self) -> None:
        """From now on there is something to save: a signal waits for the end of the step."""
        self._begun = True
        if self._signal and self._devices.processes == 1:
            raise Stopped(self._signal, None)

    def after_step(self, state: TrainingState) -> None:
        """Save if it is due by the clock or the run must stop.

        Raises:
            Stopped: after saving a run that a signal stopped.
        """
        step = state.regularizer.step
        if self._devices.processes > 1 and step % _ASK_EVERY:
            return
        due = self._config.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self._config.every_minutes
        if self._devices.any(due or self._signal != 0):
            self._save(state)
            if self._devices.any(self._signal != 0):
                raise Stopped(self._signal or signal.SIGTERM, step)

    def after_epoch(self, state: TrainingState, *, last: bool) -> None:
        """Save if it is due by the number of epochs, or as the end of the run."""
        every = self._config.every_epochs
        if (last and self._config.final) or (every is not None and state.progress.epoch % every == 0):
            self._save(state)

    def _save(self, state: TrainingState) -> None:
        try:
            state.save(self.checkpoints, self._devices)
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have their own errors for a full disk
            raise OSError(
                f"the checkpoint of step {state.regularizer.step} could not be written to {str(self.checkpoints.folder)!r}: {error}. "
                "Earlier checkpoints are unchanged: free some space, and resume with gradreg train --resume."
            ) from error
        self._saved_at = time.monotonic()
