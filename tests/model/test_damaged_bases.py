"""Bases whose files contradict each other: weights that are incomplete or of other shapes than their config's, pickles
with code, tokenizers that can't be read. transformers fills what is missing with random numbers."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model.loading import load_config, load_scorer, load_weights

Q, NORM, EMBEDDINGS = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(folder: Path, file: str, **settings) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, quantization: str = "none", **options) -> str:
    with pytest.raises(UserError) as raised:
        load_weights(Model(base=str(folder), compute_dtype="float32", quantization=quantization), **options)
    (line,) = raised.value.lines
    assert line.startswith(f"model.base: '{folder}' ")
    return line


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(Q), f"it lacks 1 of its tensors, such as {Q}; copy the model again"),
        (lambda w: w.pop(NORM), f"it lacks 1 of its tensors, such as {NORM}"),
        (lambda w: [w.pop(name) for name in list(w) if name != NORM], "it lacks 20 of its tensors"),
        (lambda w: w.update({NORM: torch.ones(63)}), f"{NORM} has the shape (63,), its config.json asks for (64,)"),
        (lambda w: w.update({EMBEDDINGS: torch.ones(9, 64)}), f"{EMBEDDINGS} has the shape (9, 64), its config.json "),
    ],
)
def test_weights_that_are_incomplete_or_of_other_shapes_are_refused(folder, quantization, change, said):
    edit_weights(folder, change)
    assert said in refused(folder, quantization)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_hidden_layers": 3}, "it lacks 9 of its tensors, such as model.layers.2."),
        ({"num_key_value_heads": 4}, "layers.0.self_attn.k_proj.weight has the shape (32, 64), its config.json asks"),
        ({"intermediate_size": 96}, "has the shape"),
    ],
)
def test_a_config_that_asks_for_another_model_than_the_weights_are_is_refused(folder, settings, said):
    edit(folder, "config.json", **settings)
    assert said in refused(folder)


def test_a_language_model_is_no_reward_model(folder):
    """Its scores would be those of a head of random numbers."""
    edit(folder, "config.json", num_labels=1)
    with pytest.raises(UserError, match=r"^ppo\.reward: '.*' can't be loaded: it lacks 1 of its tensors, .* score\.we"):
        load_scorer(str(folder), "ppo.reward", torch.float32, torch.device("cpu"))


def test_tensors_that_the_model_does_not_use_are_said(folder, capsys):
    edit_weights(folder, lambda weights: weights.update({Q.replace("weight", "bias"): torch.ones(64)}))
    load_weights(Model(base=str(folder), compute_dtype="float32"))
    said = f"note: 1 tensors of '{folder}' aren't used, such as {Q.replace('weight', 'bias')}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("stored", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_weights_that_are_not_quantised_as_the_config_says_are_refused(folder, stored):
    edit(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", **stored})
    assert "its weights are not quantised" in refused(folder, "nf4")


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("was-run"),))


def test_a_pickle_with_code_is_not_run_and_nobody_is_told_how_to(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({NORM: torch.ones(64), "code": Code()}, folder / "pytorch_model.bin", pickle_module=pickle)
    line = refused(folder)
    assert line.endswith(
        "holds more than tensors in a pickle (.bin), which may run code when it is read; take .safetensors"
    )
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "has no tokenizer that can be read here; add its tokenizer.json"),
        ("tokenizer.json", "{}", "has a tokenizer that can't be read: 'added_tokens' is unknown or missing"),
        ("tokenizer_config.json", "[]", "has a tokenizer that can't be read: "),
        (
            "tokenizer_config.json",
            '{"model_max_length": "x", "tokenizer_class": "TokenizersBackend"}',
            "can't be read: '>'",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_said_before_the_weights_are_loaded(folder, file, content, said, capsys):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert said in refused(folder, "nf4")
    assert "quantising" not in capsys.readouterr().out


def test_what_is_wrong_with_a_field_of_a_config_is_said_with_its_name(folder):
    edit(folder, "config.json", rms_norm_eps="small")
    assert "can't be loaded: Validation error for field 'rms_norm_eps': TypeError: " in refused(folder)
    with pytest.raises(UserError, match="Validation error for field 'rms_norm_eps': TypeError: "):
        load_config(Model(base=str(folder)))
