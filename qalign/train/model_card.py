"""The README.md of an adapter folder: what was trained on what, with which figures, and how it is loaded."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from qalign import __version__
from qalign.config.recipe import flat

LOADING = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")"""
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
{loading}
```
"""


def model_card(adapter: Path, stage: str, model: str, base: str, loading: str, facts: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        model: the recipe's `model.base`.
        base: folder or hub id of the 16-bit base.
        loading: Python code that loads the adapter without qalign, with `{folder}` in it.
        facts: of the summary, `versions` included.
    """
    cells = ((name, " ".join(str(value).split()).replace("|", r"\|")) for name, value in flat(facts))
    table = "\n".join(f"| {name} | {text} |" for name, text in cells if not name.startswith("versions."))
    made_with = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    card = {"base": base, "stage": stage, "name": adapter.parent.parent.name, "model": model}
    return MODEL_CARD.format(**card, versions=made_with, table=table, loading=loading.format(folder=adapter))


def versions() -> dict[str, str]:
    """Installed versions of everything that can change a number."""
    found = {"qalign": __version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}
