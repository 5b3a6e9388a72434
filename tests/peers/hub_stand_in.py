"""What TRL's tests download, made on the spot under the same names; and the pytest plugin that directs ``load_dataset`` to it.

    python tests/peers/hub_stand_in.py CHECKOUT FOLDER

TRL's checkout has the scripts with which its tiny models and data sets were made. They run here, with what they download in turn replaced:
a tokenizer is trained on the data sets, with the chat template that the installed TRL has for that family and the special tokens of all of
them; configurations and processors are those that transformers builds by default. What the scripts upload is saved: models in a cache of
the hub's layout, in which ``from_pretrained`` finds them by their names, data sets as Parquet files. So weights and token ids are not those
of the hub, nothing is downloaded, and nothing of what the tests test is replaced.

``GRADREG_HUB`` is that folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ORGANIZATION = "trl-internal-testing"
COMMIT = "0" * 40
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""For families for which TRL has no template."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What is common to the models whose names begin alike.

    Args:
        model: transformers' model type.
        template: TRL's chat template; "" for none, "plain" for one of our own.
        eos: end of a sequence, or of a turn.
        pad: padding.
        bos: begin of a sequence.
        image: the token that stands for an image, in models that see.
        patch: the size of a patch of an image, if it is not the default.
    """

    model: str
    template: str = "plain"
    eos: str = "</s>"
    pad: str | None = None
    bos: str | None = None
    image: str = ""
    patch: int | None = None


_qwen = functools.partial(Family, eos="<|im_end|>", pad="<|endoftext|>")
_sees = functools.partial(_qwen, image="<|image_pad|>")
_llama = functools.partial(Family, "llama", eos="<|eot_id|>", bos="<|begin_of_text|>")
_gemma = functools.partial(Family, eos="<eos>", pad="<pad>", bos="<bos>")
_cohere = functools.partial(Family, eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", bos="<BOS_TOKEN>")
_lfm = functools.partial(Family, "lfm2", eos="<|im_end|>", pad="<|pad|>", bos="<|startoftext|>")
FAMILIES = {
    "Qwen/Qwen2.5-VL": _sees("qwen2_5_vl", "qwen2_5_vl"),
    "Qwen/Qwen2-VL": _sees("qwen2_vl", "qwen2_5_vl"),
    "Qwen/Qwen3-VL": _sees("qwen3_vl", "qwen3_vl", patch=16),
    "Qwen/Qwen3.5-0.8B": _sees("qwen3_5", "qwen3_5_nothink", patch=16),
    "Qwen/Qwen3.5": _sees("qwen3_5", "qwen3_5_think", patch=16),
    "Qwen/Qwen3.6": _sees("qwen3_5_moe", "qwen3_6", patch=16),
    "Qwen/Qwen2.5": _qwen("qwen2", "qwen2_5"),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen("qwen3", "qwen3_instruct_2507"),
    "Qwen/Qwen3-30B-A3B": _qwen("qwen3_moe", "qwen3"),
    "Qwen/Qwen3": _qwen("qwen3", "qwen3"),
    "meta-llama/Meta-Llama-3-": _llama("llama3"),
    "meta-llama/Llama-3.1": _llama("llama3_1"),
    "meta-llama/Llama-3.2": _llama("llama3_2"),
    "mistralai/": Family("mistral", bos="<s>"),
    "openai/gpt-oss": Family("gpt_oss", "gptoss", eos="<|return|>", pad="<|endoftext|>", bos="<|startoftext|>"),
    "zai-org/GLM": Family("glm4_moe", "glm4moe", eos="<|endoftext|>", pad="<|endoftext|>"),
    "google/gemma-3": _gemma("gemma3", "gemma3", image="<image_soft_token>", patch=14),
    "google/gemma-2": _gemma("gemma2", "gemma"),
    "google/gemma-7b": _gemma("gemma", "gemma"),
    "CohereLabs/aya": _cohere("cohere", "cohere"),
    "CohereLabs/tiny-aya": _cohere("cohere2", "cohere2"),
    "LiquidAI/LFM2.5": _lfm("lfm2_2_5"),
    "LiquidAI/LFM2": _lfm("lfm2"),
    "microsoft/Phi-3.5": Family("phi3", "phi3_5", eos="<|endoftext|>", pad="<|endoftext|>"),
    "microsoft/Phi-3": Family("phi3", "phi3", eos="<|endoftext|>", pad="<|endoftext|>"),
    "deepseek-ai/": Family("deepseek_v3", "deepseekv3", eos="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>"),
    "nvidia/NVIDIA-Nemotron-3-Nano": _qwen("nemotron_h", "nemotron_3_nano"),
    "allenai/Olmo-3": _qwen("olmo3"),
    "EleutherAI/pythia": Family("gpt_neox", "", eos="<|endoftext|>"),
    "openai-community/gpt2": Family("gpt2", "", eos="<|endoftext|>"),
    "facebook/opt": Family("opt", "", pad="<pad>"),
}


def family(name: str) -> Family:
    """The family of a model of the hub."""
    for prefix, found in FAMILIES.items():
        if name.startswith(prefix):
            return found
    raise LookupError(f"{name} must begin like one of FAMILIES, which stand in for the hub")


def pytest_configure() -> None:
    """``load_dataset`` finds the data sets made here under their names."""
    import datasets

    plain, made = datasets.load_dataset, Path(os.environ["GRADREG_HUB"]) / "datasets"

    @functools.wraps(plain)
    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        return plain(str(made / path) if (made / path).is_dir() else path, *args, **kwargs)

    datasets.load_dataset = load_dataset


def make(checkout: Path, folder: Path) -> list[str]:
    """Run the scripts of the checkout; what they make is in ``folder``. Returns the scripts that did not succeed."""
    sys.path.insert(0, str(checkout / "scripts"))
    texts = _make_datasets(checkout, folder / "datasets")
    names = [f"{path.parent.name}.{path.stem}" for path in sorted((checkout / "scripts/generate_tiny_models").glob("for_*/*_*.py"))]
    names = [name for name in names if not name.endswith("__init__")]
    with _instead_of_the_hub(folder / "hub", Tokenizers(texts)):
        failed = [name for name in names if not _runs(name, quiet=True)]
        return [name for name in failed if not _runs(name, quiet=False)]  # those made from others come after them


def _runs(name: str, *, quiet: bool) -> bool:
    try:
        importlib.import_module(f"generate_tiny_models.{name}")
    except Exception:
        if not quiet:
            traceback.print_exc(limit=-2)
        return False
    return True


def _make_datasets(checkout: Path, folder: Path) -> list[str]:
    """Returns their texts."""
    from datasets import DatasetDict

    texts = list[str]()

    def save(data: DatasetDict, repo_id: str, config_name: str = "default", **_: Any) -> None:
        place = folder / repo_id / config_name
        place.mkdir(parents=True)
        for split, part in data.items():
            part.to_parquet(place / f"{split}.parquet")
            rows: list[dict[str, Any]] = list(part)
            texts.extend(str({name: value for name, value in row.items() if "image" not in name}) for row in rows)

    with patch.object(DatasetDict, "push_to_hub", save):
        for path in sorted((checkout / "scripts").glob("generate_*_dataset.py")):
            script = importlib.import_module(path.stem)
            script.main(**vars(dataclasses.replace(script.ScriptArguments(), push_to_hub=True)))
    for repository in folder.glob("*/*"):
        lines = ["---", "configs:"]
        for config in sorted(path.name for path in repository.iterdir()):
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in ("train", "test"):
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    return texts


class Tokenizers:
    """Tokenizers, configurations and processors by the names of the hub.

    Args:
        texts: what the vocabulary is made from.
    """

    def __init__(self, texts: list[str]) -> None:
        import trl
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.templates = Path(trl.__file__).parent / "chat_templates"
        found = re.findall(
            r"<\|[A-Za-z_]+\|>|<｜[^｜<]+｜>|<(?:start|end)_of_[a-z]+>", "".join(p.read_text() for p in self.templates.glob("*.jinja"))
        )
        named = [t for f in FAMILIES.values() for t in (f.eos, f.pad, f.bos, f.image) if t]
        more = ["<end_of_image>", "<|video_pad|>", "<|finetune_right_pad_id|>", "<|audio|>"]
        words: Any = Tokenizer(models.BPE())
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        words.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=2000,
                special_tokens=sorted({*found, *named, *more}),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        self.words = words

    def tokenizer(self, name: str, **_: Any) -> Any:
        """In place of ``AutoTokenizer.from_pretrained``."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        its = family(name)
        more = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": its.image} if its.model == "gemma3" else {}
        words = Tokenizer.from_str(self.words.to_str())
        made = PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token=its.eos, pad_token=its.pad, bos_token=its.bos, extra_special_tokens=more
        )
        made.chat_template = self.template(its)
        return made

    def template(self, its: Family) -> str | None:
        """The chat template."""
        if its.template in ("", "plain"):
            return PLAIN if its.template else None
        return (self.templates / f"{its.template}.jinja").read_text()

    def configuration(self, name: str, **options: Any) -> Any:
        """In place of ``AutoConfig.from_pretrained``."""
        from transformers import AutoConfig

        its, words = family(name), self.tokenizer(name)
        size = {"vocab_size": len(words)}
        if not its.image:
            return AutoConfig.for_model(its.model, **{**size, **options})
        tokens = {
            "image_token_id": its.image,
            "image_token_index": its.image,
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        }
        known = AutoConfig.for_model(its.model)
        ids = {key: words.convert_tokens_to_ids(token) for key, token in tokens.items() if key in known.to_dict()}
        vision = {**options.get("vision_config", {}), **({"patch_size": its.patch} if its.patch else {})}
        return AutoConfig.for_model(
            its.model, **{**options, **ids, "text_config": {**options.get("text_config", {}), **size}, "vision_config": vision}
        )

    def generation(self, name: str, **_: Any) -> Any:
        """In place of ``GenerationConfig.from_pretrained``."""
        from transformers import GenerationConfig

        words = self.tokenizer(name)
        return GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)

    def processor(self, name: str, **_: Any) -> Any:
        """In place of ``AutoProcessor.from_pretrained``."""
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
        from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

        its = family(name)
        patch = {"patch_size": its.patch} if its.patch and its.model in VIDEO_PROCESSOR_MAPPING_NAMES else {}
        parts = {"image_processor": _class(IMAGE_PROCESSOR_MAPPING_NAMES[its.model])(**patch), "tokenizer": self.tokenizer(name)}
        if its.model in VIDEO_PROCESSOR_MAPPING_NAMES:
            parts["video_processor"] = _class(VIDEO_PROCESSOR_MAPPING_NAMES[its.model])(**patch)
        return _class(PROCESSOR_MAPPING_NAMES[its.model])(**parts, chat_template=self.template(its))


def _class(names: Any) -> Any:
    """The class of transformers by its name, or by the first of its names."""
    import transformers

    if isinstance(names, dict):
        names = names.get("torchvision") or next(iter(names.values()))
    return getattr(transformers, names if isinstance(names, str) else next(name for name in reversed(names) if name))


@contextlib.contextmanager
def _instead_of_the_hub(folder: Path, parts: Tokenizers) -> Iterator[None]:
    """What the scripts for models download is made, and what they upload is saved."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

    def save(model: Any, tokenizer: Any, generation_config: Any, prefix: str = "", suffix: str | None = None, **_: Any) -> None:
        name = "-".join(part for part in (prefix, type(model).__name__, suffix) if part)
        place = folder / f"models--{ORGANIZATION}--{name}"
        words = getattr(tokenizer, "tokenizer", tokenizer)
        if words is not None and model.get_input_embeddings().num_embeddings > len(words):
            model.resize_token_embeddings(len(words))  # some scripts name the size of the hub's vocabulary, and ids in it
            model.config.pad_token_id, model.config.eos_token_id = words.pad_token_id, words.eos_token_id
        for part in (model, tokenizer, generation_config):
            if part is not None:
                part.save_pretrained(place / "snapshots" / COMMIT)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(COMMIT)

    def nothing(*_: Any) -> None:
        """They compare with the hub."""

    made: dict[Any, Callable[..., Any]] = {
        AutoConfig: parts.configuration,
        AutoProcessor: parts.processor,
        AutoTokenizer: parts.tokenizer,
        GenerationConfig: parts.generation,
    }
    common = importlib.import_module("generate_tiny_models._common")
    ours = {"push_to_hub": save, "check_transformers_version": nothing, "check_dtype_pattern": nothing, "print_config_diff": nothing}
    with contextlib.ExitStack() as stack:
        for which, how in made.items():
            stack.enter_context(patch.object(which, "from_pretrained", staticmethod(how)))
        stack.enter_context(patch.multiple(common, **ours))
        yield


if __name__ == "__main__":
    for left_out in make(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"not made: {left_out}")
