"""GGUF files of our own writer, as transformers' reader of GGUF, which shares no code with it, understands them."""

import json
import math
import os
import stat

import gguf
import pytest
import torch
import transformers as tf

from qalign.convert.gguf import layout_of, model_of, permuted, read_tensors, tensors_of, write_model
from qalign.convert.gguf_tokenizer import chat_template
from qalign.data.templates import ChatTemplate
from qalign.errors import UserError
from tests.convert.models import FAMILIES, LLAMA3_ROPE, logits, model, tokenizer

IDS = list(range(20, 60))


def fields(file) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_model_out_of_the_file(name, tmp_path):
    """Its own names, its own order of rows of queries and keys, and the config made of the file's metadata alone; but
    for what its reader leaves out: biases, the size of heads, Llama 3's positions (tests/convert/test_llama_cpp.py)."""
    lm, template = model(name)
    write_model(lm, template, tmp_path / "model.gguf", "f32", "tiny")
    assert torch.equal(logits(model_of(read_tensors(tmp_path / "model.gguf"), lm), IDS), logits(lm, IDS))
    where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "model.gguf"}
    options = {"quantization_config": tf.GgufConfig(dequantize=True), "dtype": torch.float32}
    if name not in ("llama", "mistral", "qwen2"):
        options["config"] = lm.config
    theirs = tf.AutoModelForCausalLM.from_pretrained(**where, **options)
    torch.testing.assert_close(logits(theirs, IDS), logits(lm, IDS), rtol=0, atol=1e-4)


def test_rows_of_queries_and_keys_are_interleaved_for_the_layout_llama_alone():
    """One head of 4: the first half of the rows is rotated with the second here, neighbours with neighbours there."""
    rows, config = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), tf.LlamaConfig(num_attention_heads=1)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert permuted(config, q, rows).flatten().tolist() == [0, 2, 1, 3]
    assert torch.equal(permuted(config, q, permuted(config, q, rows), back=True), rows)
    assert permuted(config, q.replace("q_proj", "v_proj"), rows) is rows
    assert permuted(tf.Qwen2Config(num_attention_heads=1), q, rows) is rows


def test_the_factors_of_llama_3s_positions_are_those_of_its_paper_in_code():
    """Wavelengths below 64/4 stay, above 64/1 are stretched by 8, between them it is interpolated."""
    config = tf.LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=LLAMA3_ROPE)
    lm, _ = model("llama, tied")
    lm.config.hidden_size = config.hidden_size
    *_, (name, factors) = tensors_of(lm, gguf.MODEL_ARCH.LLAMA)
    expected = []
    for place in range(0, 16, 2):
        length = 2 * math.pi * 10_000.0 ** (place / 16)
        smooth = (64 / length - 1) / (4 - 1)
        expected.append(1.0 if length < 16 else 8.0 if length > 64 else 1 / ((1 - smooth) / 8 + smooth))
    assert name == "rope_freqs.weight"
    torch.testing.assert_close(factors, torch.tensor(expected), rtol=1e-5, atol=0)
    assert len(set(expected)) > 2


@pytest.mark.parametrize(("kind", "steps"), [("q8_0", 127), ("q4_0", 8), ("q4_1", 15), ("f16", 2048), ("bf16", 256)])
def test_each_weight_is_off_by_half_a_step_at_most(kind, steps, tmp_path):
    """Of a block of 32: the largest number by 127 (Q8_0) or 8 (Q4_0), the range by 15 (Q4_1); scales are float16."""
    lm, template = model("llama")
    write_model(lm, template, tmp_path / "model.gguf", kind, "tiny")
    found, exact = read_tensors(tmp_path / "model.gguf"), dict(tensors_of(lm, layout_of(lm.config)))
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        if tensor.dim() == 1:
            assert torch.equal(found[name], tensor)
            continue
        wanted = 127 if name in ("token_embd.weight", "output.weight") and kind.startswith("q") else steps
        blocks = tensor.reshape(-1, 32)
        size = blocks.abs().amax(1) if wanted != 15 else blocks.amax(1) - blocks.amin(1)
        size = size[:, None] if kind.startswith("q") else blocks.abs()
        # Q4_0 goes from -8 to 7 steps, so a number as large as the largest with the other sign loses a whole one.
        allowed = size / wanted * (1.0 if wanted == 8 else 0.5) + 2e-3 * size + 1e-7
        assert ((found[name].reshape(-1, 32) - blocks).abs() <= allowed).all(), name
    assert fields(tmp_path / "model.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_where_an_answer_ends_and_how_a_turn_is_written_are_in_the_metadata(tmp_path):
    lm, template = model("llama, tied")
    lm.generation_config.eos_token_id = template.tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    template.tokenizer.eos_token = "<|end_of_text|>"
    write_model(lm, template, tmp_path / "model.gguf", "f32", "tiny")
    found, ids = fields(tmp_path / "model.gguf"), template.tokenizer.convert_tokens_to_ids
    assert found["tokenizer.ggml.eot_token_id"] == ids("<|eot_id|>")
    assert found["tokenizer.ggml.eos_token_id"] == ids("<|end_of_text|>")
    assert found["tokenizer.ggml.bos_token_id"] == ids("<|begin_of_text|>")
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.chat_template"] == template.tokenizer.chat_template
    assert found["general.architecture"] == "llama"
    assert "output.weight" not in read_tensors(tmp_path / "model.gguf")  # the embeddings are
    lm, template = model("mistral")
    write_model(lm, template, tmp_path / "window.gguf", "f32", "tiny")
    assert fields(tmp_path / "window.gguf")["llama.context_length"] == 512  # its window, which llama.cpp hasn't


def test_the_recipes_arguments_of_the_template_are_in_the_template():
    words = tokenizer("llama3")
    words.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}|{{ thinking }}|{{ name }}|{{ n }}|{{ bare is none }}"
    )
    template = ChatTemplate(words, {"thinking": False, "name": 'x "y"', "n": 3, "bare": None})
    turns = [{"role": "user", "content": "Hi"}]
    expected = template.render(turns, add_generation_prompt=True)
    assert expected == 'Hi|False|x "y"|3|True'
    words.chat_template = chat_template(template)
    assert ChatTemplate(words).render(turns, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tf.Gemma2Config(), "models of the family 'gemma2' can't be written as GGUF; llama, mistral, qwen2, qwen3 can"),
        (tf.LlamaConfig(hidden_act="gelu"), "its activation is gelu"),
        (tf.Qwen2Config(use_sliding_window=True, max_window_layers=1, num_hidden_layers=2), "sliding_attention"),
        (tf.LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
    ],
)
def test_what_cannot_be_written_is_one_line(config, said):
    with pytest.raises(UserError) as refused:
        layout_of(config)
    assert said in str(refused.value)
    assert len(refused.value.lines) == 1


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    lm, template = model("llama, tied")
    state = json.loads(template.tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"
    template.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    template = ChatTemplate(tf.AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(UserError, match="has no name for how this tokenizer"):
        write_model(lm, template, tmp_path / "model.gguf", "f32", "tiny")


def test_other_quantisations_are_llama_cpps_own_tool(tmp_path, monkeypatch):
    """A stand-in for the tool, which copies the file and keeps what it was called with."""
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncp "$1" "$2"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    lm, template = model("llama")
    write_model(lm, template, tmp_path / "model.gguf", "q4_k_m", "tiny")
    source, target, kind = (tmp_path / "called").read_text().split()
    assert (target, kind) == (str(tmp_path / "model.gguf"), "Q4_K_M")
    assert not (tmp_path / source).exists()
    assert torch.equal(read_tensors(tmp_path / "model.gguf")["output.weight"], lm.lm_head.weight)
    tool.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    with pytest.raises(UserError, match="--quantization q4_k_m: llama-quantize failed: no room"):
        write_model(lm, template, tmp_path / "other.gguf", "q4_k_m", "tiny")
