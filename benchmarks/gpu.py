"""What needs a GPU, as one command that stops within a time and resumes: costs of a step first, then the papers' accuracies.

    make results-gpu ROOT=DATA MINUTES=60
    python benchmarks/gpu.py --root DATA --minutes 60             # the same
    python benchmarks/gpu.py --dry-run --minutes 60               # what it would run, and what the minutes leave for later
    python benchmarks/gpu.py --root DATA --device cpu --tiny      # tries every entry at a size for a CPU; stores nothing that counts

Entries run in the order of their value; each is stored when it is complete, under benchmarks/results/gpu, comparisons under
benchmarks/results/papers, and what is stored is not run again. A comparison that the time ends saves its run, and goes on next time;
another entry is begun only if its own estimate fits, and is broken off, without a result, if that was too low.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradreg
import papers
import step_cost
import steps
from gradreg import files
from gradreg.torch import GradientRegularizer
from memory import peak_bytes
from paper_claims import ROOT
from paper_experiments import GPU, TINY, Comparison
from reporting import environment
from rounds import interleaved, lasting, ratio_quartiles

RESULTS = ROOT / "benchmarks" / "results" / "gpu"


@dataclass(frozen=True)
class Where:
    """Where an entry runs, and how large.

    Args:
        device: "cuda" or "cpu".
        root: folder of the data sets.
        tiny: sizes for a CPU, one or two steps of everything.
    """

    device: str = "cuda"
    root: str = ""
    tiny: bool = False


@dataclass(frozen=True)
class Entry:
    """One thing to run.

    Args:
        name: of its stored result.
        what: in words.
        minutes: about how many, on an H100.
        run: does it, and returns what is stored.
        comparison: in its place: a comparison, which resumes where it stopped.
    """

    name: str
    what: str
    minutes: float
    run: Callable[[Where], dict[str, Any]] | None = None
    comparison: Comparison | None = None

    @property
    def resumes(self) -> bool:
        """Whether a part of it is worth beginning."""
        return self.comparison is not None

    def file(self, results: Path) -> Path:
        """Where it is stored."""
        return (results.parent / "papers" if self.resumes else results) / f"{self.name}.json"


# The models that a step is measured on


class LanguageModel(nn.Module):
    """GPT-2's architecture: 124 million weights at its own size. Tokens to the mean loss of the next one."""

    def __init__(self, *, tiny: bool) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 32} if tiny else {}
        self.network = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False, **small))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, length) to logits (n · (length − 1), vocabulary)."""
        return self.network(tokens[:, :-1]).logits.flatten(0, 1)


def batch_of(name: str, where: Where) -> tuple[Callable[[], nn.Module], Tensor, Tensor, int]:
    """A model's constructor, inputs, targets, and samples of a step."""
    import timm

    device = torch.device(where.device)
    if name == "lm-125m":
        samples, length, vocabulary = (2, 8, 64) if where.tiny else (16, 1024, 50257)
        tokens = torch.randint(vocabulary, (samples, length), device=device)
        return partial(LanguageModel, tiny=where.tiny), tokens, tokens[:, 1:].flatten(), samples
    samples, side = (2, 32) if where.tiny else (128, 224)
    timms, smaller = {
        "resnet50": ("resnet10t" if where.tiny else "resnet50", {}),
        "vit-s": ("vit_small_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2} if where.tiny else {}),
    }[name]
    sized = {"img_size": side} if timms.startswith("vit") else {}
    x = torch.randn(samples, 3, side, side, device=device)
    return partial(timm.create_model, timms, **sized, **smaller), x, torch.randint(1000, (samples,), device=device), samples


EAGER: Mapping[str, dict[str, Any]] = {
    "fp32": {"precision": torch.float32},
    "bf16": {"precision": torch.bfloat16},
    "bf16, channels_last": {"precision": torch.bfloat16, "channels_last": True},
}
"""Way of running a model -> its precision, and its memory format where that is not PyTorch's own."""
COMPILED: Mapping[str, dict[str, Any]] = {
    "bf16, channels_last, compiled": {"precision": torch.bfloat16, "channels_last": True, "mode": "default"},
    "bf16, channels_last, CUDA graphs": {"precision": torch.bfloat16, "channels_last": True, "mode": "reduce-overhead"},
}
"""The same with the mode of torch.compile: every method compiles for itself, which takes longer than all of ``EAGER``."""


def step_of(name: str, build: steps.Build, way: Mapping[str, Any], where: Where) -> tuple[nn.Module, steps.Step]:
    """A model and a step of it, always on the same batch."""
    make, x, y, _ = batch_of(name, where)
    torch.manual_seed(0)
    model = make().to(where.device)
    if way.get("channels_last") and x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    called = torch.compile(model, mode=way["mode"]) if way.get("mode") else model
    update, kind = build(model), torch.device(where.device).type

    def loss() -> Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=way["precision"] == torch.bfloat16):
            outputs = called(x)
        return nn.functional.cross_entropy(outputs.float(), y)

    def step() -> None:
        if way.get("mode") == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        update(loss)

    return model, step


def step_costs(name: str, ways: Mapping[str, dict[str, Any]], where: Where) -> dict[str, Any]:
    """Time and memory of every method in each of ``ways`` that this model runs in."""
    device = torch.device(where.device)
    found: dict[str, Any] = {}
    for way, settings in ways.items():
        if way.endswith("channels_last") and batch_of(name, where)[1].dim() != 4:
            continue  # tokens have no channels
        running: dict[str, steps.Step] = {}
        peaks: dict[str, float] = {}
        failed: dict[str, str] = {}
        size = 1
        for method, build in step_cost.METHODS.items():
            try:
                model, step = step_of(name, build, settings, where)
                size = steps.size_of(model)
                peaks[method] = peak_bytes(step, device) / size
                running[method] = step
                for _ in range(1 if where.tiny else 4 if "mode" in settings else 2):  # graphs are captured in the third
                    step()
            except papers.OutOfTime:
                raise
            except Exception as error:  # double backprop through fused attention, say: that too is a result
                failed[method] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        clocked = {method: partial(steps._seconds, step, device, time.perf_counter) for method, step in running.items()}
        times = interleaved(clocked, range(1) if where.tiny else lasting(SECONDS, least=5))
        found[way] = {
            method: {
                "milliseconds": 1000 * sorted(own)[len(own) // 2],
                "ratio_to_two": ratio_quartiles(own, times["two"])[1] if "two" in times else None,
                "memory_over_plain": peaks[method] - peaks["plain"] if "plain" in peaks else None,
                "rounds": len(own),
            }
            for method, own in times.items()
        } | ({"failed": failed} if failed else {})
    return {"model": name, "samples": batch_of(name, where)[3], "ways": found}


def no_synchronization(where: Where) -> dict[str, Any]:
    """Every penalty for three steps, in which any synchronization of the device is an error."""
    penalties = {**step_cost.OURS, "B-GR": gradreg.bgr(gamma=0.05, epsilon=0.1), "ASAM": gradreg.asam(rho=1.0), "auto": gradreg.auto()}
    penalties |= {"friendly": gradreg.friendly_sam(rho=0.1), "LookSAM": gradreg.looksam(rho=0.1), "MSAM": gradreg.msam(rho=0.1)}
    device, found = torch.device(where.device), dict[str, str]()
    for name, penalty in penalties.items():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).to(device)
        x, y = torch.randn(8, 3, 16, 16, device=device), torch.randint(10, (8,), device=device)
        model(x)
        regularizer, optimizer = GradientRegularizer(model, penalty), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step(model=model, x=x, y=y, regularizer=regularizer, optimizer=optimizer) -> None:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            regularizer.backward(lambda: nn.functional.cross_entropy(model(x), y))
            optimizer.step()

        step()  # the first step finds out what the model writes
        try:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                step()
            found[name] = "none"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {"synchronizations": found}


def ended(words: Sequence[str]) -> None:
    """Run a command that must end well; if it is broken off, by SIGTERM too, with the processes that it has started."""
    told, started = False, None

    def end(*_: object) -> None:  # it must not raise, because the process may have begun and have no name here yet
        nonlocal told
        told = True
        if started is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(started, signal.SIGKILL)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            started = process.pid
            try:
                if told:
                    os.killpg(started, signal.SIGKILL)
                _, said = process.communicate()
            except BaseException:
                os.killpg(started, signal.SIGKILL)
                raise
    finally:
        started = None
        signal.signal(signal.SIGTERM, before)
    if told:
        raise SystemExit(128 + signal.SIGTERM)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {process.returncode}: {said[-2000:]}")


@contextmanager
def broken_off(clock: papers.Clock) -> Iterator[None]:
    """A context in which papers.OutOfTime is raised when the clock's time is over."""

    def over(*_: object) -> None:
        raise papers.OutOfTime("the minutes are over")

    if clock.left is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, max(clock.left, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def throughput(where: Where) -> dict[str, Any]:
    """benchmarks/training_throughput.py: images per second plain and with F-GR, and the share of the time in which kernels run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "throughput"
        tiny = ["--eager", "--model", "cnn_bn", "--train-size", "8", "--batch-size", "4", "--rounds", "1"] if where.tiny else []
        script = str(ROOT / "benchmarks" / "training_throughput.py")
        ended([sys.executable, script, "--root", where.root, "--device", where.device, "--out", str(out), *tiny])
        found = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return {**found, "command": "python benchmarks/training_throughput.py --root DATA"}


def sharded(where: Where) -> dict[str, Any]:
    """An epoch of ResNet-18 under FSDP2 on every GPU, by accelerate launch, plain and with F-GR; on a CPU two processes, by torchrun."""
    count = 2 if where.device == "cpu" else torch.cuda.device_count()
    if count < 2:
        return {"processes": count, "left out": "FSDP2 shards over two GPUs or more; this machine has one"}
    if where.device == "cpu":  # where accelerate launch would want MPI
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    else:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    tiny = ["--data.train_size", "8", "--data.test_size", "4", "--batch_size", "4", "--model", "{name: cnn_bn}"] if where.tiny else []
    found: dict[str, Any] = {"processes": count}
    for variant in ("none", "fgr"):
        with tempfile.TemporaryDirectory() as folder:
            words = ["-m", "gradreg", "train", "fgr-resnet-cifar10", "--variant", variant, "--parallel", "fsdp", "--epochs", "1"]
            words += [
                "--data.root",
                where.root,
                "--device",
                where.device,
                "--out",
                f"{folder}/run",
                *tiny,
            ]
            started = time.perf_counter()
            ended([*launch, *words])
            result = json.loads((Path(folder) / "run" / "result.json").read_text(encoding="utf-8"))
            found[variant] = {"seconds": time.perf_counter() - started, "test_accuracy": result["test_accuracy"]}
    return found


SECONDS = 15.0
"""For which a way's methods are timed in turn."""
STEPPED = {"resnet50": "ResNet-50", "vit-s": "ViT-S/16", "lm-125m": "a language model of 124 million weights"}
"""The models of ``batch_of``, in words."""
ENTRIES: tuple[Entry, ...] = (
    Entry("no-synchronization", "no device synchronization in a step of any penalty", 1, no_synchronization),
    *(
        Entry(f"step-cost-{name}", f"time and memory of a step of {what}: fp32, bf16, channels_last", 2, partial(step_costs, name, EAGER))
        for name, what in STEPPED.items()
    ),
    Entry("throughput", "images per second of WRN-28-10 with F-GR (>= 0.49 of plain), and the share of busy time", 10, throughput),
    *(
        Entry(f"step-cost-{name}-compiled", f"the same of {what}, compiled and with CUDA graphs", 6, partial(step_costs, name, COMPILED))
        for name, what in STEPPED.items()
    ),
    Entry("fsdp2", "an epoch under FSDP2 by accelerate launch", 5, sharded),
    *(Entry(one.name, one.shortened, 60 * one.hours, comparison=one) for one in GPU),
)


@dataclass(frozen=True)
class Planned:
    """What a plan says of an entry: "stored", "run", "begin", or "later"."""

    entry: Entry
    decision: str


def plan(entries: Sequence[Entry], minutes: float | None, results: Path) -> Iterator[Planned]:
    """What would run in so many minutes, in order.

    What is stored is not run. What fits, by its estimate, is; of what does not, a comparison is begun with the rest of the time.
    """
    left = float("inf") if minutes is None else minutes
    for entry in entries:
        if entry.file(results).is_file():
            yield Planned(entry, "stored")
        elif entry.minutes <= left:
            left -= entry.minutes
            yield Planned(entry, "run")
        elif entry.resumes and left > 0:
            left = 0
            yield Planned(entry, "begin")
        else:
            yield Planned(entry, "later")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder of the data sets")
    parser.add_argument("--minutes", type=float, help="stop within these; the same command goes on")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: one step or two of everything")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these entries")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run")
    parser.add_argument("--results", type=Path, help="where results go (benchmarks/results/gpu; with --tiny it must be given)")
    options = parser.parse_args(argv)
    if options.tiny and options.results is None and not options.dry_run:
        parser.error("--tiny needs --results, because its numbers mean nothing")
    results = options.results or RESULTS
    unknown = [name for name in options.only or () if name not in {entry.name for entry in ENTRIES}]
    if unknown:
        parser.error(f"--only must name entries; got {', '.join(unknown)}. --dry-run lists them.")
    chosen = [entry for entry in ENTRIES if options.only is None or entry.name in options.only]
    if options.dry_run:
        for planned in plan(chosen, options.minutes, results):
            print(f"{planned.decision:7} {planned.entry.name}: {planned.entry.what} (about {planned.entry.minutes:g} minutes)")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that PyTorch sees; got none. --device cpu --tiny tries every entry.")
    if not options.root:
        raise SystemExit("--root must name the folder of the data sets; got none.")
    warnings.filterwarnings("ignore", message="CUDA initialization")
    where, clock = Where(options.device, options.root, options.tiny), papers.Clock(options.minutes)
    failed: list[str] = []
    for entry in chosen:
        (planned,) = plan([entry], None if clock.left is None else clock.left / 60, results)
        print(f"{planned.decision}: {entry.name}", flush=True)
        if planned.decision not in ("run", "begin"):
            continue
        try:
            _run(entry, where, clock, results)
        except papers.OutOfTime:
            print(f"{entry.name}: stopped after {options.minutes:g} minutes; the same command goes on", flush=True)
            break
        except (Exception, SystemExit) as error:  # the others are worth their time all the same
            if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
                raise
            failed.append(entry.name)
            print(f"{entry.name} failed: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def _run(entry: Entry, where: Where, clock: papers.Clock, results: Path) -> None:
    if entry.comparison is not None:
        one = entry.comparison
        if where.tiny:
            one = replace(one, seeds=1, options={**one.options, **TINY, **one.tiny})
        one = replace(one, options={**one.options, "device": where.device})
        runs = results.parent / "runs" if where.tiny else papers.RUNS
        papers.compare(one, where.root, clock, None, entry.file(results).parent, runs=runs, packages=("torch", "timm"), threads=None)
        return
    assert entry.run is not None
    started = time.perf_counter()
    with broken_off(clock):
        found = entry.run(where)
    files.make_directory(results, purpose="--results")
    made = {"name": entry.name, "command": f"python benchmarks/gpu.py --root DATA --only {entry.name}"}
    content = {**made, "environment": environment(("torch", "timm"), torch.device(where.device)), "seconds": time.perf_counter() - started}
    files.write_json(entry.file(results), {**content, **found})


if __name__ == "__main__":
    sys.exit(main())
