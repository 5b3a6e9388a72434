"""The command line: ``gradreg COMMAND ...``. Imports what a command needs only when it runs, so that help is immediate."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "compare": ("gradreg.study.command", "does a penalty help here, by how much, at what cost: train variants over seeds and report"),
    "l2": ("gradreg.study.l2_command", "predict the best weight decay from a short run; the clock of weight decay"),
    "lab": ("gradreg.theory.command", "the theorems as experiments: diagonal networks, kernel decay, flooding, stability"),
    "train": ("gradreg.train.command", "train one recipe, with any key overridden, or resume an interrupted run"),
    "evaluate": ("gradreg.train.evaluate_command", "loss and accuracy of a trained run, on its data or others"),
    "recipes": ("gradreg.train.recipe_listing", "list the shipped recipes and the command for each"),
    "models": ("gradreg.train.models.listing", "list the models that a recipe can name, with sizes: gradreg models [PATTERN]"),
}
"""Command -> (module with ``main(argv) -> int``, one line of help)."""

TRACEBACK = "GRADREG_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
        return _fail(f"{name} needs the package {error.name!r}, which is not installed. Run: pip install 'gradreg[train]'")
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(str(error))
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(f"{type(error).__name__}: {error} (set {TRACEBACK}=1 to see where)", status=1)


def _fail(message: str, status: int = 2) -> int:
    print(f"gradreg: error: {message}", file=sys.stderr)
    return status


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
