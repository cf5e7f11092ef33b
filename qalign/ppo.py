"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155).

    python -m qalign.ppo RECIPE [key=value …] [--resume | --overwrite | --check]

Policy, reference, reward model and value model are adapters and heads on one 4-bit base. `qalign.rl.ppo_trainer` holds
one iteration: collect, score, advantages, update. A policy may learn to exploit the faults of its reward, so
`qalign.rl.monitor` evaluates held-out prompts while it trains. docs/ppo.md gives the source of each detail.
"""

import shlex
from functools import partial
from typing import cast

from qalign.cli import program, stage_command
from qalign.config.recipe import Recipe
from qalign.config.stages import PPO
from qalign.data.formats import prompts
from qalign.train.dataset import ReadRows, read_rows
from qalign.train.run_folder import RunFolder


def raw_rows(run: RunFolder) -> ReadRows:
    """What the stage reads."""
    return read_rows(run, prompts)


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a policy to earn a reward, held to its reference by KL, and save the adapter."""
    read = raw_rows(run)

    # Imported here, not above: torch takes seconds, and a bad recipe or bad data must not wait for it.
    from qalign.model.memory.forecast import longest_row
    from qalign.rl.monitor import Monitor
    from qalign.rl.ppo_loop import PPOLoop, header
    from qalign.rl.ppo_setup import add_value_model, set_up
    from qalign.rl.ppo_trainer import PPOTrainer
    from qalign.train.loop import Session, planned_steps

    settings = cast(PPO, run.settings)
    setup = set_up(run, read, trainable=True)  # the base with policy and reference
    base, rows = setup.base, setup.rows
    session = Session(run, base, rows)
    session.plan(longest_row(recipe, run.stage), setup.other_bytes)
    setup.scorers.attach(base, session.micro)
    add_value_model(base, run, setup.scorers.reward)

    session.begin()
    iterations = planned_steps(settings, len(rows.train))
    trainer = PPOTrainer(setup, settings, session.micro, session.planned.checkpointed_layers, iterations, recipe.seed)
    loop = PPOLoop(run, trainer, Monitor(run, trainer))
    session.print_header(**header(trainer, settings))
    facts = session.to_the_end(lambda: loop.run(session.checkpoint))
    page = f"{program('page')} {shlex.quote(str(run.path))}"
    following = f"{program('best_of')} {run.command_line} n=16" if run.stage == "ppo" else page
    session.finish(following, reference=base.reference, **facts | session.world.first(loop.report))


main = partial(stage_command, "ppo", train, raw_rows)

if __name__ == "__main__":
    main()
