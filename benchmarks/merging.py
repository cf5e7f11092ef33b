"""Does an SFT adapter keep what it learned when it is merged? Five ways to merge, on SmolLM2-135M.

    python benchmarks/merging.py RUN FILE [--rows N] [--to TABLE.md]

RUN is an SFT run (`python -m qalign.sft recipes/smollm2_demo.yaml sft.data=FILE …`), FILE its training rows or similar
ones. Measured in the precision of training, on the assistant's turns: the perplexity, and the mean
KL(unmerged || merged) of the next-token distributions in nats.
"""

import argparse
import math
import tempfile

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qalign.config.stages import Source
from qalign.data.formats import dialogues
from qalign.data.tokenize import IGNORED, encode_dialogues
from qalign.merge import merge
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit
from qalign.train.run_folder import open_run, versions


@torch.no_grad()
def measured(lm: nn.Module, rows: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probs at the supervised positions of each row, `(tokens, vocabulary)`."""
    found = []
    for row in tqdm(rows, leave=False):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = lm(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].float()
        found.append(logits[torch.tensor(row.labels[1:]) != IGNORED].log_softmax(dim=1))
    return found


def perplexity(logps: list[torch.Tensor], rows: list) -> float:
    targets = [torch.tensor([label for label in row.labels[1:] if label != IGNORED]) for row in rows]
    picked = [one.gather(1, ids[:, None]).sum().item() for one, ids in zip(logps, targets, strict=True)]
    return math.exp(-sum(picked) / sum(map(len, targets)))


def kl(unmerged: list[torch.Tensor], merged: list[torch.Tensor]) -> float:
    sums = [(p.exp() * (p - q)).sum().item() for p, q in zip(unmerged, merged, strict=True)]
    return sum(sums) / sum(len(p) for p in unmerged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--to")
    args = parser.parse_args()
    run = open_run(args.run, ("sft",))
    spec = run.recipe.model
    base = load(spec)
    dtype = base.dtype
    raw, _ = dialogues((Source(path=args.file),), "train", args.rows, 0)
    rows, _ = encode_dialogues(base.template, raw, spec.max_length)

    bare = measured(base.lm, rows, dtype)
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    unmerged = measured(base.lm, rows, dtype)
    table = [("the 4-bit base, no adapter", bare), ("unmerged: 4-bit base and adapter", unmerged)]

    into_4bit = base.model.merge_and_unload(adapter_names=[Role.POLICY])  # PEFT does so when asked, and warns
    guard_4bit(into_4bit)
    table.append(("merged into the 4-bit weights", measured(into_4bit, rows, dtype)))

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=spec.quantization, bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as aside:
        for form in ("dequantized", "original"):
            merge(args.run, form, f"{aside}/{form}")
        again = AutoModelForCausalLM.from_pretrained(
            f"{aside}/dequantized", quantization_config=config, dtype=dtype, trust_remote_code=False
        )
        guard_4bit(again)
        dequantized, original = (
            AutoModelForCausalLM.from_pretrained(f"{aside}/{form}", dtype=dtype, trust_remote_code=False)
            for form in ("dequantized", "original")
        )
        table.append(("dequantised, merged, quantised to 4 bits again", measured(again, rows, dtype)))
        table.append(("dequantised and merged: `qalign.merge`", measured(dequantized, rows, dtype)))
        table.append(("merged onto the original: `--onto original`", measured(original, rows, dtype)))

    lines = ["| weights | perplexity | KL to unmerged, nats a token |", "|---|---|---|"]
    for name, logps in table:
        lines.append(f"| {name} | {perplexity(logps, rows):.3f} | {kl(unmerged, logps):.5f} |")
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = "\n".join([*lines, "", f"{len(rows)} dialogues, {sum(map(len, unmerged)):,} supervised tokens. {made}, "
                      f"computing in {dtype} on {base.lm.device.type}.", ""])  # fmt: skip
    print(text)
    if args.to:
        with open(args.to, "w", encoding="utf-8") as opened:
            opened.write(text)


if __name__ == "__main__":
    main()
