"""How far are a run's GGUF files from the trained model, by our own reading of them and in llama.cpp itself?

    python benchmarks/export.py RUN [--quantizations q8_0,f16] [--prompts N] [--every N] [--to TABLE.md]

RUN is a finished run of a policy. Of each file: the KL(trained || exported) in nats a token on the trained model's
greedy answers to held-out prompts, as `qalign.export` measures it, and from llama.cpp's log-probs over the whole
vocabulary at every N-th token; how many of llama.cpp's own greedy answers are the trained model's; and whether
it stops. Needs the package xllamacpp.
"""

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

import torch

from qalign.convert import gguf, merging
from qalign.convert.fidelity import Trained, placed
from qalign.export import measured_rows
from qalign.train.run_folder import open_run, versions
from tests.convert.llama_cpp import running


def in_llama_cpp(file: Path, trained: Trained, every: int) -> tuple[float, float, int, int]:
    """(Mean and largest KL of llama.cpp at every `every`-th token, greedy answers that are
    the same, answers that it ended by itself)."""
    kls, same, ended, worst = [], 0, 0, 0.0
    with running(file) as cpp:
        for (prompt, answer), expected in zip(trained.rows, trained.outputs, strict=True):
            for at in range(0, len(answer), every):
                p, q = expected[at].double(), cpp.logps(prompt + answer[:at], expected.shape[1])
                kls.append((p.exp() * (p - q)).sum().item())
                worst = max(worst, kls[-1])
            found, why = cpp.greedy(prompt, len(answer) + 1)
            same += found[: len(answer)] == answer or found == answer[:-1]  # without the end of turn, which it keeps
            ended += why == "eos"
    return sum(kls) / len(kls), worst, same, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--quantizations", default="f16,q8_0,q4_1,q4_0")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--to")
    args = parser.parse_args()
    run = open_run(args.run)
    trained = Trained(run, measured_rows(run, None)[0][: args.prompts])
    base, lm = merging.merged(run, "dequantized", bits=32)
    lines = [
        "| file | MB | KL, as the command prints it | in llama.cpp | largest | same greedy answers | ended by itself |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as aside, torch.no_grad():
        for kind in args.quantizations.split(","):
            file = Path(aside) / f"{kind}.gguf"
            gguf.write_model(lm, base.template, file, kind, "benchmark")
            ours = trained.compare(placed(gguf.model_of(gguf.read_tensors(file), lm)))
            kl, worst, same, ended = in_llama_cpp(file, trained, args.every)
            lines.append(
                f"| {kind} | {file.stat().st_size / 1e6:,.0f} | {ours.kl_nats:.5f} | {kl:.5f} | {worst:.3f} | "
                f"{same} of {ours.rows} | {ended} of {ours.rows} |"
            )
            print(lines[-1], flush=True)
            file.unlink()
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    made += f", gguf {importlib.metadata.version('gguf')}, xllamacpp {importlib.metadata.version('xllamacpp')}"
    tokens = sum(len(answer) for _, answer in trained.rows)
    text = "\n".join([*lines, "", f"{len(trained.rows)} prompts, {tokens:,} tokens. {made}, on a CPU.", ""])
    print(text)
    if args.to:
        Path(args.to).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
