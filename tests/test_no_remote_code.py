"""Code that a model brings along is never run: every load says so, and a model that needs it is refused in one line."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from qalign.config.recipe import Model
from tests.conftest import ROOT
from tests.helpers import leaving

LOADS = ("from_pretrained", "from_config")
SOURCES = [ROOT / "app.py", *(ROOT / "qalign").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(file: Path) -> str:
    if file.suffix == ".py":
        return file.read_text(encoding="utf-8")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    return re.sub(r"(?m)^(\s*)[!%].*", r"\1pass", "\n".join(lines))  # a shell's commands


def trusting(code: str) -> list[str]:
    """The calls that load a model without saying `trust_remote_code=False`."""
    found = []
    for call in ast.walk(ast.parse(code)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr not in LOADS:
            continue
        given = {word.arg: word.value for word in call.keywords}
        value = given.get("trust_remote_code")
        if not (isinstance(value, ast.Constant) and value.value is False):
            found.append(f"{call.lineno}: {ast.unparse(call.func)}")
    return found


def test_what_the_walk_finds():
    assert trusting("A.from_pretrained(x)") == ["1: A.from_pretrained"]
    assert trusting("a.b().from_config(x, trust_remote_code=True)") == ["1: a.b().from_config"]
    assert trusting("A.from_pretrained(x, **more)") == ["1: A.from_pretrained"]
    assert trusting("A.from_pretrained(x, trust_remote_code=False)") == []


@pytest.mark.parametrize("file", [*SOURCES, *NOTEBOOKS], ids=lambda file: str(file.relative_to(ROOT)))
def test_every_load_refuses_the_code_of_strangers(file):
    assert trusting(code_of(file)) == []
    assert "trust_remote_code=True" not in code_of(file)


@pytest.fixture
def stranger(tiny_folder, tmp_path):
    """A copy of the tiny model whose code leaves a mark if it is run."""

    def make(file: str, **settings) -> Path:
        folder = tmp_path / "stranger"
        if not folder.exists():
            shutil.copytree(tiny_folder, folder)
            mark = f"from pathlib import Path\nPath({str(tmp_path / 'was_run')!r}).touch()\n"
            (folder / "theirs.py").write_text(mark + "class Config: pass\nclass LM: pass\nclass Tokenizer: pass\n")
        kept = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(kept | settings))
        return folder

    yield make
    assert not (tmp_path / "was_run").exists()


THEIRS = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.LM"}


def test_a_base_that_only_its_own_code_can_load_is_refused_without_a_question(
    stranger, recipe_file, capsys, monkeypatch
):
    from qalign import dpo, fit

    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    base = str(stranger("config.json", model_type="theirs", architectures=["LM"], auto_map=THEIRS))
    for command in (dpo.main, fit.main):
        assert leaving(command, recipe_file(model={"base": base})) == 2
        told = capsys.readouterr()
        (line,) = told.err.splitlines()
        assert line.startswith(f"model.base: '{base}' brings code of its own (`auto_map`), which qalign never runs")
        assert len(line) <= 300


def test_a_base_with_code_that_transformers_does_not_need_is_loaded_without_it(stranger, capsys):
    from qalign.model.base import load

    base = str(stranger("config.json", auto_map=THEIRS))
    stranger("tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Tokenizer", None]})
    assert type(load(Model(base=base, compute_dtype="float32")).lm).__name__ == "LlamaForCausalLM"
    said = capsys.readouterr().out
    for name in ("config.json", "tokenizer_config.json"):
        assert said.count(f"'{base}' brings code of its own (`auto_map` in {name}), which is never run") == 1


def test_a_tokenizer_that_only_its_own_code_can_load_is_refused(stranger, capsys):
    from qalign.errors import UserError
    from qalign.model.base import load

    ours = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    folder = stranger("tokenizer_config.json", tokenizer_class="TheirTokenizer", auto_map=ours)
    stranger("config.json", model_type="theirs", auto_map=THEIRS)
    with pytest.raises(UserError, match="brings code of its own"):
        load(Model(base=str(folder), compute_dtype="float32"))


def test_a_reward_model_is_loaded_without_its_code_too(stranger):
    import torch

    from qalign.errors import UserError
    from qalign.model.loading import load_scorer

    code = {"AutoConfig": "theirs.Config", "AutoModelForSequenceClassification": "theirs.LM"}
    folder = stranger("config.json", model_type="theirs", auto_map=code)
    with pytest.raises(UserError, match=r"ppo\.reward: .* brings code of its own"):
        load_scorer(str(folder), "ppo.reward", torch.float32, torch.device("cpu"))
