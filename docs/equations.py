"""The equations of docstrings, which are written in letters, as mathematics for the site."""

from __future__ import annotations

import re

SYMBOLS = {
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "ε": r"\varepsilon ", "η": r"\eta ", "θ": r"\theta "},
    **{"λ": r"\lambda ", "μ": r"\mu ", "ξ": r"\xi ", "ρ": r"\rho ", "σ": r"\sigma "},
    "∇": r"\nabla ",
    "·": r"\,",
    "−": "-",
    "←": r"\leftarrow ",
    "ℓ": r"\ell ",
    "²": "^2",
    "₂": "_2",
}
"""What the constructors' equations are written with, in LaTeX."""


def mathematics(text: str) -> str:
    """An equation of a docstring, with words between ``...``, as displayed mathematics followed by the words that explain it.

    ``G = ∇L(θ + ρ·g/‖g‖)``, of the penalty ... becomes a block of ``$$``, a line for each equation; what is code stays code.
    """
    parts = re.split(r"``(.+?)``", text)  # words, equation, words, equation, ..., words
    if re.search(r"\w=", parts[1]):  # a call of Python's
        return text
    lines, rest = [latex(parts[1])], 2
    while rest < len(parts) - 1 and (joint := re.fullmatch(r",? ?(then|with|) ", parts[rest])):
        lines.append(rf"\text{{{joint[1]}}}\quad {latex(parts[rest + 1])}" if joint[1] else latex(parts[rest + 1]))
        rest += 2
    words = "".join(f"${latex(part)}$" if i % 2 else part for i, part in enumerate(parts[rest:])).lstrip(",: ")
    shown = "\n\n".join(f"$$\n{line}\n$$" for line in lines)
    return shown + (f"\n\n{words}." if words else "")


def latex(equation: str) -> str:
    """``ρ·g/‖g‖`` in LaTeX."""
    for bar, left, right in (("‖", r"\lVert ", r"\rVert "), ("|", r"\lvert ", r"\rvert ")):
        pieces = equation.split(bar)
        equation = "".join(piece + (("", left, right)[1 + i % 2] if i < len(pieces) - 1 else "") for i, piece in enumerate(pieces))
    equation = re.sub(r"√\(([^()]*)\)", r"\\sqrt{\1}", equation)
    equation = re.sub(
        r"(?<![\\A-Za-z])[A-Za-z]{2,}(?: [A-Za-z]+)*", lambda m: m[0] if m[0] in _FUNCTIONS else rf"\text{{{m[0]}}}", equation
    )
    equation = "".join(SYMBOLS.get(letter, letter) for letter in equation)
    if not equation.isascii():
        strange = ", ".join(sorted(set(equation) - set(map(chr, range(128)))))
        raise SystemExit(f"docs/tables.py: SYMBOLS must have every symbol of the penalties' equations; got {strange} in {equation!r}.")
    return equation.strip()


_FUNCTIONS = frozenset(("lVert", "rVert", "lvert", "rvert"))


def linked(text: str) -> str:
    """``arXiv 2010.01412`` as a link to the paper."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
