"""What the tests of recipe files share: small recipes as text, fixtures that load them or return their problems, and
the shipped recipes."""

from pathlib import Path

import pytest

from qalign.config.load import load
from qalign.config.recipe import Recipe
from qalign.config.stages import DPO, GRPO, KTO, PPO, RL_STAGES, SFT, STAGES, Reward, Stage
from qalign.errors import UserError
from tests.conftest import ROOT

NAMES = sorted(file.stem for file in (ROOT / "recipes").glob("*.y*ml"))
DEMO = "smollm2_demo"
DEMOS = (DEMO, "smollm2_goodhart", "smollm2_grpo", "smollm2_kto", "constitution_demo")  # without GPU or download
SECTIONS = {"sft": SFT, "reward": Reward, "dpo": DPO, "kto": KTO, "ppo": PPO, "grpo": GRPO}
PPO_AT = 4 + 2 * STAGES.index("ppo")  # the line of `ppo:` in `with_stages`
GOOD = """\
model:
  base: org/model
output: runs/x
dpo:
  data: pairs.jsonl
"""


REWARDS = """\
import math as maths
from statistics import mean

length = lambda completions: [len(text) for text in completions]

try:
    def fast(completions): ...
except ImportError:
    fast = None

def short(completions):
    inside = 1
    return [1.0 / len(text) for text in completions]

class Judge:
    def within(self): ...
"""


def make_adapter(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "adapter_config.json").touch()


def with_stages(**settings: str) -> str:
    """A good recipe with all stages; an extra setting of a stage is two lines below its name."""
    lines = ["model: {base: org/model}", "output: runs/x", "lora: {r: 8}"]
    for stage in STAGES:
        lines += [f"{stage}:", "  data: pairs.jsonl", *([f"  {settings[stage]}"] if stage in settings else [])]
        lines += ["  reward: reward"] if stage in RL_STAGES and "reward:" not in settings.get(stage, "") else []
    return "\n".join(lines) + "\n"


def line_of(stage: str, text: str) -> int:
    """The line of a stage's name."""
    return text.splitlines().index(f"{stage}:") + 1


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with an empty `pairs.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    return tmp_path


@pytest.fixture
def read(folder):
    """Loads a recipe's text as `recipe.yaml`."""

    def read(text: str, *overrides: str, stage: str | None = None) -> Recipe:
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        return load("recipe.yaml", overrides, stage)

    return read


@pytest.fixture
def problems(read):
    """The lines with which a recipe's text is refused."""

    def problems(text: str, *overrides: str, stage: str | None = None) -> list[str]:
        with pytest.raises(UserError) as caught:
            read(text, *overrides, stage=stage)
        assert all("\n" not in line for line in caught.value.lines)
        return list(caught.value.lines)

    return problems


@pytest.fixture
def only_problem(problems):
    """Asserts that a text has one problem, in this line of `recipe.yaml` or on the command line, with these words."""

    def only_problem(place: int | str, words: str, text: str, *overrides: str, stage: str | None = None) -> None:
        (line,) = problems(text, *overrides, stage=stage)
        start = f"recipe.yaml:{place}: " if isinstance(place, int) else f"{place}: "
        assert line.startswith(start), line
        for word in words.split(" … "):
            assert word in line

    return only_problem


@pytest.fixture
def scorers(folder) -> Path:
    """The current directory with functions, a reward run, a model, and a folder that is neither."""
    (folder / "rewards.py").write_text(REWARDS)
    make_adapter(folder / "runs" / "a" / "reward" / "adapter")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()
    (folder / "empty").mkdir()
    (folder / "notes.txt").touch()
    return folder


# --- the shipped recipes ---------------------------------------------------------------------------------------------


def text_of(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture(params=NAMES)
def name(request, monkeypatch) -> str:
    """Each shipped recipe; the current directory is the project's, as the recipes say."""
    monkeypatch.chdir(ROOT)
    return request.param


@pytest.fixture
def recipe(name) -> Recipe:
    return load(f"recipes/{name}.yaml")


@pytest.fixture
def sections(recipe) -> dict[str, Stage]:
    """The sections of the stages that a recipe has."""
    return {stage: getattr(recipe, stage) for stage in recipe.stages}
