"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO, RLOO and GSPO: PPO without a value
model.

    python -m qalign.grpo RECIPE [key=value …] [--resume | --overwrite | --check]

It is `qalign.ppo` with a section `grpo:` of its own in the recipe, whose defaults are GRPO's: the answers to a prompt
are compared with each other. docs/ppo.md gives the source of each detail.
"""

from functools import partial

from qalign import ppo
from qalign.cli import stage_command
from qalign.config.recipe import Recipe
from qalign.train.run_folder import RunFolder


def train(recipe: Recipe, run: RunFolder) -> None:
    """Teach a policy to earn a reward without a value model: answers to the same prompt are compared."""
    ppo.train(recipe, run)


main = partial(stage_command, "grpo", train, ppo.raw_rows)

if __name__ == "__main__":
    main()
