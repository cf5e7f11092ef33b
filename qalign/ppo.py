"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155).

    python -m qalign.ppo RECIPE [key=value …] [--resume | --overwrite]

Policy, reference, reward model and value model are adapters and heads on one 4-bit base. The loop itself is
`qalign.rl.ppo_trainer`: collect, score, advantages, update. The reward is a stand-in for what is wanted, and the policy is
paid for its faults, so held-out prompts are looked at all along (`qalign.rl.monitor`). Each detail and its source:
docs/ppo.md.
"""

from qalign.cli import stage_command
from qalign.config.recipe import Recipe
from qalign.train.run_folder import RunFolder


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a policy to earn a reward, held to its reference by KL, and save the adapter."""
    from qalign.train.dataset import encode_prompts, read_prompts

    settings, parent = recipe.ppo, run.parent
    found = read_prompts(run)

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign.model import lineage
    from qalign.model.base import Role, load
    from qalign.model.generation import Sampling, end_ids, engine
    from qalign.model.loading import check_reach
    from qalign.model.memory import longest_row
    from qalign.rl.monitor import Monitor
    from qalign.rl.ppo_loop import iterations_of, print_header, train_to_the_end
    from qalign.rl.ppo_trainer import PPOTrainer
    from qalign.rl.rewards import attach, load_models, open_scorers, value_start
    from qalign.train.loop import micro_batch, plan

    check_reach(recipe.model)
    scorers, judges = (open_scorers(recipe, key, run) for key in ("reward", "judge"))
    base = load(recipe.model)
    origin = base.lineage(run.stage, parent)
    questions, held_out, refused, rows = encode_prompts(run, base.tokenizer, found)

    set_seed(recipe.seed)
    if parent:
        lineage.check("ppo.start_from", parent, origin)
        base.load_adapter(Role.POLICY, parent, trainable=True)
        base.load_reference(parent)
    else:
        base.add_adapter(Role.POLICY, recipe.lora)
    sampler = engine(settings.engine, base, recipe.model.max_length)
    others = load_models([*scorers, *judges], base)
    planned = plan(run, base, longest_row(recipe, run.stage), others)  # of what these leave
    micro = micro_batch(settings, planned)
    attach(scorers, base, Role.REWARD, micro)
    attach(judges, base, Role.JUDGE, micro)
    if settings.value == "trunk":
        base.add_head(Role.VALUE)
    elif copied := value_start(scorers):
        base.load_adapter(Role.VALUE, str(copied.folder), trainable=True)
    else:  # no reward model to begin from
        base.add_adapter(Role.VALUE, recipe.lora.model_copy(update={"init": "default"}))
        base.add_head(Role.VALUE)

    run.begin(refused)
    checkpoint, _ = run.rewind()
    ends = end_ids(base.tokenizer, recipe.model.chat_template_kwargs)
    trainer = PPOTrainer(
        base,
        settings,
        questions,
        scorers,
        sampler,
        Sampling(settings.max_new_tokens, settings.temperature, ends),
        micro,
        planned.checkpointed_layers,
        iterations_of(settings, len(questions)),
        recipe.seed,
    )
    watcher = Monitor(run, trainer, held_out, judges, origin)
    print_header(run, trainer, judges, f"{micro}{planned}", checkpoint, rows)
    facts = train_to_the_end(run, trainer, watcher, checkpoint)
    base.save_adapter(Role.POLICY, run.adapter)
    lineage.write(run.adapter, origin)
    run.finish(
        f"python -m qalign.best_of {run.command_line} n=16",
        base.origin.source,
        reference=base.reference,
        rows=rows,
        **facts,
    )


if __name__ == "__main__":
    stage_command("ppo", train)
