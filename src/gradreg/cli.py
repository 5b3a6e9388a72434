"""The command line: ``gradreg COMMAND ...``. Imports what a command needs only when it runs, so that help is immediate."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

COMMANDS: dict[str, tuple[str, str]] = {
    "compare": ("gradreg.study.command", "does a penalty help here, by how much, at what cost: train variants over seeds and report"),
    "tune": ("gradreg.study.tune_command", "which strength: search it beside plain training, and confirm the winners with fresh seeds"),
    "l2": ("gradreg.study.l2_command", "predict the best weight decay from a short run; the clock of weight decay"),
    "lab": ("gradreg.theory.command", "the theorems as experiments: diagonal networks, kernel decay, flooding, stability"),
    "train": ("gradreg.train.command", "train one recipe, with any key overridden, or resume an interrupted run"),
    "evaluate": ("gradreg.train.evaluate_command", "loss and accuracy of a trained run, on its data or others"),
    "sharpness": ("gradreg.train.sharpness_command", "curvature of trained runs: eigenvalue, trace, how far the loss rises; a diagnostic"),
    "recipes": ("gradreg.train.recipe_listing", "list the shipped recipes and the command for each"),
    "models": ("gradreg.train.models.listing", "list the models that a recipe can name, with sizes: gradreg models [PATTERN]"),
}
"""Command -> (module with ``main(argv) -> int``, one line of help)."""

TRACEBACK = "GRADREG_TRACEBACK"

_OF_STUDY = ("jinja2", "jsonargparse", "numpy", "plotly", "rich", "scipy", "yaml")
"""What the extra "study" installs, which is all that a study of a task of one's own needs beside its framework."""

_OF_STORES = ("fsspec", "s3fs", "gcsfs", "adlfs")
"""What a study at a URL needs, which the URL decides."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _take_any_text()
    try:
        return _run(argv)
    except BrokenPipeError as error:
        # Where nobody reads the output any more, the status is that of a command which the signal ends.
        return 128 + signal.SIGPIPE if _unread() else _fail(str(error))
    finally:
        _finish_output()


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from gradreg import __version__

        print(f"gradreg {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        from gradreg import checks

        return _fail(checks.unknown("command", name, COMMANDS))
    try:
        module = importlib.import_module(COMMANDS[name][0])
        return module.main(rest)
    except KeyboardInterrupt:
        print("gradreg: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if os.environ.get(TRACEBACK) or (error.name or "").startswith("gradreg"):
            raise
        package = (error.name or "").partition(".")[0]
        wanted = package if package in _OF_STORES else f"'gradreg[{_extra_with(error.name, name)}]'"
        return _fail(f"{name} needs the package {error.name!r}, which is not installed. Run: pip install {wanted}")
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(str(error))
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(f"{type(error).__name__}: {error} (set {TRACEBACK}=1 to see where)", status=1)


def _extra_with(package: str | None, command: str) -> str:
    """The extra that installs ``package`` for ``command``."""
    package = (package or "").partition(".")[0]
    if package in ("optuna", "sqlalchemy"):
        return "tune"
    if package in ("jax", "jaxlib", "optax"):
        return "jax"
    if command in ("compare", "tune") and package in _OF_STUDY:
        return "study"
    return "theory" if command == "lab" else "train"


def _fail(message: str, status: int = 2) -> int:
    from gradreg import checks

    print(f"gradreg: error: {checks.printable(message)}", file=sys.stderr)
    return status


_ASCII = {
    **{"±": "+-", "×": "x", "−": "-", "–": "-", "—": "-", "·": "*", "…": "...", "≥": ">=", "≤": "<=", "≠": "!=", "‖": "||", "√": "sqrt"},
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "η": "eta", "θ": "theta", "λ": "lambda", "μ": "mu"},
    **{"ρ": "rho", "σ": "sigma", "²": "^2", "→": "->", "←": "<-", "∇": "grad ", "✓": "yes"},
}


def _take_any_text() -> None:
    """Let standard output take text that its encoding lacks, such as ± on an ASCII terminal, in letters that it has."""
    codecs.register_error("gradreg", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="gradreg")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in missing), error.end


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # a stream without a descriptor, or none
        return False


def _finish_output() -> None:
    """Write what is still in the buffer; if that cannot be, keep the interpreter from trying again at its end."""
    stream: TextIO | None = sys.stdout
    try:
        if stream is not None:  # as it is where the descriptor is closed
            stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gradreg COMMAND ...",
            "",
            "Gradient regularization for PyTorch and JAX: SAM, GNP, F-GR and their family.",
            "",
            "commands:",
            *lines,
            "",
            "gradreg COMMAND --help explains a command and every key of its recipe.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
