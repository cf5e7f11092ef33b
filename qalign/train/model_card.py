"""The README.md of an adapter folder: what was trained on what, with which figures, and how it is loaded."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign import __version__
from qalign.config.recipe import flat
from qalign.data.tokenize import end_of_turn_id

if TYPE_CHECKING:
    from qalign.model.base import Base

ANSWERS = """\
from peft import AutoPeftModelForCausalLM
from transformers import {names}, GenerationConfig

folder = {folder}
{quantization}model = AutoPeftModelForCausalLM.from_pretrained(
    folder, device_map="auto", {options}
)
model.generation_config = GenerationConfig.from_pretrained(folder)  # an answer ends where it did in training
tokenizer = AutoTokenizer.from_pretrained(folder)

turns = [{{"role": "user", "content": "What makes a good walk?"}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, {template})
answer = model.generate(**inputs.to(model.device), max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
SCORES = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import {names}

folder = {folder}
{quantization}# The score is read at the last token that is no padding, which must be the end of the answer's turn.
model = AutoPeftModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, pad_token_id={pad}, device_map="auto", {options}
)
tokenizer = AutoTokenizer.from_pretrained(folder)

turns = [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
ids = tokenizer.apply_chat_template(turns, {template})["input_ids"].to(model.device)
ids = ids[:, : (ids[0] == {end}).nonzero()[-1] + 1]  # a template may write more after the end of the turn
print(model(input_ids=ids).logits.item())"""
# The cost was measured in docs/merging.md: `--onto original`.
QUANTIZATION = """\
# On the 16-bit base, without this, it is another model than the one that was trained: with SmolLM2-135M
# the KL divergence between the two was 0.298 nats per token, more than between trained and untrained.
quantization = BitsAndBytesConfig(
    {settings}
)
"""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
MODEL_CARD = """\
---
base_model: {base}
library_name: peft
tags: [qalign, {stage}, lora]
---
# {name}: {stage} adapter

Trained with qalign on `{model}`. Made with {versions}.

| | |
|---|---|
{table}

```python
{code}
```
"""


def loading(base: "Base", adapter: Path) -> str:
    """Python code that loads what was trained on a base, without qalign: an adapter in the folder `adapter`, on the
    base as it was held. It generates an answer, or scores one."""
    spec, dtype, template = base.spec, str(base.dtype).removeprefix("torch."), base.template
    settings = {"load_in_8bit": True}
    if spec.quantization != "int8":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.quantization,
            "bnb_4bit_use_double_quant": spec.double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
    # A base that is stored quantised loads as it is.
    is_quantised_here = spec.quantization != "none" and base.origin.stored is None
    quantization = QUANTIZATION.format(settings=_keywords(settings)) if is_quantised_here else ""
    options = f"dtype={_quoted(dtype)}" + (", quantization_config=quantization" if is_quantised_here else "")
    filled = {
        "folder": _quoted(str(adapter)),
        "names": "AutoTokenizer, BitsAndBytesConfig" if is_quantised_here else "AutoTokenizer",
        "quantization": quantization,
        "options": options,
        "template": _keywords({**template.kwargs, "return_dict": True, "return_tensors": "pt"}),
    }
    if base.is_classifier:
        return SCORES.format(**filled, pad=template.tokenizer.pad_token_id, end=end_of_turn_id(template))
    return ANSWERS.format(**filled)


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def model_card(adapter: Path, stage: str, model: str, base: str, code: str, facts: dict[str, Any]) -> str:
    """The card as Markdown, from the recipe's `model.base`, the base's folder or hub id, Python that loads the adapter
    (as from `loading`), and the facts of the summary, `versions` included."""
    cells = ((name, " ".join(str(value).split()).replace("|", r"\|")) for name, value in flat(facts))
    table = "\n".join(f"| {name} | {text} |" for name, text in cells if not name.startswith("versions."))
    made_with = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    card = {"base": base, "stage": stage, "name": adapter.parent.parent.name, "model": model}
    return MODEL_CARD.format(**card, versions=made_with, table=table, code=code)


def versions() -> dict[str, str]:
    """Installed versions of everything that can change a number."""
    found = {"qalign": __version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}
