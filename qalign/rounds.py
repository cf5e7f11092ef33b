"""Online preference learning: rounds of sampling and DPO, each from the policy that the last one left.

    python -m qalign.best_of RECIPE rounds=3 n=8 [key=value …] [--resume | --overwrite]

A round samples n answers to each of the `ppo` section's prompts, scores them with its reward, and trains with the `dpo`
section on the best and the worst answer of each prompt. The policy that a round starts from is also its reference, as
in iterative DPO (Xiong et al. 2024, arXiv:2312.11456; Yuan et al. 2024, arXiv:2401.10020): every round takes a step of
the size that `dpo.beta` allows, and what the distance from the very first policy buys is measured. Guo et al. 2024
(arXiv:2402.04792) keep the first policy as the reference, and sample anew for every optimiser step.

The folder `<output>/best_of/` holds `round_1/sampling`, `round_1/dpo`, `round_2/sampling` …, each a run like those of
the commands, `adapter/` (that of the last round), `samples/`, `summary.json` and `best_of_report.png`. Held-out prompts
are answered before the first round and after each.
"""

import argparse
import gc
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qalign import dpo
from qalign.best_of import PAIRS, BestOfRun, best_of, nothing_to_train_on
from qalign.cli import Run, program, work_in
from qalign.config.atomic import replacing_folder, write_whole
from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.data.formats import prompts
from qalign.errors import UserError, not_finite
from qalign.reports import alarms, rounds_report
from qalign.reports.answers import SEED, write_samples
from qalign.reports.plots import counted
from qalign.train.checkpoints import read_metrics
from qalign.train.dataset import read_rows
from qalign.train.processes.world import current
from qalign.train.run_folder import RunFolder, print_table

REPORT = "best_of_report.png"


class Part(RunFolder):
    """A run of a stage inside the folder of a larger run."""

    def __init__(self, recipe: Recipe, stage: str, command_line: str, name: str, whole: RunFolder):
        super().__init__(recipe, stage, command_line, name)
        self._whole = whole

    @property
    def command(self) -> str:
        """That of the larger run, which goes on with this one."""
        return self._whole.command


def learn_online(recipe: Recipe, run: BestOfRun) -> None:
    """Sample, score and train DPO from where the policy stands, again and again. Ends early at a round whose answers
    give no pair, such as one in which all have the highest reward."""
    if recipe.dpo is None:
        path = shlex.split(run.command_line)[0]
        raise UserError(f"dpo: rounds={run.rounds} trains DPO on every round's pairs; add a dpo section to {path}")
    first, world = run.parent, current()
    world.connect({"n": run.n, "rounds": run.rounds}, f"{run.command} --resume")
    done = {line["round"]: line for line in world.first(lambda: _begun(run)) if "round" in line}
    run.zeros = done.get(0, {}).get("zeros")
    adapter = first
    for number in range(run.rounds + 1):
        if number:
            left = _train(run, number, adapter)
            if not left:
                break
            adapter = left
        if number not in done:
            signal.signal(signal.SIGINT, run.stop)
            signal.signal(signal.SIGTERM, run.stop)
            point = measure(run, number, adapter, first) if run.settings.has_held_out else None
            done[number] = {"step": number, "round": number, "point": point and asdict(point), "adapter": adapter}
            done[number]["zeros"] = run.zeros
            if point:
                print(f"round {number}: {in_words(point)}" if number else f"before: {in_words(point)}", flush=True)
            if world.is_first:
                run.log(done[number])
                run.mark_whole(number + 1, 0)
    world.first(lambda: _finish(run, [done[number] for number in sorted(done)]))


def _begun(run: BestOfRun) -> list[dict[str, Any]]:
    """Begins the run, or goes back to its last checkpoint; returns what was logged until then."""
    run.begin([])
    run.rewind()
    if logged := read_metrics(run.metrics):
        return logged
    run.log({"step": 0, "n": run.n, "rounds": run.rounds})
    return []


def _train(run: BestOfRun, number: int, start: str | None) -> str | None:
    """One round from the adapter `start`; returns the adapter that it left, or None if there was no pair to train on
    after the first round. What was finished earlier is kept."""
    place = f"best_of/round_{number}"
    words = words_with(run, **{"ppo.start_from": start})
    sampling = BestOfRun(load(words[0], words[1:], "ppo"), run.n, run.command_line, run.rounds, f"{place}/sampling")
    sampling.number, sampling.zeros = number, run.zeros
    work_on_part(sampling, best_of)
    last, facts = current().first(
        lambda: (read_metrics(sampling.metrics)[-1], json.loads(sampling.summary.read_text(encoding="utf-8")))
    )
    run.zeros = last.get("zeros")  # of the first answers that were scored in any round
    if not facts["pairs"]:
        said = f"round {number}: {nothing_to_train_on(facts['picks'])}"
        if number == 1:
            raise UserError(said)
        print(f"{said}; ends after {counted(number - 1, 'round')}", flush=True)
        return None
    unused = dict.fromkeys((f"dpo.{key}" for key in ("limit", "eval_data", "holdout", "eval_every")), None)
    data = {"dpo.data": os.path.abspath(sampling.path / PAIRS), "dpo.split": "train", "dpo.start_from": start}
    words = words_with(run, **unused, **data)
    training = Part(load(words[0], words[1:], "dpo"), "dpo", shlex.join(words), f"{place}/dpo", run)
    work_on_part(training, dpo.train)
    return os.path.abspath(training.adapter)


def work_on_part(run: Run, work: Callable[[Recipe, Run], None]) -> None:
    """Does one part of a larger run, or goes on with it; one that is complete stays."""
    complete, begun = current().first(lambda: (run.complete, (run.path / "recipe.yaml").is_file()))
    if not complete:
        work_in(run, argparse.Namespace(resume=begun, overwrite=False), work)
        free_memory()


def free_memory() -> None:
    """Frees the base of the part before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def words_with(run: RunFolder, **values: Any) -> list[str]:
    """The recipe and its overrides, with other values for some keys."""
    kept = [word for word in shlex.split(run.command_line) if word.partition("=")[0] not in values]
    return kept + [f"{key}={json.dumps(value)}" for key, value in values.items()]


def measure(run: BestOfRun, number: int, adapter: str | None, first: str | None) -> alarms.EvalPoint:
    """Samples an answer to each held-out prompt and scores it; the KL is from the policy before the first round."""
    words = words_with(run, **{"ppo.start_from": adapter})
    now = RunFolder(load(words[0], words[1:], "ppo"), "ppo", run.command_line, "best_of")
    read = read_rows(now, prompts)

    from qalign.data.collate import MicroBatchLimit
    from qalign.rl.ppo_setup import read_answers, set_up
    from qalign.rl.rewards import combined, restore_scorers, scorers_state, spread_of

    setup = set_up(now, read, trainable=False)
    if first:
        setup.base.load_reference(first)
    limit = MicroBatchLimit(tokens=2 * run.recipe.model.max_length)
    setup.scorers.attach(setup.base, limit)
    if run.zeros:
        restore_scorers(setup.scorers.all, run.zeros)
    rows = setup.sample(setup.rows.held_out, 1, SEED)
    proxy, judges = combined(setup.scorers.reward, rows)[0], setup.scorers.judge
    judge = combined(judges, rows)[0] if judges else None
    run.zeros = zeros if any(zeros := scorers_state(setup.scorers.all)) else None
    rollout = read_answers(setup.base, rows, limit, setup.sampling.temperature)
    if not rollout.old_logps.isfinite().all():
        raise not_finite(f"round {number}", "log-probs of held-out answers are")
    current().first(lambda: write_samples(run.path, number, rollout.samples(proxy, judge), unit="round"))
    return rollout.point(number, proxy, judge, spread=spread_of(setup.scorers.reward))


def _finish(run: BestOfRun, lines: list[dict[str, Any]]) -> None:
    """Writes adapter, report and summary, and prints what every round gained."""
    with replacing_folder(run.adapter) as aside:
        shutil.copytree(lines[-1]["adapter"], aside, dirs_exist_ok=True)
    points = [alarms.EvalPoint(**line["point"]) for line in lines if line["point"]]
    rounds = lines[-1]["round"]
    facts: dict[str, Any] = {"n": run.n, "rounds": rounds, "adapter": str(run.adapter), "evaluations": lines}
    shown = [("adapter", f"{run.adapter}: of round {rounds}; the rounds' own are in {run.path}/round_*/dpo")]
    if points:
        best, raised = alarms.best_point(points), alarms_of(points)
        facts |= {"best_round": best.step, "alarms": raised, "reference": "the policy that each round starts from"}
        shown += [(f"round {point.step}" if point.step else "before", in_words(point)) for point in points]
        shown += [("alarm", text) for text in raised]
        if best.step != rounds:
            shown.append(("best", f"round {best.step}: {Path(lines[best.step]['adapter'] or 'the first policy')}"))
        rounds_report.draw(points, run.path / REPORT)
        shown.append(("report", str(run.path / REPORT)))
    else:
        shown.append(("held out", "no prompts: add ppo.eval_data or ppo.holdout to see what each round gains"))
    write_whole(run.summary, json.dumps(facts | {"wall_seconds": run.wall_seconds}, indent=1) + "\n")
    last = Path(lines[-1]["adapter"]).parent
    print_table("done", [*shown, ("next", f"{program('page')} {shlex.quote(os.path.relpath(last))}")])


def alarms_of(points: list[alarms.EvalPoint]) -> list[str]:
    """The alarms that any round raised, each as it is said last; a round is far enough apart to count by itself."""
    found = {}
    for end in range(2, len(points) + 1):
        for text in alarms.alarms(points[:end], patience=1):
            said = re.sub(r"\bstep(s?)\b", r"round\1", text.replace("kl_coefficient", "dpo.beta"))
            found[said[:20]] = said
    return list(found.values())


def in_words(point: alarms.EvalPoint) -> str:
    """An evaluation in one line."""
    judged = "" if point.judge is None else f", judge {point.judge:+.3f}"
    ends = f"{point.length:.0f} tokens, {point.ended:.0%} end"
    return f"held-out reward {point.proxy:+.3f}{judged}, KL {point.kl_nats:.2f} nats, {ends}"
