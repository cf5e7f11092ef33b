"""What does it cost that DPO answers held-out prompts while it trains, beside the same run without?

    python benchmarks/sampling_cost.py [--rounds 3]

`sample_prompts: auto` samples where a forecast from counts of tokens says that it costs at most a tenth of the run.
Here the demo's DPO, whose 12 steps are too few for that, samples before and after them all the same, in turns with the
same run without: the forecast should not be below what it takes. The time is the processor time of the whole command.
Writes `benchmarks/results/sampling_cost.md`.
"""

import argparse
import json
import platform
import re
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.processor import run  # noqa: E402
from qalign.train.run_folder import versions  # noqa: E402

RECIPE, OUT = "recipes/smollm2_demo.yaml", "runs/sampling_cost"
RUN = f"qalign.dpo {RECIPE} output={OUT} dpo.start_from=null dpo.max_new_tokens=48"
SIDES = {"without": "dpo.sample_prompts=0", "with": "dpo.sample_prompts=24 dpo.sample_every=12"}


def side(name: str) -> tuple[float, dict, str]:
    """(processor seconds, the summary, what the header says of sampling) of a run."""
    seconds, said = run([*RUN.split(), *SIDES[name].split(), "--overwrite"])
    header = re.search(r"^ *sampling +(.*)$", said, re.MULTILINE)
    return seconds, json.loads((ROOT / OUT / "dpo" / "summary.json").read_text()), header[1] if header else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds, rows, ratios, said = parser.parse_args().rounds, list[str](), list[float](), ""
    for number in range(1, rounds + 1):
        without, _, _ = side("without")
        sampled, summary, said = side("with")
        ratios.append(sampled / without)
        share = summary["sampling_seconds"] / (summary["wall_seconds"] - summary["sampling_seconds"])
        rows.append(f"| {number} | {without:.0f} | {sampled:.0f} | {ratios[-1] - 1:.1%} | {share:.1%} |")
        print(rows[-1], flush=True)
    text = f"""# What sampling held-out answers costs a DPO run

By `python benchmarks/sampling_cost.py --rounds {rounds}`; the two sides are

    python -m {RUN} {SIDES["without"]}
    python -m {RUN} {SIDES["with"]}

Its forecast: "{said}". Processor seconds of the whole command on {platform.machine()}, loading included, in turns:

| round | without | with | more | by the run's own clock, which starts after loading |
|---|---|---|---|---|
{chr(10).join(rows)}

In the median {median(ratios) - 1:.1%} more.

{", ".join(f"{name} {version}" for name, version in versions().items())}.
"""
    (ROOT / "benchmarks" / "results" / "sampling_cost.md").write_text(text)


if __name__ == "__main__":
    main()
