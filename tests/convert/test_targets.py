"""`python -m qalign.export --to gguf | gguf-adapter | ollama | mlx` on a finished run, from the command to the file."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file

from qalign.convert import mlx
from qalign.convert.adapters import updates, with_adapter, write_gguf
from qalign.convert.gguf import layout_of, model_of, read_tensors, tensors_of
from qalign.export import export, options
from qalign.model.base import Role, load
from tests.convert.models import logits, save
from tests.helpers import TEST, merge, refusal
from tests.reward_runs import run_stage, write_recipe

STRONG = {"learning_rate": 2e-2, "scheduler": "constant", "warmup_ratio": 0.0, "limit": 4, "batch_size": 2}
IDS = list(range(20, 60))


def command(run, *words: str) -> None:
    export(options().parse_args([str(run.path), *words]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An SFT run on an unquantised base, so that an adapter fits the published base too."""
    folder = tmp_path_factory.mktemp("run")
    base = save("llama", folder / "base")
    model = {"quantization": "none", "compute_dtype": "float32"}
    return run_stage(write_recipe(folder, base, "sft", model=model, lora={"rslora": True}, eval_data=TEST, **STRONG))


@pytest.fixture(scope="module")
def trained(run):
    base = load(run.recipe.model)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    with base.acting_as(Role.POLICY) as lm:
        return logits(lm, IDS)


def test_gguf_is_one_file_that_is_measured_as_it_lies_there(run, tmp_path, capsys):
    place = tmp_path / "out" / "m.gguf"
    command(run, "--to", "gguf", "--output", str(place))
    said = capsys.readouterr().out
    assert "nats a token from the trained model" in said
    assert "in             q8_0" in said
    assert f"llama-server -m {place} --jinja" in said
    assert [file.name for file in place.parent.iterdir()] == ["m.gguf"]
    line = refusal(capsys, lambda: command(run, "--to", "gguf", "--quantization", "q4_0", "--max-kl", "0.0001"))
    assert line.startswith("--max-kl: ")
    assert not list(run.path.glob("*.gguf"))
    assert not list(run.path.glob(".*gguf*"))


def test_the_adapter_alone_is_what_it_adds(run, trained, tmp_path):
    """With the base's tensors, as llama.cpp adds it: alpha / rank · B A. rsLoRA's scale is alpha / √rank."""
    base = load(run.recipe.model, "original")
    bare = logits(base.lm, IDS)
    found = updates(run, base)
    file = tmp_path / "adapter.gguf"
    write_gguf(found, base.lm, file, "tiny")
    assert {update.scale for update in found.values()} == {8 / 2}
    plain = load(run.recipe.model, "original").lm
    whole = with_adapter(dict(tensors_of(plain, layout_of(plain.config))), read_tensors(file))
    again = logits(model_of(whole, plain).eval(), IDS)
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-4)
    assert (bare - trained).abs().max() > 0.1
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")

    mlx.write_adapter(found, 2, tmp_path)
    tensors = load_file(tmp_path / "adapters.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    assert (tuple(a.shape), tuple(b.shape)) == ((96, 4), (4, 64))  # (inputs, rank), (rank, outputs)
    delta = config["lora_parameters"]["scale"] * (a @ b).T
    torch.testing.assert_close(delta, found[name].scale * found[name].b @ found[name].a)
    assert config["lora_parameters"]["keys"] == sorted(found)


def test_adapters_are_measured_on_the_base_that_is_under_them(run, tmp_path, capsys):
    command(run, "--to", "gguf-adapter")
    said = capsys.readouterr().out
    assert "on             the base as it is published" in said
    assert (run.path / "adapter.gguf").is_file()
    command(run, "--to", "gguf", "--bare", "--quantization", "f32", "--output", str(tmp_path / "base.gguf"))
    assert "without the adapter" in capsys.readouterr().out
    command(run, "--to", "ollama", "--base", str(tmp_path / "base.gguf"))
    lines = (run.path / "ollama" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {tmp_path / 'base.gguf'}", "ADAPTER ./adapter.gguf"]
    assert sorted(file.name for file in (run.path / "ollama").iterdir()) == ["Modelfile", "adapter.gguf"]
    assert "KL             0.00000 nats" in capsys.readouterr().out
    (run.path / "adapter.gguf").unlink()


def test_ollama_gets_the_whole_model(run, tmp_path):
    command(run, "--to", "ollama", "--output", str(tmp_path / "o"))
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["Modelfile", "model.gguf"]
    assert 'PARAMETER stop "</s>"' in (tmp_path / "o" / "Modelfile").read_text()


def test_mlx_finds_the_positions_where_it_looks_for_them(run, trained, tmp_path, capsys):
    """transformers 5 writes `rope_theta` into `rope_parameters`, where mlx-lm takes its default of 10,000 instead."""
    command(run, "--to", "mlx", "--output", str(tmp_path / "mlx"))
    merge(str(run.path), "dequantized", str(tmp_path / "merged"))
    config, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("mlx", "merged"))
    assert "rope_theta" not in plain
    assert config == plain | {"rope_theta": 5e4}
    capsys.readouterr()
    command(run, "--to", "mlx", "--base", "org/base", "--output", str(tmp_path / "adapter"))
    assert "mlx_lm.chat --model org/base --adapter-path" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapters.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_mlx_lm_itself_computes_the_same(run, trained, tmp_path):
    """Merged, its weights are in bfloat16; the adapter alone stays in float32 on the published base."""
    mx = pytest.importorskip("mlx.core", reason="mlx-lm's own reading needs mlx and mlx-lm (mlx-cpu on Linux)")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm's own reading needs mlx-lm")
    from mlx_lm.tuner.utils import load_adapters

    command(run, "--to", "mlx", "--output", str(tmp_path / "mlx"))
    command(run, "--to", "mlx", "--base", "org/base", "--output", str(tmp_path / "adapter"))

    def said(model) -> torch.Tensor:
        return torch.tensor(model(mx.array([IDS]))[0].astype(mx.float32).tolist(), dtype=torch.float64)

    def apart_from_trained(model) -> float:
        return (said(model).softmax(-1) - trained.softmax(-1)).abs().max().item()

    merged, _ = utils.load_model(tmp_path / "mlx")
    assert apart_from_trained(merged) < 0.005
    shutil.copytree(run.recipe.model.base, tmp_path / "base")
    mlx.fit_config(tmp_path / "base")
    base, _ = utils.load_model(tmp_path / "base")
    assert apart_from_trained(base) > 0.01
    assert apart_from_trained(load_adapters(base, tmp_path / "adapter")) < 1e-5
    merge(str(run.path), "original", str(tmp_path / "plain"))
    wrong, _ = utils.load_model(tmp_path / "plain")  # the folder of --to merged: other positions
    assert apart_from_trained(wrong) > 0.01


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--to", "merged", "--quantization", "q8_0"],
            "--quantization: --to merged doesn't take it; it is for --to gguf",
        ),
        (["--to", "gguf", "--base", "x"], "--base: --to gguf doesn't take it"),
        (["--to", "ollama", "--base", "x", "--quantization", "f16"], "--quantization: with --base the adapter alone"),
        (["--to", "gguf-adapter", "--base", "nowhere.gguf"], "--base: nowhere.gguf: there is no such file"),
        (["--to", "gguf", "--quantization", "q4_k_m"], "--quantization q4_k_m: needs llama.cpp's llama-quantize"),
    ],
)
def test_options_that_do_not_fit_are_one_line(run, words, said, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert said in refusal(capsys, lambda: command(run, *words))


def test_an_adapter_with_more_than_lora_cannot_stand_alone(tmp_path, capsys):
    base = save("llama", tmp_path / "base")
    run = run_stage(write_recipe(tmp_path, base, "sft", lora={"dora": True}, eval_data=TEST, **STRONG))
    assert "more than LoRA on layers (DoRA" in refusal(capsys, lambda: command(run, "--to", "gguf-adapter"))
    assert not list(run.path.glob("*.gguf"))


def test_a_reward_model_has_one_target(tmp_path, capsys):
    base = save("llama", tmp_path / "base")
    run = run_stage(write_recipe(tmp_path, base, "reward", **STRONG))
    assert "is a reward model" in refusal(capsys, lambda: command(run, "--to", "gguf"))
