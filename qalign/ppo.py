"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155).

    python -m qalign.ppo RECIPE [key=value …] [--resume | --overwrite]

Policy, reference, reward model and value model are adapters and heads on one 4-bit base. The loop itself is
`qalign.ppo_trainer`: collect, score, advantages, update. The reward is a stand-in for what is wanted, and the policy is
paid for its faults, so held-out prompts are looked at all along (`qalign.looks`). Details and their sources: docs/ppo.md.
"""

from qalign.recipe import Recipe
from qalign.run import RunFolder
from qalign.stage import stage_command


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a policy to earn a reward, held to its reference by KL, and save the adapter."""
    from qalign.prompts import prompts

    settings, parent = recipe.ppo, run.parent
    rows, refused = prompts(settings.data, settings.split, settings.limit, recipe.seed)
    run.check_refused("ppo.data", refused, len(rows))
    held_out, unread = prompts(settings.eval_data or (), settings.split, None, recipe.seed)
    if settings.eval_data:
        run.check_refused("ppo.eval_data", unread, len(held_out))

    # Imported here, not above: torch takes seconds, and a bad recipe must not wait for it.
    from transformers import set_seed

    from qalign import lineage
    from qalign.base import Role, load
    from qalign.looks import Watcher
    from qalign.loop import micro_batch, plan
    from qalign.memory import longest_row
    from qalign.ppo_loop import iterations_of, print_header, train_to_the_end
    from qalign.ppo_trainer import PPOTrainer
    from qalign.rewards import attach, open_scorers, value_start
    from qalign.rollout import Sampling, end_ids, engine
    from qalign.tokens import encode_questions
    from qalign.weights import check_reach

    check_reach(recipe.model)
    scorers, judges = (open_scorers(recipe, key, run) for key in ("reward", "judge"))
    base = load(recipe.model)
    origin = base.lineage(run.stage, parent)
    room = recipe.model.max_length - settings.max_new_tokens
    questions, unfit = encode_questions(base.tokenizer, rows, room, recipe.model.chat_template_kwargs)
    run.check_refused("ppo.data", refused + unfit, len(questions))
    held_out, unfit_too = encode_questions(base.tokenizer, held_out, room, recipe.model.chat_template_kwargs)
    if settings.eval_data:
        run.check_refused("ppo.eval_data", unread + unfit_too, len(held_out))

    set_seed(recipe.seed)
    if parent:
        lineage.check("ppo.start_from", parent, origin)
        base.load_adapter(Role.POLICY, parent, trainable=True)
        base.load_reference(parent)
    else:
        base.add_adapter(Role.POLICY, recipe.lora)
    planned = plan(run, base, longest_row(recipe, run.stage))
    micro = micro_batch(settings, planned)
    attach(scorers, base, Role.REWARD, micro)
    attach(judges, base, Role.JUDGE, micro)
    if settings.value == "trunk":
        base.add_head(Role.VALUE)
    elif folder := value_start(scorers):
        base.load_adapter(Role.VALUE, folder, trainable=True)
    else:  # no reward model to begin from
        base.add_adapter(Role.VALUE, recipe.lora.model_copy(update={"init": "default"}))
        base.add_head(Role.VALUE)

    run.begin(refused + unfit + unread + unfit_too)
    checkpoint, _ = run.rewind()
    ends = end_ids(base.tokenizer, recipe.model.chat_template_kwargs)
    trainer = PPOTrainer(
        base,
        settings,
        questions,
        scorers,
        engine(settings.engine, base, recipe.model.max_length, recipe.lora.r),
        Sampling(settings.max_new_tokens, settings.temperature, ends),
        micro,
        planned.checkpointed_layers,
        iterations_of(settings, len(questions)),
        recipe.seed,
    )
    watcher = Watcher(run, trainer, held_out, judges, origin)
    counts = {"used": len(questions), "held_out": len(held_out), "refused": len(refused + unfit + unread + unfit_too)}
    print_header(run, trainer, judges, f"{micro}{planned}", checkpoint, counts)
    facts = train_to_the_end(run, trainer, watcher, checkpoint)
    base.save_adapter(Role.POLICY, run.adapter)
    lineage.write(run.adapter, origin)
    run.finish(
        f"python -m qalign.best_of {run.command_line} n=16",
        base.origin.source,
        reference=base.reference,
        rows=counts,
        **facts,
    )


if __name__ == "__main__":
    stage_command("ppo", train)
