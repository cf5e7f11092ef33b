"""What do many dialogues take to read, tokenise and go through: seconds, and the memory of all processes together?

    python benchmarks/data_scale.py [--rows 200000] [--tokenizer FOLDER] [--max-length 4096]

Writes dialogues with the shape of UltraChat's (two to four questions with their answers, about 1,000 tokens), made of
words of qalign's documents. Then a process with the libraries of an SFT run reads them, encodes them, encodes them once
more from new, and goes through all sequences in a random order, as an epoch does; this one measures it. Memory is the
proportional set size (PSS): pages that processes share count once. "own" leaves out mapped files, which the system
drops when it needs the room.

With PYTHONPATH set to another checkout, it measures that one.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
EVERY = 0.2  # seconds between two looks at the memory


def write_dialogues(file: Path, rows: int) -> None:
    """Dialogues of random words, the same at each call."""
    generator = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])]
    words = re.findall(r"[A-Za-z]+[,.]?", " ".join(texts))
    with file.open("w", encoding="utf-8") as opened:
        for _ in range(rows):
            turns: list[dict[str, str]] = []
            for _ in range(generator.choice((2, 3, 4))):
                for role, count in (
                    ("user", generator.randint(15, 60)),
                    ("assistant", int(generator.lognormvariate(5.3, 0.5))),
                ):
                    turns.append({"role": role, "content": " ".join(generator.choices(words, k=count))})
            opened.write(json.dumps({"messages": turns}) + "\n")


def measured(file: str, tokenizer: str, max_length: int) -> None:
    """The work itself, in a process of its own; prints the name of each part before it, and at last what it found."""
    part("libraries")
    from transformers import AutoTokenizer

    import qalign.train.trainers.sft  # noqa: F401
    from qalign.config.stages import Source
    from qalign.data.formats import dialogues
    from qalign.data.templates import prepare_template
    from qalign.data.tokenize import encode_dialogues

    template = prepare_template(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False))
    part("reading")
    rows, refused = dialogues((Source(path=file),), "train", None, 0)
    part("tokenising")
    encoded, unfit = encode_dialogues(template, rows, max_length)
    part("once more")
    again = encode_dialogues(template, rows, max_length)
    assert len(again[0]) == len(encoded)
    del again
    part("an epoch")
    tokens = 0
    for number in random.Random(0).sample(range(len(encoded)), len(encoded)):
        tokens += len(encoded[number].ids)
    part("end")
    found = {"rows": len(rows), "sequences": len(encoded), "tokens": tokens, "refused": len(refused) + len(unfit)}
    print(json.dumps(found), flush=True)


def part(name: str) -> None:
    print(f"part {name}", flush=True)


def memory_of(process: psutil.Process) -> tuple[float, float]:
    """(PSS, PSS without mapped files) of a process and its children in GiB."""
    found = [0, 0]
    for each in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        for place, name in enumerate(("Pss", "Pss_Anon")):
            found[place] += int(re.search(rf"^{name}:\s+(\d+) kB", lines, re.MULTILINE)[1])  # type: ignore[index]
    return found[0] / 2**20, found[1] / 2**20


def watch(words: list[str], cache: str) -> None:
    """Runs the process, and prints seconds and peaks of each of its parts."""
    command = [sys.executable, str(Path(__file__)), *words]
    environment = {"PYTHONPATH": str(ROOT)} | os.environ | {"XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment)
    os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
    whole, name, began, cpu, peaks, text = psutil.Process(process.pid), "start", time.monotonic(), 0.0, [0.0, 0.0], ""
    print(f"{'part':<12} {'seconds':>8} {'CPU s':>8} {'peak GiB':>9} {'own GiB':>8}", flush=True)
    while process.poll() is None or text:
        time.sleep(EVERY)
        try:
            now, spent = memory_of(whole), sum(whole.cpu_times()[:2])
        except (psutil.Error, OSError):
            now, spent = (0.0, 0.0), cpu
        peaks = [*map(max, peaks, now)]
        text += (process.stdout.read() or b"").decode()  # type: ignore[union-attr]
        while "\n" in text:
            line, _, text = text.partition("\n")
            if not line.startswith("part "):
                print(line, flush=True)
                continue
            print(
                f"{name:<12} {time.monotonic() - began:>8.1f} {spent - cpu:>8.1f} {peaks[0]:>9.2f} {peaks[1]:>8.2f}",
                flush=True,
            )
            name, began, cpu, peaks = line.removeprefix("part "), time.monotonic(), spent, [0.0, 0.0]
    if process.returncode:
        sys.exit(process.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    words = ["--tokenizer", args.tokenizer, "--max-length", str(args.max_length)]
    if args.measure:
        return measured(args.measure, args.tokenizer, args.max_length)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dialogues.jsonl"
        write_dialogues(file, args.rows)
        print(f"{args.rows:,} dialogues, {file.stat().st_size / 2**30:.2f} GiB of JSON", flush=True)
        watch([*words, "--measure", str(file)], folder)


if __name__ == "__main__":
    main()
