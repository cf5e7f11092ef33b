"""A reward model of every family: its head is on the language model, and plain PEFT gives the same scores."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

from qalign.config.recipe import Model
from qalign.data.collate import MicroBatchLimit
from qalign.data.store.sequences import TokenAnswers
from qalign.model.adapters.files import CONFIG, SCORE_HEAD, WEIGHTS
from qalign.model.adapters.members import answer_scores
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit
from qalign.train.model_card import loading
from tests.families import family
from tests.helpers import house_style, metrics
from tests.reward_runs import bradley_terry, quantised, run_stage, write_recipe
from tests.train.test_model_card import executed

WITH_CLASS, WITHOUT = ["llama", "qwen3", "gemma3", "gpt-oss"], ["granite", "cohere"]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def wrapper(name: str, vocabulary: int):
    """The config of a model that reads images too."""
    text = {
        "vocab_size": vocabulary + 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    ids = {"image_token_id": vocabulary - 1}
    if name == "gemma3":
        siglip = {**VISION, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"}
        return tf.Gemma3Config(text_config=text, vision_config=siglip, mm_tokens_per_image=4)
    if name == "mistral3":
        pixtral = {**VISION, "model_type": "pixtral", "head_dim": 16, "patch_size": 4, "image_size": 16}
        return tf.Mistral3Config(text_config={**text, "model_type": "ministral3"}, vision_config=pixtral, **ids)
    layers = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
    layers |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    qwen = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    qwen |= {"num_position_embeddings": 16, "patch_size": 4}
    return tf.Qwen3_5Config(text_config=text | layers, vision_config=qwen, **ids)


def saved(name: str, tiny_folder: str, folder: Path, *, images: bool = False) -> str:
    """A random model in a folder, with a tokenizer."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    if images:
        torch.manual_seed(0)
        lm = tf.AutoModelForImageTextToText.from_config(wrapper(name, len(tokenizer)), dtype=torch.float32)
    else:
        lm = family(name, len(tokenizer), spread=0.1, dtype=torch.float32)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check_run(folder: str, tmp_path: Path, capsys, quantization: str = "nf4") -> tuple[str, float]:
    """Trains for two steps. Returns the card's code, whose score is that of the run."""
    held = {"quantization": quantization}
    run = run_stage(write_recipe(tmp_path, folder, limit=8, max_steps=2, lora={"r": 2}, model=held))
    assert all(math.isfinite(line["loss"]) for line in metrics(run))
    settings = json.loads((run.adapter / CONFIG).read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    base = load(run.recipe.model)
    base.load_adapter(Role.REWARD, str(run.adapter), trainable=False)
    code = loading(base, run.adapter)
    assert code in (run.adapter / "README.md").read_text()
    capsys.readouterr()
    ids = executed(code)["ids"][0].tolist()
    printed = float(capsys.readouterr().out.splitlines()[-1])
    rows = [TokenAnswers(ids[:-1], (ids[-1:],))]
    assert printed == pytest.approx(answer_scores(base, Role.REWARD, rows, MicroBatchLimit(pairs=1)).item(), abs=1e-4)
    return code, printed


@pytest.mark.parametrize("name", WITH_CLASS)
def test_plain_peft_scores_the_same_where_transformers_has_a_class(tiny_folder, tmp_path, capsys, name):
    """Experts are compared in 16 bits, as plain transformers holds them."""
    quantization = "none" if name == "gpt-oss" else "nf4"
    folder = saved(name, tiny_folder, tmp_path / "model")
    code, _ = check_run(folder, tmp_path / "run", capsys, quantization)
    assert "AutoPeftModelForSequenceClassification" in code
    adapter, (pair,) = tmp_path / "run" / "reward" / "adapter", house_style(tf.AutoTokenizer.from_pretrained(folder), 1)
    lm = tf.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, quantization_config=quantised() if quantization == "nf4" else None, dtype=torch.float32
    )
    lm.config.pad_token_id = 0
    guard_4bit(lm)
    plain = PeftModel.from_pretrained(lm, adapter).eval()
    with torch.no_grad():
        alone = [plain(input_ids=torch.tensor([pair.prompt_ids + answer])).logits.item() for answer in pair.answers]
    base = load_rewarding(folder, adapter, quantization)
    found = answer_scores(base, Role.REWARD, [pair], MicroBatchLimit(pairs=1))[0].tolist()
    assert found == pytest.approx(alone, abs=1e-4)
    assert bradley_terry(*found) == pytest.approx(bradley_terry(*alone), abs=1e-4)


def load_rewarding(folder: str, adapter: Path, quantization: str):
    base = load(Model(base=folder, compute_dtype="float32", quantization=quantization))
    base.load_adapter(Role.REWARD, str(adapter), trainable=False)
    return base


@pytest.mark.parametrize("name", WITHOUT)
def test_the_readme_loads_it_where_transformers_has_no_class(tiny_folder, tmp_path, capsys, name):
    code, printed = check_run(saved(name, tiny_folder, tmp_path / "model"), tmp_path / "run", capsys)
    assert "lm.score = torch.nn.Linear(" in code
    file = tmp_path / "run" / "reward" / "adapter" / WEIGHTS
    assert load_file(file)[SCORE_HEAD].shape == (1, 32)
    assert abs(printed) > 1e-3


@pytest.mark.parametrize(
    ("name", "by_hand", "others"), [("gemma3", False, False), ("mistral3", True, False), ("qwen3_5", True, True)]
)
def test_models_that_read_images_score_texts(tiny_folder, tmp_path, capsys, name, by_hand, others):
    """Qwen3.5's sequence classifier has other names than its language model, and so has its model for images."""
    code, _ = check_run(saved(name, tiny_folder, tmp_path / "model", images=True), tmp_path / "run", capsys)
    assert ("lm.score = torch.nn.Linear(" in code) == by_hand
    assert ("In AutoModelForImageTextToText the layers have other names" in code) == others
