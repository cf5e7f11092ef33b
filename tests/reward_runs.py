"""Recipes of any stage for the tiny model, runs, and what they trained as transformers and PEFT alone load it."""

import math
from pathlib import Path

import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from qalign.config.load import load
from qalign.model.loading import guard_4bit
from qalign.train.run_folder import RunFolder
from tests.conftest import ROOT
from tests.helpers import train_recipe

DATA = ROOT / "recipes" / "data"
# A dozen pairs in three steps that move a lot; a checkpoint each step would only take time.
SHORT = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "limit": 12, "save_every": 100}


def write_recipe(folder: Path, base: str, stage: str = "reward", *, model=None, lora=None, **keys) -> str:
    """A recipe of one stage for a local model, in a folder of its own."""
    kind = "house_style_dialogues_train" if stage == "sft" else "house_style_train"
    recipe = {
        "model": {"base": base, "compute_dtype": "float32", "max_length": 512, **(model or {})},
        "lora": {"r": 4, "alpha": 8, **(lora or {})},
        "output": str(folder),
        stage: {"data": str(DATA / f"{kind}.jsonl"), **SHORT, **keys},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def run_stage(path: str, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """The stage of a recipe that `write_recipe` wrote, as its command runs it."""
    stage = Path(path).stem
    return train_recipe(load(path, stage=stage), path, stage=stage, resume=resume, overwrite=overwrite)


def quantised(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    """How the recipes here hold the base, in the words of plain transformers."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def plain_policy(adapter: Path) -> PeftModel:
    """A policy adapter on its base in float32, by transformers and PEFT alone."""
    lm = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=quantised(), dtype=torch.float32)
    guard_4bit(lm)
    return lm.eval()


def plain_reward_model(base: str, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """A reward adapter on its base in float32, by transformers and PEFT alone."""
    lm = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=0, quantization_config=quantised(), dtype=torch.float32
    )
    guard_4bit(lm)
    return PeftModel.from_pretrained(lm, adapter, is_trainable=trainable).eval()


def plain_score(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """The score of one sequence on its own: no padding, so the last token is the last."""
    assert ids[-1] != model.config.get_text_config().pad_token_id
    return model(input_ids=torch.tensor([ids])).logits[0, 0]


def bradley_terry(chosen: float, rejected: float, margin: float = 0.0, centering: float = 0.0) -> float:
    """The loss of one pair in float64, from the formula."""
    return math.log1p(math.exp(-(chosen - rejected - margin))) + centering * (chosen + rejected) ** 2
