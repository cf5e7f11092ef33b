"""How far should a model be aligned? Its logits mixed with another's at several λ, each judged against the other.

The mixture (decoding-time realignment, `qalign.model.decoding.mixture`) needs both models at every token. The scale of
an adapter is the cheap approximation: LoRA's update of the weights times λ, which a plain model file can hold. Both are
the same at 0 and 1 alone, as logits aren't linear in the weights, so the adapter that is written is judged too.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qalign.config.atomic import write_whole
from qalign.errors import UserError
from qalign.judge.comparison.answer_files import Compared
from qalign.judge.comparison.report import preferences_of
from qalign.judge.comparison.sides import Side
from qalign.judge.win_rate import WinRate, win_rate
from qalign.model import lineage
from qalign.reports.plots import BLUE, GREY, ORANGE, label, picture
from qalign.train.run_folder import print_table

FILE, PICTURE, ADAPTER = "dial.json", "dial.png", "adapter"
DIALS, LARGEST = "0.25,0.5,0.75,1,1.25,1.5,2", 5.0

Figures = dict[float, WinRate]


def dials_of(text: str) -> list[float]:
    """The λ of `--dial`; a `UserError` if one is none."""
    try:
        found = sorted({float(word) for word in text.split(",")})
    except ValueError:
        found = []
    if not found or not 0 <= found[0] <= found[-1] <= LARGEST:
        raise UserError(f"--dial: {text} is no list of numbers from 0 to {LARGEST:g}, such as {DIALS}")
    return found


def best_of(figures: Figures) -> float:
    """The λ with the highest win rate; of equals the nearest to 1, where the model was trained."""
    return min(figures, key=lambda dial: (-figures[dial].rate, abs(dial - 1), dial))


def measured(rows: Sequence[Compared], found: Sequence[float | None]) -> WinRate:
    """The win rate of rows by their judgements."""
    return win_rate(*preferences_of(rows, found), [json.dumps(row.turns) for row in rows])


def scaled(adapter: Path, dial: float, folder: Path) -> Path:
    """Writes a copy of a LoRA adapter whose scale is λ times its own: `lora_alpha`, and `alpha_pattern` where modules
    have their own."""
    target = folder / ADAPTER
    shutil.copytree(adapter, target)
    file = target / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["lora_alpha"] *= dial
    config["alpha_pattern"] = {name: alpha * dial for name, alpha in (config.get("alpha_pattern") or {}).items()}
    write_whole(file, json.dumps(config, indent=2) + "\n")
    if kept := lineage.read(adapter):
        lineage.write(target, replace(kept, parent=str(adapter), parent_hash=lineage.adapter_hash(adapter)))
    return target


def finish(
    folder: Path, sides: tuple[Side, Side], judge: str, figures: Figures, judge_scaled: Callable[[Side], WinRate]
) -> None:
    """Writes the figures, their picture and, where the other side is the bare base, the adapter with the best scale,
    which `judge_scaled` judges."""
    best = best_of(figures)
    lines = [(f"λ {dial:g}", _in_words(found)) for dial, found in figures.items()]
    kept: dict[str, Any] = {"a": sides[0].name, "b": sides[1].name, "judge": judge, "best": best}
    kept["dials"] = {f"{dial:g}": asdict(found) for dial, found in figures.items()}
    of_adapter = None
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # of an earlier call
    if sides[0].adapter and sides[1].adapter is None and best not in (0, 1):
        place = scaled(sides[0].adapter, best, folder)
        of_adapter = judge_scaled(Side(f"{sides[0].name} × {best:g}", place))
        kept["adapter"] = asdict(of_adapter)
        lines.append(("adapter", f"{place}: lora_alpha × {best:g}, {_in_words(of_adapter)}"))
    elif best in (0, 1):
        likes = "the model best as it is" if best else f"{sides[1].name} best"
        lines.append(("adapter", f"none written: the judge likes {likes}"))
    draw(folder / PICTURE, figures, best, of_adapter, sides)
    write_whole(folder / FILE, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    lines.append(("best", f"λ {best:g} on these prompts; measure it on others before you believe it"))
    print_table(f"{sides[0].name} mixed with {sides[1].name}, against {sides[1].name}, judged by {judge}", lines)


def _in_words(found: WinRate) -> str:
    low, high = found.interval
    equal = "" if found.controlled is None else f", {found.controlled:.1%} at equal length"
    return f"wins {found.rate:.1%} (95% interval {low:.1%} to {high:.1%}){equal}"


def draw(file: Path, figures: Figures, best: float, of_adapter: WinRate | None, sides: tuple[Side, Side]) -> None:
    """Draws the win rate over λ, raw and at equal length, and that of the scaled adapter."""
    with picture(file, (7.5, 4.4), 0.12) as figure:
        axes, dials = figure.subplots(), [*figures]
        axes.vlines(dials, *zip(*(found.interval for found in figures.values()), strict=True), color=BLUE, alpha=0.5)
        axes.plot(dials, [found.rate for found in figures.values()], "o-", color=BLUE, label="logits mixed by λ")
        equal = [found.controlled for found in figures.values() if found.controlled is not None]
        if len(equal) == len(dials):
            axes.plot(dials, equal, "s--", color=ORANGE, label="the same at equal length")
        if of_adapter:
            axes.plot([best], [of_adapter.rate], "k*", markersize=13, label="the adapter's scale × λ")
        axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.axvline(1, color=GREY, linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.3)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(fontsize=10, loc="upper center", ncols=2)
        label(
            axes,
            f"How far should {sides[0].name} be aligned?",
            "λ (1: as it was trained)",
            f"wins over {sides[1].name}",
        )
