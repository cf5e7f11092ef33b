"""Files of answers: read in any known shape, written as AlpacaEval and Arena-Hard read them. Imports no torch.

AlpacaEval (github.com/tatsu-lab/alpaca_eval): lists of `{instruction, output, generator}`, and annotations with
`preference` from 1 (its `output_1`, here side B) to 2 (`output_2`, side A). Arena-Hard v2 (github.com/lmarena/
arena-hard-auto): `question.jsonl`, `model_answer/MODEL.jsonl` and `model_judgment/JUDGE/MODEL.jsonl`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalign.config.atomic import write_rows, write_whole
from qalign.config.stages import Source
from qalign.data.formats import Dialogue, Prompt, Refused, collect, scorable
from qalign.data.readers import BadRow
from qalign.data.shapes import RawRow
from qalign.errors import UserError
from qalign.judge.comparison.sides import prompt_key
from qalign.reports.plots import counted

CATEGORY = "hard_prompt"  # the one that Arena-Hard's `show_result.py` shows by default


@dataclass(frozen=True)
class Compared:
    """A prompt with the answers of both sides."""

    prompt: Prompt
    a: str
    b: str
    ended: tuple[bool, bool] = (True, True)  # whether each answer ended by itself

    @property
    def turns(self) -> list[dict[str, Any]]:
        return list(self.prompt.turns)


def read_answers(file: str, limit: int | None) -> tuple[list[tuple[Prompt, str]], list[Refused]]:
    """Prompts with their answers, and the refused rows. A `UserError` if the file can't be read at all."""
    rows, refused = collect((Source(path=file),), "train", limit, 0, _answered)
    return [*rows], refused


def by_prompt(file: str, read: Sequence[tuple[Prompt, str]]) -> tuple[dict[str, Prompt], dict[str, str]]:
    """(The prompts, their answers) of `read_answers`, by `prompt_key`; rows that say the same again are counted on
    stdout. A `UserError` if a prompt has two answers, of which none would be the right one to judge."""
    asked: dict[str, Prompt] = {}
    texts: dict[str, str] = {}
    others: list[str] = []
    for row, text in read:
        first = asked.setdefault(key := prompt_key(row), row)
        if texts.setdefault(key, text) != text:
            others.append(f"{first.where} and {row.where}")
    if others:
        more = f" (and {counted(len(others) - 1, 'row')} more)" if others[1:] else ""
        raise UserError(f"{others[0]}: are different answers to one prompt{more}; keep one answer to each prompt")
    if repeated := len(read) - len(texts):
        print(f"{file}: {counted(repeated, 'row')} left out: prompt and answer stand in an earlier one")
    return asked, texts


def _answered(raw: Any, where: str) -> tuple[Prompt, str]:
    if isinstance(raw, dict) and isinstance(turns := raw.get("messages"), list) and turns:
        last = turns[-1]
        if isinstance(last, dict) and isinstance(content := last.get("content"), dict) and "answer" in content:
            # Arena-Hard's; a thought may stand beside the answer.
            raw = RawRow(dict(raw) | {"messages": [*turns[:-1], last | {"content": content["answer"]}]})
    row = scorable(raw, where)
    if not isinstance(row, Dialogue):
        raise BadRow("has two answers; expected a prompt with one, such as 'prompt' and 'completion'")
    columns = {name: value for name, value in dict(raw).items() if value is not None}
    return Prompt(row.turns[:-1], where, columns, row.tools), row.turns[-1]["content"]


def write_files(
    folder: Path, names: tuple[str, str], judge: str, rows: Sequence[Compared], found: Sequence[float | None]
) -> None:
    """Writes `alpaca_eval/` and `arena_hard/` into a folder; `found` is P(A is better) of each row."""
    alpaca, arena = folder / "alpaca_eval", folder / "arena_hard"
    for name, kept in _alpaca(names, judge, rows, found).items():
        (file := alpaca / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")
    for name, lines in _arena(names, judge, rows, found).items():
        (file := arena / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, lines)


def _alpaca(
    names: tuple[str, str], judge: str, rows: Sequence[Compared], found: Sequence[float | None]
) -> dict[str, list[dict[str, Any]]]:
    outputs, annotations = ([], []), []
    for number, (row, preference) in enumerate(zip(rows, found, strict=True)):
        instruction = as_text(row.turns)
        for kept, text, name in zip(outputs, (row.a, row.b), names, strict=True):
            kept.append({"dataset": "qalign", "instruction": instruction, "output": text, "generator": name})
        annotations.append({
            "dataset": "qalign", "instruction": instruction, "index": number, "annotator": judge,
            "output_1": row.b, "generator_1": names[1], "output_2": row.a, "generator_2": names[0],
            "preference": None if preference is None else 1 + preference,
        })  # fmt: skip
    return {"model_outputs.json": outputs[0], "reference_outputs.json": outputs[1], "annotations.json": annotations}


def _arena(
    names: tuple[str, str], judge: str, rows: Sequence[Compared], found: Sequence[float | None]
) -> dict[str, list[dict[str, Any]]]:
    """A is the model and B the baseline; in the first of two games the baseline is its "A"."""
    model, baseline, judged_by = map(file_name, (*names, judge))
    baseline += "_b" if baseline == model else ""  # names may differ in what no file name has
    questions, answers, judgements = [], ([], []), []
    for number, (row, preference) in enumerate(zip(rows, found, strict=True)):
        uid = f"qalign-{number}"
        questions.append({"uid": uid, "category": CATEGORY, "subcategory": "qalign", "prompt": as_text(row.turns)})
        for kept, text, name in zip(answers, (row.a, row.b), (model, baseline), strict=True):
            turns = [*row.turns, {"role": "assistant", "content": {"answer": text}}]
            kept.append({"uid": uid, "ans_id": f"{uid}-{name}", "model": name, "messages": turns})
            kept[-1] |= {"tstamp": 0.0, "metadata": _style(text)}
        scores = (None, None) if preference is None else ("A=B", "A=B") if preference == 0.5 else ("B>A", "A>B")
        scores = scores[::-1] if preference is not None and preference < 0.5 else scores
        games = [{"score": score, "judgment": {"answer": f"[[{score}]]"}} for score in scores]
        judgements.append({"uid": uid, "category": CATEGORY, "judge": judged_by, "model": model, "baseline": baseline})
        judgements[-1]["games"] = games
    files = {f"model_answer/{name}.jsonl": kept for name, kept in zip((model, baseline), answers, strict=True)}
    return {"question.jsonl": questions, **files, f"model_judgment/{judged_by}/{model}.jsonl": judgements}


def _style(text: str) -> dict[str, Any]:
    """What Arena-Hard controls for: length and marks of Markdown. (Tokens are words and signs here.)"""

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "token_len": count(r"\w+|[^\w\s]"),
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def as_text(turns: Sequence[dict[str, Any]]) -> str:
    """A dialogue as one instruction: a single question as it is, others with their roles."""
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role'].title()}: {turn['content']}" for turn in turns)


def file_name(text: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._")[-80:] or "model"
