"""What a person has chosen in the tab Train, as the commands that do it. Imports neither torch nor Gradio."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from qalign.config.load import load, recipe_file
from qalign.config.recipe import Recipe
from qalign.config.stages import STAGES
from qalign.config.yaml_file import parse
from qalign.errors import UserError, program, short
from qalign.fit import memory_of
from qalign.train.run_folder import RunFolder

MAX_WORDS = 50  # settings of a run


@dataclass(frozen=True)
class Job:
    """A stage of a recipe with its data and settings. Every text is one word of a command, and none goes through a
    shell."""

    recipe: str
    stage: str
    data: str = ""  # a path or a hub id; empty for the recipe's own
    settings: str = ""  # `key=value`, one a line
    card: str = ""  # its memory, such as 12GB; empty for this computer's
    overwrite: bool = False  # whether a run that is there is replaced

    @property
    def overrides(self) -> list[str]:
        """Words of the form `key=value`; a `UserError` if a line is none."""
        words = [f"{self.stage}.data={self.data}"] if self.data else []
        for line in filter(None, map(str.strip, self.settings.splitlines())):
            if "=" not in line or line.startswith("-"):
                raise UserError(f"settings: {short(line)} is not KEY=VALUE, such as {self.stage}.max_steps=20")
            words.append(line)
        if len(words) > MAX_WORDS:
            raise UserError(f"settings: {len(words)} lines; at most {MAX_WORDS}")
        return words

    def resolved(self) -> Recipe:
        """The recipe as the stage reads it; a `UserError` with all its problems."""
        if self.recipe.startswith("-") or self.stage not in STAGES:
            raise UserError("choose a recipe and a stage of it")
        return load(self.recipe, self.overrides, self.stage)

    def run(self) -> RunFolder:
        """The run that training makes."""
        return RunFolder(self.resolved(), self.stage, shlex.join([self.recipe, *self.overrides]))

    def check(self) -> list[str]:
        return [self.stage, self.recipe, *self.overrides, "--check"]

    def fit(self) -> list[str]:
        if self.card:
            memory_of(self.card)
        return ["fit", self.recipe, *self.overrides, *(["--memory", self.card] if self.card else [])]

    def train(self) -> list[str]:
        return [self.stage, self.recipe, *self.overrides, *(["--overwrite"] if self.overwrite else [])]

    def resume(self) -> list[str]:
        return [self.stage, self.recipe, *self.overrides, "--resume"]


def typed(words: list[str]) -> str:
    """A command as a person types it: the name of the command, then its words."""
    return f"{program(words[0])} {shlex.join(words[1:])}"


def executed(words: list[str]) -> list[str]:
    """The same as a process is started."""
    return [sys.executable, "-m", f"qalign.{words[0]}", *words[1:]]


def stages_of(recipe: str) -> list[str]:
    """The stages that a recipe has; empty if it can't be read."""
    try:
        raw, _ = parse(recipe_file(recipe))
    except (UserError, OSError):
        return []
    return [stage for stage in STAGES if raw.get(stage)]


def recipes(folder: Path) -> list[str]:
    """The recipes in a folder and in its `recipes/`, as a command names them from there."""
    found = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("recipes/*.yaml"))]
    return [name for file in found if stages_of(name := str(file.relative_to(folder)))]
