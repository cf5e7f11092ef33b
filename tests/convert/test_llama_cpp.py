"""Our GGUF files in llama.cpp itself: ids, chat template, log-probs, adapters, and where its answers end."""

import shutil

import pytest
import torch

from qalign.config.load import load as load_recipe
from qalign.convert.adapters import updates, write_gguf
from qalign.convert.fidelity import Trained
from qalign.convert.gguf import QUANTIZE, write_model
from qalign.convert.merging import loaded
from qalign.export import export, measured_rows, options
from tests.conftest import ROOT
from tests.convert.llama_cpp import LlamaCpp, running
from tests.convert.models import FAMILIES, logits, model, save
from tests.helpers import TEST, train_recipe
from tests.reward_runs import run_stage, write_recipe

IDS = list(range(20, 60))
TEXTS = ["Hello there, 2024 isn't  héllo wörld\n\n  def f(x):\n\treturn 12345\n 我们 – ok?", "a", "I'LL\r\n\n\n x  "]
TAUGHT = ["sft.limit=64", "sft.learning_rate=1e-3"]
TURNS = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Yes, 1 + 1."},
    {"role": "user", "content": "And\nthen?"},
]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_reads_the_model_and_its_tokenizer(name, tmp_path):
    """Seen: 4e-6 nats apart; llama.cpp keeps keys and values in float16."""
    lm, template = model(name)
    write_model(lm, template, tmp_path / "model.gguf", "f32", name)
    exact = logits(lm, IDS)[-1].log_softmax(-1)
    with running(tmp_path / "model.gguf") as cpp:
        assert abs(kl(exact, cpp.logps(IDS, len(exact)))) < 1e-4
        chat = template.render(TURNS, add_generation_prompt=True)
        assert cpp.tokens(chat, add_special=False) == template.ids(chat)
        written = cpp.ask("/apply-template", messages=TURNS)["prompt"]  # without the BOS that it adds by itself
        assert cpp.tokens(written, add_special=True) == template.ids(chat)
        if FAMILIES[name][1] == "llama3":  # llama.cpp's own rules for SentencePiece differ where a text begins
            for text in TEXTS:
                assert (
                    cpp.tokens(text, add_special=False) == template.tokenizer(text, add_special_tokens=False).input_ids
                )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(QUANTIZE), reason=f"K-quants need llama.cpp's own {QUANTIZE} on the PATH")
def test_llama_cpps_own_tool_quantises_our_file(tmp_path):
    lm, template = model("llama")
    exact, apart = logits(lm, IDS)[-1].log_softmax(-1), []
    for kind in ("q6_k", "q4_k_m", "q2_k"):
        write_model(lm, template, tmp_path / f"{kind}.gguf", kind, "tiny")
        with running(tmp_path / f"{kind}.gguf") as cpp:
            apart.append(kl(exact, cpp.logps(IDS, len(exact))))
    assert 0 < apart[0] < 0.01
    assert apart[0] < apart[1] < apart[2]
    assert [file.suffix for file in tmp_path.iterdir()] == 3 * [".gguf"], "what was in float32 is gone"


@pytest.mark.slow
def test_llama_cpp_adds_an_adapter_as_it_was_trained(tmp_path):
    base = save("llama", tmp_path / "base")
    held = {"quantization": "none", "compute_dtype": "float32"}
    strong = {"learning_rate": 2e-2, "scheduler": "constant", "warmup_ratio": 0.0, "limit": 4, "batch_size": 2}
    run = run_stage(write_recipe(tmp_path, base, "sft", model=held, lora={"rslora": True}, eval_data=TEST, **strong))
    trained = Trained(run, measured_rows(run, None)[0][:1])
    (prompt, answer), (expected,) = trained.rows[0], trained.outputs
    under = loaded(run, "original")
    write_model(under.lm, under.template, tmp_path / "base.gguf", "f32", "base")
    write_gguf(updates(run, under), under.lm, tmp_path / "adapter.gguf", "adapter")
    size = under.lm.config.vocab_size
    with running(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as cpp:
        apart = [kl(expected[at].double(), cpp.logps(prompt + answer[:at], size)) for at in range(0, len(answer), 8)]
    with running(tmp_path / "base.gguf") as cpp:
        bare = kl(expected[0].double(), cpp.logps(prompt, size))
    assert max(map(abs, apart)) < 1e-3 < 0.05 < bare


def mean_kl(trained: Trained, cpp: LlamaCpp) -> float:
    """What llama.cpp computes at every sixth token of the model's greedy answers, in nats from it."""
    size = len(trained.outputs[0][0])
    found = [
        kl(expected[at].double(), cpp.logps(prompt + answer[:at], size))
        for (prompt, answer), expected in zip(trained.rows, trained.outputs, strict=True)
        for at in range(0, len(answer), 6)
    ]
    return sum(found) / len(found)


def answers_alike(trained: Trained, cpp: LlamaCpp) -> list[bool]:
    """Asserts that llama.cpp's greedy answers part from the model's only where two tokens are nearly as likely. Returns
    which of them ended by themselves."""
    ended = []
    for (prompt, answer), expected in zip(trained.rows, trained.outputs, strict=True):
        found, why = cpp.greedy(prompt, 200)
        ended.append(why == "eos")
        first = next((at for at, (one, other) in enumerate(zip(answer, found, strict=False)) if one != other), None)
        if first is not None:
            best, second = expected[first].topk(2).values.tolist()
            assert best - second < 1.0
    return ended


@pytest.mark.true_model
def test_the_demo_answers_in_llama_cpp_as_it_was_trained(tmp_path):
    """SmolLM2-135M after a short SFT. In F16 its greedy answers in llama.cpp are the trained model's, which computes in
    float32 here. In Q8_0, and as an adapter on the base, log-probs are the same but for rounding. So are those of the
    base before. An answer ends with the end of turn, which isn't shown."""
    path = str(ROOT / "recipes" / "smollm2_demo.yaml")
    recipe = load_recipe(path, [f"output={tmp_path}", "model.compute_dtype=float32", *TAUGHT], stage="sft")
    run = train_recipe(recipe, path, stage="sft")
    rows = measured_rows(run, None)[0][:6]
    before, after = Trained(run, rows, bare=True), Trained(run, rows)
    base, adapter, f16, q8_0 = (tmp_path / f"{name}.gguf" for name in ("base", "adapter", "f16", "q8_0"))
    for file, *words in (
        (base, "gguf", "--bare", "--quantization", "f16"),
        (f16, "gguf", "--quantization", "f16"),
        (q8_0, "gguf", "--quantization", "q8_0"),
    ):
        told = [str(run.path), "--output", str(file), "--max-kl", "0.01", "--to", *words]
        export(options().parse_args(told))
    under = loaded(run, "dequantized")
    write_gguf(updates(run, under), under.lm, adapter, "adapter")
    with running(base) as cpp:
        assert abs(mean_kl(before, cpp)) < 0.001
        assert mean_kl(after, cpp) > 0.1
        answers_alike(before, cpp)
    with running(base, adapter) as cpp:
        assert abs(mean_kl(after, cpp)) < 0.001
        assert any(answers_alike(after, cpp))
    with running(f16) as cpp:
        for prompt, answer in after.rows:
            assert cpp.greedy(prompt, len(answer))[0] in (answer, answer[:-1])  # it keeps the end of turn to itself
    with running(q8_0) as cpp:
        assert mean_kl(after, cpp) < 0.01  # the whole demo's figure: benchmarks/results/export.md
        assert any(answers_alike(after, cpp))
        said = cpp.ask("/v1/chat/completions", messages=TURNS[:1], max_tokens=200, temperature=0)["choices"][0]
    assert "<|im_end|>" not in said["message"]["content"]
