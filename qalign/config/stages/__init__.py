"""The recipe's sections for data and for the stages; `qalign.config.recipe` has the rest.

The docstring under each key begins with the field's own term. Editors show it (`recipes/recipe.schema.json`), and
`docs/recipe.md` lists it: after a change run `make docs` (`python docs/make_recipe.py`).
"""

from qalign.config.stages.constitution import Constitution
from qalign.config.stages.goodhart import GOLD_PAIRS, Goodhart
from qalign.config.stages.preferences import DPO, DPO_LOSSES, KTO, REFERENCE_FREE, PolicyStage, Reward, needs_reference
from qalign.config.stages.reinforcement import GRPO, PPO
from qalign.config.stages.section import (
    MAX_BATCH,
    MAX_LAYERS,
    MAX_STEPS,
    MAX_TOKENS,
    RewardSource,
    Section,
    Share,
    ShareBelowOne,
    Source,
    Stage,
)
from qalign.config.stages.supervised import SFT

CONSTITUTION = "constitution"
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo")
# Their adapters generate answers; the latest stage comes first.
ANSWERING_STAGES = ("grpo", "ppo", "kto", "dpo", "sft")
SECTIONS = (CONSTITUTION, *STAGES)  # what `python -m qalign RECIPE` runs; the first one makes data for the others
RL_STAGES = ("ppo", "grpo")  # they learn from answers that they sample, and have a section `PPO`
OTHERS = (CONSTITUTION, "goodhart")  # sections of commands that train no adapter of their own
SFT_RUN = "sft"  # as `start_from`
REWARD_RUN = "reward"  # as a reward of PPO and GRPO
OWN_DATA = {
    stage: "revisions.jsonl" if stage == "sft" else "pairs.jsonl" for stage in STAGES
}  # as `data: constitution`

__all__ = [
    "ANSWERING_STAGES",
    "CONSTITUTION",
    "DPO",
    "DPO_LOSSES",
    "GOLD_PAIRS",
    "GRPO",
    "KTO",
    "MAX_BATCH",
    "MAX_LAYERS",
    "MAX_STEPS",
    "MAX_TOKENS",
    "OTHERS",
    "OWN_DATA",
    "PPO",
    "REFERENCE_FREE",
    "REWARD_RUN",
    "RL_STAGES",
    "SECTIONS",
    "SFT",
    "SFT_RUN",
    "STAGES",
    "Constitution",
    "Goodhart",
    "PolicyStage",
    "Reward",
    "RewardSource",
    "Section",
    "Share",
    "ShareBelowOne",
    "Source",
    "Stage",
    "needs_reference",
]
