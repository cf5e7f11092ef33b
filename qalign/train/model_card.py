"""The README.md of an adapter folder: what was trained on what, with which figures, and how it is loaded."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalign import __version__
from qalign.config.recipe import flat
from qalign.data.tokenize import end_of_turn_id, pad_for_scores

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qalign.model.base import Base

AUTO = """\
model = AutoPeftModelFor{task}.from_pretrained(
    folder, {labels}device_map="auto", {options}
)"""
BY_HAND = """\
lm = {auto}.from_pretrained(
    {base}, device_map="auto", {options}
)"""
ANSWERS = """\
from peft import {peft}
from transformers import {names}, GenerationConfig

folder = {folder}
{quantization}{model}
model.generation_config = GenerationConfig.from_pretrained(folder)  # an answer ends where it did in training
tokenizer = AutoTokenizer.from_pretrained(folder)

turns = [{{"role": "user", "content": "What makes a good walk?"}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, {template})
answer = model.generate(**inputs.to(model.device), max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
SCORES = """\
import torch
from peft import {peft}
from transformers import {names}

folder = {folder}
{quantization}{model}
tokenizer = AutoTokenizer.from_pretrained(folder)

turns = [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
ids = tokenizer.apply_chat_template(turns, {template})["input_ids"].to(model.device)
ids = ids[:, : (ids[0] == {end}).nonzero()[-1] + 1]  # a template may write more after the end of the turn
with torch.no_grad():
    print({score}.item())"""
# What reads a score, of a sequence classifier and of a language model with a head beside its own.
OF_CLASSIFIER = """
# The score is read at the last token that is no padding, which must be the end of the answer's turn.
model.config.get_text_config().pad_token_id = {pad}"""
OF_LANGUAGE_MODEL = """
# transformers has no sequence classifier that this adapter fits: the head is put on the language model.
lm.score = torch.nn.Linear(lm.config.get_text_config().hidden_size, 1, bias=False, device=lm.device)"""
OTHER_NAMES = """
# In AutoModelForImageTextToText the layers have other names: there this adapter would do nothing."""
# The cost was measured in docs/merging.md: `--onto original`.
QUANTIZATION = """\
# On the 16-bit base, without this, it is another model than the one that was trained: with SmolLM2-135M
# the KL divergence between the two was 0.298 nats per token, more than between trained and untrained.
quantization = BitsAndBytesConfig(
    {settings}
)
"""
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
CARD, H3 = "README.md", "## Helpful, harmless, honest"
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
    from qalign.model.adapters.files import HEAD  # here, as what only reads a finished run must not wait for torch
    from qalign.model.adapters.targets import text_layers
    from qalign.model.loading import auto_class, config_at

    gives_scores = hasattr(base.lm, HEAD) and "policy" not in base.adapters
    config, layers = config_at(base.origin), list(text_layers(base.lm))
    auto, (quantization, options) = auto_class(config).__name__, _held(base)
    names = ["AutoTokenizer", *(["BitsAndBytesConfig"] if quantization else [])]
    by_hand, task = auto != "AutoModelForCausalLM", "CausalLM"
    if gives_scores:
        by_hand, task = not _has_layers("SequenceClassification", config, [*layers, HEAD]), "SequenceClassification"
    score = "model(input_ids=ids).logits"
    if by_hand:
        where, revision = _quoted(base.origin.source), base.origin.hub_revision
        where += f", revision={_quoted(revision)}" if revision else ""
        model = BY_HAND.format(auto=auto, base=where, options=options)
        model += (OF_LANGUAGE_MODEL if gives_scores else "") + "\nmodel = PeftModel.from_pretrained(lm, folder)"
        names, peft = [auto, *names], "PeftModel"
        score = "lm.score(lm.base_model(input_ids=ids).last_hidden_state[0, -1].float())"
    else:
        model = AUTO.format(task=task, labels="num_labels=1, " if gives_scores else "", options=options)
        pad = base.tokenizer.convert_tokens_to_ids(pad_for_scores(base.template))
        model += OF_CLASSIFIER.format(pad=pad) if gives_scores else ""
        peft = f"AutoPeftModelFor{task}"
    if auto == "AutoModelForCausalLM" and _has_layers("ImageTextToText", config, layers) is False:
        model += OTHER_NAMES
    return (SCORES if gives_scores else ANSWERS).format(
        peft=peft,
        names=", ".join(names),
        folder=_quoted(str(adapter)),
        quantization=quantization,
        model=model,
        template=_keywords({**base.template.kwargs, "return_dict": True, "return_tensors": "pt"}),
        end=end_of_turn_id(base.template),
        score=score,
    )


def _held(base: "Base") -> tuple[str, str]:
    """(The code that says how a base was quantised, the options that load it so.)"""
    spec, dtype = base.spec, str(base.dtype).removeprefix("torch.")
    if spec.quantization == "none" or base.origin.stored is not None:  # one that is stored quantised loads as it is
        return "", f"dtype={_quoted(dtype)}"
    settings = {"load_in_8bit": True}
    if spec.quantization != "int8":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.quantization,
            "bnb_4bit_use_double_quant": spec.double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
    code = QUANTIZATION.format(settings=_keywords(settings))
    return code, f"dtype={_quoted(dtype)}, quantization_config=quantization"


def _has_layers(task: str, config: "PretrainedConfig", layers: list[str]) -> bool | None:
    """Whether another class of transformers for the same checkpoint has layers of these names, so that an adapter fits
    it; None if there is no such class."""
    import torch
    import transformers as tf

    classes = {
        "SequenceClassification": (tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, tf.AutoModelForSequenceClassification),
        "ImageTextToText": (tf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, tf.AutoModelForImageTextToText),
    }
    known, auto = classes[task]
    if type(config) not in known:
        return None
    with torch.device("meta"):
        return set(layers) <= {name for name, _ in auto.from_config(config, trust_remote_code=False).named_modules()}


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def model_card(name: str, stage: str, model: str, base: str, code: str, facts: dict[str, Any]) -> str:
    """The card as Markdown, from the name of the output folder, the recipe's `model.base`, the base's folder or hub id,
    Python that loads the adapter (as from `loading`), and the facts of the summary, `versions` included."""
    cells = ((name, " ".join(str(value).split()).replace("|", r"\|")) for name, value in flat(facts))
    table = "\n".join(f"| {name} | {text} |" for name, text in cells if not name.startswith("versions."))
    made_with = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    card = {"base": base, "stage": stage, "name": name, "model": model}
    return MODEL_CARD.format(**card, versions=made_with, table=table, code=code)


def with_h3(card: str, figures: dict[str, Any]) -> str:
    """A card with the table of `qalign.h3`, whose `h3.json` holds these figures, in place of an earlier one."""

    def cell(side: dict[str, Any] | None) -> str:
        if side is None:
            return ""
        low, high = side["interval"]
        return f"{side['value']:.1%} ({low:.0%} to {high:.0%})"

    rows = [
        f"| {m['words']} | {cell(m['before'])} | {cell(m['after'])} | {m['verdict']} |" for m in figures["measures"]
    ]
    table = "\n".join(["| | base | this adapter | |", "|---|---|---|---|", *rows])
    notes = (
        f"95% intervals. A phrase-based rule says what is a refusal. Made by `python -m qalign.h3`{_judged(figures)}."
    )
    return f"{card.partition(H3)[0].rstrip()}\n\n{H3}\n\n{table}\n\n{notes}\n"


def _judged(figures: dict[str, Any]) -> str:
    return f", judged by {figures['judge']}" if figures.get("judge") else ""


def versions() -> dict[str, str]:
    """Installed versions of everything that can change a number."""
    found = {"qalign": __version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}
