"""How many tokens a DPO step runs through the model: packed with each prompt once, each answer in a row, and padded.

python benchmarks/packed_tokens.py [FILE …] [--pairs 8]     # counts only; files of preferences, by default the demo's
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from qalign.config.load import load as load_recipe
from qalign.config.stages import Source
from qalign.data.collate import pack, pad
from qalign.data.formats import preferences
from qalign.data.store.sequences import TokenPair
from qalign.data.tokenize import encode_pairs
from qalign.model.base import load

DEMO = "recipes/data/house_style_train.jsonl"
HEAD = "| file | pairs | packed | a row an answer, no padding | padded | padded / packed |\n|---|---|---|---|---|---|"


def counts(pairs: list[TokenPair], at_once: int, pad_id: int) -> tuple[int, int, int]:
    """Tokens of all pairs: packed, with each prompt twice but no padding, and padded in batches of `at_once` pairs."""
    batches = [pairs[start : start + at_once] for start in range(0, len(pairs), at_once)]
    packed = sum(pack(batch).input_ids.numel() for batch in batches)
    alone = sum(2 * len(pair.prompt_ids) + sum(map(len, pair.answers)) for pair in pairs)
    return packed, alone, sum(pad(batch, pad_id).input_ids.numel() for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[DEMO])
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a batch")
    parser.add_argument("--max-length", type=int, default=2048)
    args = parser.parse_args()
    base = load(load_recipe("recipes/smollm2_demo.yaml").model)
    print(HEAD)
    for file in args.files:
        rows, _ = preferences((Source(path=file),), "train", None, seed=42)
        pairs, _ = encode_pairs(base.template, rows, args.max_length)
        packed, alone, padded = counts(pairs, args.pairs, base.tokenizer.pad_token_id)
        print(f"| {Path(file).name} | {len(pairs)} | {packed:,} | {alone:,} | {padded:,} | {padded / packed:.2f} |")


if __name__ == "__main__":
    main()
