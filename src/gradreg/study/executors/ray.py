"""``--executor ray``: each run is a task of Ray, on the cluster at an address, or on a Ray that is started on this machine."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradreg import checks
from gradreg.study.executors.executor import Ended, Executor, ExecutorError, OnShare, Session, Site, Work, option
from gradreg.study.executors.order import Orders, entry, imported

_SECONDS = 5.0
"""How long an address may take to answer."""
_AT_ONCE = 256
"""How many tasks are looked at in one call."""
_CODE = (".py", ".yaml", ".yml", ".toml")
"""Endings of what is sent of a task's own folder; ``working_dir`` sends all of one."""
_MOST = 2000
"""Files of code beyond which a folder is not taken for that of a task."""
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""The preface of HTTP/2 and an empty frame of settings, which gRPC answers with its own."""


@dataclass(frozen=True)
class RayExecutor(Executor):
    """Ray Core tasks. The package ``ray`` is needed: ``pip install 'gradreg[ray]'``.

    Args:
        address: "HOST:PORT" of the cluster's head, "auto" for the cluster that this machine belongs to, "ray://HOST:PORT" for a client from
            outside; None takes RAY_ADDRESS, or starts a Ray on this machine.
        run_cpus: cores of a run, > 0; also its threads.
        run_gpus: GPUs of a run, ≥ 0; 0.5 puts two runs on one.
        working_dir: the folder that is sent to the workers, in which they run; by default the code (Python and YAML) in that of the task's
            own file. "" sends none.
    """

    name: ClassVar[str] = "ray"
    address: str | None = option("--ray-address", "HOST:PORT of the cluster's head, or auto (a Ray started on this machine)")
    run_cpus: float = option("--run-cpus", "cores of a run, on Ray and Slurm (1)", default=1.0, kind=float)
    run_gpus: float = option("--run-gpus", "GPUs of a run, on Ray and Slurm; on Ray also a fraction (0)", default=0.0, kind=float)
    working_dir: str | None = option("--ray-working-dir", "folder that is sent to Ray's workers (the code in that of the task's file)")

    def __post_init__(self) -> None:
        checks.positive("run_cpus", self.run_cpus)
        if not (math.isfinite(self.run_gpus) and self.run_gpus >= 0):
            raise ValueError(f"run_gpus must be finite and >= 0; got {self.run_gpus}. Leave it out for none.")

    def at_a_time(self) -> int:
        with self._connected(None) as ray:
            found = ray.cluster_resources()
        room = found.get("CPU", 0.0) / self.run_cpus
        room = room if self.run_gpus == 0 else min(room, found.get("GPU", 0.0) / self.run_gpus)
        return max(1, int(room))

    def describe(self, count: int) -> str:
        gpus = f" and {self.run_gpus:g} GPUs" if self.run_gpus else ""
        return f"on Ray{'' if self.address is None else f' at {self.address}'}, {self.run_cpus:g} CPUs{gpus} each"

    @contextmanager
    def session(self, site: Site, on_share: OnShare) -> Generator[Session]:
        with self._connected(site) as ray:
            at_work = _Ray(ray, self, site, on_share)
            try:
                yield at_work
            finally:
                at_work.close()

    @contextmanager
    def _connected(self, site: Site | None) -> Generator[Any]:
        """A context with the package ``ray``, connected; left connected if it was before."""
        ray = imported("ray", extra="ray")
        if ray.is_initialized():
            yield ray
            return
        if self.address is not None and self.address not in ("auto", "local"):
            _check_address(self.address)
        with tempfile.TemporaryDirectory(prefix="gradreg-") as place:
            sent = self._sent(site, Path(place))
            environment = None if sent is None else {"working_dir": str(sent)}
            with _in_words(self.address):
                ray.init(address=self.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR", configure_logging=False)
        try:
            yield ray
        finally:
            ray.shutdown()

    def _sent(self, site: Site | None, place: Path) -> Path | None:
        """The folder that is sent: the one that was named, or the code of the task, copied into ``place``."""
        if self.working_dir is not None:
            return Path(self.working_dir) if self.working_dir else None
        if site is None or site.code is None:
            return None
        count = 0
        for folder, inside, names in os.walk(site.code):
            here = Path(folder)
            inside[:] = [one for one in inside if not one.startswith((".", "__")) and (here / one).resolve() != site.folder]
            for name in names:
                if not name.endswith(_CODE):
                    continue
                count += 1
                if count > _MOST:
                    raise ExecutorError(
                        f"the folder of the task must hold its code alone, to be sent to workers; got more than {_MOST} files of code "
                        f"in {str(site.code)!r}. Put the task into a folder of its own, or name one with --ray-working-dir."
                    )
                target = place / here.relative_to(site.code) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, target)
        return place


@contextmanager
def _in_words(address: str | None) -> Generator[None]:
    """A context in which Ray's errors of connecting are told in words."""
    try:
        yield
    except ConnectionError as error:
        raise ExecutorError(
            f"--ray-address must be of a running Ray; got {address!r}: {_first(error)}. Start one with ray start --head."
        ) from error
    except (Exception, SystemExit) as error:  # of a cluster that does not answer, too
        raise ExecutorError(f"Ray{'' if address is None else f' at {address}'} cannot be used: {_first(error)}") from error


class _Ray(Session):
    """Tasks of Ray."""

    def __init__(self, ray: Any, executor: RayExecutor, site: Site, on_share: OnShare) -> None:
        self._ray, self._on_share = ray, on_share
        self._orders = Orders(site, capture=True, threads=int(executor.run_cpus))
        self._task = ray.remote(num_cpus=executor.run_cpus, num_gpus=executor.run_gpus, max_retries=0)(entry())
        self._waiting: dict[Any, str] = {}
        self._queued: int | None = None
        _warn_of_lack(ray, executor)

    def submit(self, works: Sequence[Work]) -> None:
        for work in works:
            self._waiting[self._task.options(name=work.key).remote(self._orders.of(work))] = work.key

    def wait(self, seconds: float) -> list[Ended]:
        if not self._waiting:
            return []
        done, _ = self._ray.wait([*self._waiting], num_returns=min(len(self._waiting), _AT_ONCE), timeout=seconds)
        ended = [self._ended(one, self._waiting.pop(one)) for one in done]
        begun = self._orders.under_way(self._waiting.values(), self._on_share)
        if begun is not None:
            self._queued = len(self._waiting) - begun
        return ended

    def queued(self) -> int | None:
        return self._queued

    def close(self) -> None:
        """End what still runs."""
        for one in self._waiting:
            with contextlib.suppress(Exception):  # of a cluster that has ended
                self._ray.cancel(one, force=True)
        self._orders.close()

    def _ended(self, task: Any, key: str) -> Ended:
        errors = self._ray.exceptions
        try:
            return Ended(key, self._ray.get(task))
        except errors.OutOfMemoryError as error:
            return Ended(key, died=f"Ray ended it for lack of memory ({_first(error)})", lines=self._orders.written(key))
        except errors.WorkerCrashedError:
            return Ended(key, died="its process died", lines=self._orders.written(key))
        except (errors.NodeDiedError, errors.LocalRayletDiedError, errors.ObjectLostError) as error:
            return Ended(key, died=f"its node was lost ({_first(error)})", lines=self._orders.written(key), own=False)
        except errors.RuntimeEnvSetupError as error:
            raise ExecutorError(f"--ray-working-dir must be a folder that workers can be sent; {_first(error)}") from error
        except errors.RayTaskError as error:
            raise ExecutorError(f"a worker must be able to begin the run {key}; got {_first(error.cause or error)}") from error


def _check_address(address: str) -> None:
    """Raise ExecutorError unless something that speaks gRPC answers; Ray itself would try for a minute, and then end this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    refused = f"--ray-address must be of a running Ray; got {address!r}"
    if not host or not port.isdecimal():
        raise ExecutorError(f"{refused}, which is no HOST:PORT. Write 10.0.0.1:6379, say.")
    try:
        with socket.create_connection((host, int(port)), timeout=_SECONDS) as connection:
            connection.sendall(_HTTP2)
            connection.settimeout(_SECONDS)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ExecutorError(f"{refused}, where nobody answers: {error}. Start one with ray start --head.") from error
    if len(answer) < 4 or answer[3] != 4:  # of a frame of settings
        raise ExecutorError(f"{refused}, where something else answers. Take the port that ray start --head names.")


def _warn_of_lack(ray: Any, executor: RayExecutor) -> None:
    """Warn where no node has what a run needs, because Ray waits for one, which a cluster that grows by itself may add."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= executor.run_cpus and node.get("GPU", 0) >= executor.run_gpus for node in nodes):
        warnings.warn(
            f"no node of the cluster has the {executor.run_cpus:g} CPUs and {executor.run_gpus:g} GPUs that a run asks for: "
            "Ray waits for one",
            RuntimeWarning,
            stacklevel=2,
        )


def _first(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
