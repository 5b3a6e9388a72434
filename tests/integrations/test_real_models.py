"""Real models without a network: what the packages hold, the engine on MiniLM, and LoRA and rounding on SmolLM2."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradreg
from gradreg import study
from gradreg.evaluation import loss, rounded, rounded_loss
from gradreg.study.history import read_history
from gradreg.torch import GradientRegularizer

pytestmark = [pytest.mark.models, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"

STUDIES = {
    "minilm_testament": {"steps": 2, "train_size": 40, "held_out": 20},
    "smollm_lora": {"steps": 1, "batch_size": 1, "length": 16, "held_out": 2},
    "grpo_hacked_reward": {"steps": 1, "reading": 1, "held_out": 4, "batch_size": 8, "beta": 0.04},
}
"""The studies on real models, or on a text that a package ships, and options that make them short."""


@pytest.fixture(scope="module")
def real():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("real_models")


def test_the_text_and_its_passages(real):
    job = real.book("Job")
    assert job.startswith("There was a man in the land of Uz, whose name was Job;")
    assert job.endswith("So Job died, being old and full of days.")
    assert real.book("Revelation").endswith("Amen.")
    assert real.book("Romans").startswith("Paul, a servant of Jesus Christ")
    texts, testaments = real.passages(200, words=16, seed=3)
    assert sum(testaments) == 100
    assert len(set(texts)) == 200
    assert min(len(text.split()) for text in texts) >= 16
    assert texts != real.passages(200, words=16, seed=4)[0]
    assert (texts, testaments) == real.passages(200, words=16, seed=3)
    whole = "".join(real.book(name) for name in ("Matthew", "Mark", "Luke", "John", "Acts", "Romans"))
    new = [text for text, testament in zip(texts, testaments, strict=True) if testament == 1]
    assert sum(text in whole for text in new) > 50
    assert not any(text in whole for text, testament in zip(texts, testaments, strict=True) if testament == 0)
    with pytest.raises(ValueError, match="must be a book of the Bible; got 'Judith'"):
        real.book("Judith")
    assert not {"sentence_transformers", "llama_cpp", "llm"} & sys.modules.keys()


def test_minilm_knows_which_sentences_mean_the_same(real):
    model, tokens = real.minilm().eval(), real.minilm_tokenizer()

    @torch.no_grad()
    def embedded(text: str) -> Tensor:
        return nn.functional.normalize(model(**tokens(text, return_tensors="pt")).last_hidden_state.mean(1), dim=1)[0]

    king, ruler, bread = (embedded(text) for text in ("The king died.", "The ruler of the land is dead.", "Bread is made of flour."))
    assert king @ ruler > 0.6 > 0.3 > king @ bread


def test_sam_on_minilm_is_two_passes_by_hand(real):
    model, tokens = real.minilm(), real.minilm_tokenizer()  # in train mode: dropout must be the same in both passes
    model.embeddings.requires_grad_(False)
    batch = tokens(["In the beginning was the Word", "and the Word was with God"], padding=True, return_tensors="pt")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Tensor:
        return model(**batch).last_hidden_state.square().mean(1).mul(torch.linspace(-1, 1, 384)).sum()

    torch.manual_seed(0)
    GradientRegularizer(model, gradreg.sam(rho=0.05)).backward(closure)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    trained = {name: p for name, p in model.named_parameters() if name in found}
    torch.manual_seed(0)
    gradients = torch.autograd.grad(closure(), list(trained.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(trained.values(), gradients, strict=True):
            p.add_(0.05 * g / norm)
    torch.manual_seed(0)
    by_hand = torch.autograd.grad(closure(), list(trained.values()))
    error = torch.stack([(found[name] - g).norm() for name, g in zip(trained, by_hand, strict=True)]).norm()
    length = torch.stack([g.norm() for g in by_hand]).norm()
    moved = torch.stack([(g - plain).norm() for g, plain in zip(by_hand, gradients, strict=True)]).norm()
    assert error < 1e-4 * length
    assert moved > 1e-2 * length, "the radius changes the answer"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # by PEFT
def test_smollm_reads_learns_adapters_alone_and_comes_back_from_4_bits(real):
    from peft import LoraConfig, get_peft_model

    base, tokens = real.smollm(), real.smollm_tokenizer()
    assert sum(p.numel() for p in base.parameters()) == 134_515_008
    ids = torch.tensor([tokens("In the beginning God created the heaven and the earth.")["input_ids"]])

    def closure(model: nn.Module = base) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    plain = loss(base, closure)
    assert plain < 4.5  # guessing is log 49152 = 10.8
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    in_4_bits = rounded_loss(base, closure)
    assert plain != in_4_bits < 8.0
    with rounded(base) as names:
        assert len(names) == 30 * 7
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())

    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    regularizer = GradientRegularizer(model, gradreg.fgr(gamma=0.1, epsilon=0.1))
    regularizer.backward(lambda: closure(model))
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached
    assert all(".lora_" in name for name in reached)
    frozen = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_on_real_models_logs_its_metric_and_what_stands_beside(real, name: str, tmp_path: Path):
    found = study.compare(
        str(EXAMPLES / "studies" / f"{name}.py"),
        penalties=["none", "fgr:gamma=0.5,epsilon=0.5"],
        seeds=1,
        out=tmp_path,
        options=STUDIES[name],
        workers=0,
        rivals=["epochs"],
    )
    plain, own = (next(r for r in found.records if r.variant == row.variant) for row in found.rows)
    assert (plain.error, own.error) == (None, None)
    assert own.gradient_evaluations == 2 * plain.gradient_evaluations == 2 * STUDIES[name]["steps"]
    assert found.logged is not None
    assert (
        found.logged["names"]
        == {
            "minilm_testament": ["calibration_error", "nll"],
            "smollm_lora": ["forgetting", "test_loss_in_4_bits", "rise_in_4_bits"],
            "grpo_hacked_reward": ["reward"],
        }[name]
    )
    assert read_history(tmp_path / plain.folder)[-1]["loss"] > 0
