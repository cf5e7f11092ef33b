"""Does an SFT adapter keep what it learned when it is merged? Five ways to merge, on SmolLM2-135M.

    python benchmarks/merging.py RUN FILE [--rows N] [--answers N] [--to TABLE.md]

RUN is an SFT run (`python -m qalign.sft recipes/smollm2_demo.yaml sft.data=FILE …`), FILE its training rows or similar
ones. Measured on the assistant's turns: the perplexity, and the mean KL(unmerged || merged) of the next-token
distributions in nats. First in the precision of training, then with weights and computation in bfloat16, in which
merged models are used; there the greedy answers are compared too.
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
from qalign.data.store.sequences import IGNORED
from qalign.data.tokenize import encode_dialogues
from qalign.export import export, options
from qalign.model.base import Role, load
from qalign.model.loading import guard_4bit
from qalign.train.run_folder import open_run, versions

ANSWER_TOKENS = 40


@torch.no_grad()
def measured(lm: nn.Module, rows: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probs at the supervised positions of each row, `(tokens, vocabulary)`."""
    found = []
    for row in tqdm(rows, leave=False):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = lm(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].float()
        found.append(logits[torch.tensor(row.labels[1:]) != IGNORED].log_softmax(dim=1))
    return found


@torch.no_grad()
def answered(lm: nn.Module, rows: list, dtype: torch.dtype) -> list[list[int]]:
    """Greedy answers of up to `ANSWER_TOKENS` tokens to the first question of each row."""
    found = []
    for row in tqdm(rows, leave=False):
        ids = torch.tensor([row.ids[: next(n for n, label in enumerate(row.labels) if label != IGNORED)]])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            new = lm.generate(ids, do_sample=False, max_new_tokens=ANSWER_TOKENS, attention_mask=torch.ones_like(ids))
        found.append(new[0, ids.shape[1] :].tolist())
    return found


def perplexity(logps: list[torch.Tensor], rows: list) -> float:
    targets = [torch.tensor([label for label in row.labels[1:] if label != IGNORED]) for row in rows]
    picked = [one.gather(1, ids[:, None]).sum().item() for one, ids in zip(logps, targets, strict=True)]
    return math.exp(-sum(picked) / sum(map(len, targets)))


def kl(unmerged: list[torch.Tensor], merged: list[torch.Tensor]) -> float:
    sums = [(p.exp() * (p - q)).sum().item() for p, q in zip(unmerged, merged, strict=True)]
    return sum(sums) / sum(len(p) for p in unmerged)


def in_bfloat16(folder: str, merged: str, rows: list, first: list) -> list[tuple[str, list, list]]:
    """(name, log-probs, greedy answers) of the unmerged and the merged models, with everything in bfloat16."""
    run, dtype = open_run(folder, ("sft",)), torch.bfloat16
    base = load(run.recipe.model.model_copy(update={"compute_dtype": "bfloat16"}))
    base.load_adapter(Role.POLICY, str(run.adapter), trainable=False)
    found = [("unmerged: 4-bit base and adapter", measured(base.lm, rows, dtype), answered(base.lm, first, dtype))]
    del base
    for form, name in (
        ("dequantized", "dequantised and merged: `--to merged`"),
        ("original", "merged onto the original"),
    ):
        lm = AutoModelForCausalLM.from_pretrained(f"{merged}/{form}", dtype=dtype, trust_remote_code=False)
        found.append((name, measured(lm, rows, dtype), answered(lm, first, dtype)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--answers", type=int, default=8)
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
    first = rows[: args.answers]
    expected = answered(base.lm, first, dtype)
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
            words = [args.run, "--to", "merged", "--onto", form, "--output", f"{aside}/{form}", "--force"]
            export(options().parse_args(words))
        again = AutoModelForCausalLM.from_pretrained(
            f"{aside}/dequantized", quantization_config=config, dtype=dtype, trust_remote_code=False
        )
        guard_4bit(again)
        dequantized, original = (
            AutoModelForCausalLM.from_pretrained(f"{aside}/{form}", dtype=dtype, trust_remote_code=False)
            for form in ("dequantized", "original")
        )
        table.append(("dequantised, merged, quantised to 4 bits again", measured(again, rows, dtype)))
        table.append(("dequantised and merged: `--to merged`", measured(dequantized, rows, dtype)))
        table.append(("merged onto the original: `--onto original`", measured(original, rows, dtype)))
        narrow = in_bfloat16(args.run, aside, rows, first)

    lines = ["| weights | perplexity | KL to unmerged, nats a token |", "|---|---|---|"]
    for name, logps in table:
        lines.append(f"| {name} | {perplexity(logps, rows):.3f} | {kl(unmerged, logps):.5f} |")
    lines += ["", "In bfloat16, KL and answers against the unmerged model in the precision of training:", ""]
    lines += [f"| weights | perplexity | KL, nats a token | same {ANSWER_TOKENS} greedy tokens |", "|---|---|---|---|"]
    for name, logps, answers in narrow:
        same = sum(one == other for one, other in zip(answers, expected, strict=True))
        lines.append(f"| {name} | {perplexity(logps, rows):.3f} | {kl(unmerged, logps):.5f} | {same} of {len(first)} |")
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = "\n".join([*lines, "", f"{len(rows)} dialogues, {sum(map(len, unmerged)):,} supervised tokens. {made}, "
                      f"computing in {dtype} on {base.lm.device.type}.", ""])  # fmt: skip
    print(text)
    if args.to:
        with open(args.to, "w", encoding="utf-8") as opened:
            opened.write(text)


if __name__ == "__main__":
    main()
