"""`qalign.export --to hub`: what is pushed is whole, says nothing about this machine, and is no checkpoint."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from qalign import export
from qalign.convert.hub import portable_text
from tests.helpers import leaving
from tests.reward_runs import run_stage, write_recipe

TOKEN = "hf_" + "s" * 34
BASE, REPO = "HuggingFaceTB/SmolLM2-135M-Instruct", "someone/house-style"
HOME = "/home/jane doe"  # with a space


class Hub:
    """Stands in for `HfApi` at its public methods: keeps what is pushed to it."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.error = folder, [], None

    def __call__(self) -> "Hub":
        return self

    def model_info(self, name: str):
        assert name == BASE
        data = huggingface_hub.ModelCardData(license="apache-2.0", datasets=["not/ours"], license_link="https://l")
        return type("Info", (), {"card_data": data})

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool):
        self.made.append((repo, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str):
        if self.error:
            raise self.error
        shutil.copytree(folder_path, self.folder / repo_id)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", found)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", HOME)
    return found


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A finished SFT and a reward run, with the reports that commands leave, which name places of this machine."""
    found = {}
    for stage in ("sft", "reward"):
        run = run_stage(write_recipe(tmp_path_factory.mktemp(stage) / "house", tiny_folder, stage))
        found[stage] = run.path
    figures = {
        "stage": "sft",
        "loss": {"before": 2.0, "after": 1.5},
        "perplexity": {"after": 4.5},
        "at": f"{HOME}/x.jsonl",
    }
    (found["sft"] / "evaluation.json").write_text(json.dumps(figures))
    after = {"value": 0.25, "interval": [0.1, 0.4], "count": 40}
    measure = {"name": "safe", "part": "harmless", "words": "harmful prompts refused", "after": after}
    h3 = {"run": str(found["sft"]), "judge": f"{HOME}/runs/reward", "measures": [measure, {"name": "x", "after": None}]}
    (found["sft"] / "h3.json").write_text(json.dumps(h3))
    (found["sft"] / "h3.png").write_bytes(b"\x89PNG")
    (found["sft"] / "samples").mkdir()
    (found["sft"] / "samples" / "step-0.jsonl").write_text('{"prompt": "private"}\n')
    return found


def test_a_run_is_pushed_whole(runs, hub, capsys):
    assert leaving(export.main, str(runs["sft"]), "--to", "hub", "--repo", REPO, "--base", BASE, "--private") == 0

    out = capsys.readouterr().out
    assert f"https://hub/{REPO}/commit/1" in out
    assert hub.made == [(REPO, True, True)]
    pushed = hub.folder / REPO
    assert (
        load_file(pushed / "adapter_model.safetensors").keys()
        == load_file(runs["sft"] / "adapter" / "adapter_model.safetensors").keys()
    )
    assert (pushed / "tokenizer.json").read_bytes() == (runs["sft"] / "adapter" / "tokenizer.json").read_bytes()
    assert {"recipe.yaml", "summary.json", "metrics.jsonl", "h3.png", "chat_template.jinja"} <= {
        file.name for file in pushed.iterdir()
    }
    assert all(file.is_file() for file in pushed.iterdir()), "no checkpoints, no samples"
    assert json.loads((pushed / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert yaml.safe_load((pushed / "recipe.yaml").read_text())["model"]["base"] == BASE
    assert len((pushed / "metrics.jsonl").read_text().splitlines()) == len(
        (runs["sft"] / "metrics.jsonl").read_text().splitlines()
    )


def test_its_card_says_what_the_hub_asks_for(runs, hub):
    assert leaving(export.main, str(runs["sft"]), "--to", "hub", "--repo", REPO, "--base", BASE) == 0

    card = ModelCard.load(hub.folder / REPO / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["license_link"]) == ("apache-2.0", "https://l")
    assert (data["pipeline_tag"], data["library_name"]) == ("text-generation", "peft")
    assert "datasets" not in data, "its rows are a file, and the base's data sets are not its own"
    (entry,) = data["model-index"]
    values = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert values == {"loss": 1.5, "perplexity": 4.5, "safe": 0.25}
    assert f'folder = "{REPO}"' in card.text
    assert f"vllm serve {BASE} --enable-lora" in card.text
    assert "![h3.png](h3.png)" in card.text
    assert "learning_rate" in card.text
    assert "\nThe run read its base from `model`" in card.text


def test_a_reward_run_is_a_classifier(runs, hub):
    assert leaving(export.main, str(runs["reward"]), "--to", "hub", "--repo", REPO, "--base", BASE) == 0

    data = ModelCard.load(hub.folder / REPO / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_nothing_of_this_machine_is_in_what_is_pushed(stage, runs, hub, tiny_folder, capsys):
    assert leaving(export.main, str(runs[stage]), "--to", "hub", "--repo", REPO, "--base", BASE) == 0

    places = [str(runs[stage].parents[1]), tiny_folder, HOME, "jane", str(Path.cwd()), TOKEN]
    for file in (hub.folder / REPO).iterdir():
        content = file.read_bytes()
        assert not [place for place in places if place.encode() in content], file.name
    assert TOKEN not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/jane/rows.jsonl", "rows.jsonl"),
        (f"{HOME}/my rows.jsonl", "my rows.jsonl"),
        ("read `/data/jane/rows.jsonl`, then /srv/b/c.", "read `rows.jsonl`, then c."),
        ("../jane/rows.jsonl and ~/a/b.py:many", "rows.jsonl and b.py:many"),
        (f"in {HOME}/x/y.txt", "in y.txt"),
        (r"C:\Users\jane\rows.jsonl", "rows.jsonl"),
        (r"in C:\Users\jane\rows.jsonl now", "in rows.jsonl now"),
        ("file:///data/jane/rows", "rows"),
        ("https://host/a/b, org/name, tokens/s, </details>, and/or/not", None),
        ("/base/model is there", "org/base is there"),
        *((home, "~") for home in (HOME, "/home/alice", "/Users/alice/", "~alice", r"C:\Users\alice")),
        ("/home/alice(1)/x/y", "y"),
        ("~alice/x and /home/alice", "x and ~"),
        ("1: /home/alice/runs/demo/reward", "1: reward"),
        ("~half of them", None),
    ],
)
def test_paths_become_names_and_nothing_else_changes(text, expected, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    assert portable_text(text, {"/base/model": "org/base"}) == (expected or text)


def test_a_dry_run_shows_all_of_it_and_pushes_nothing(runs, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "model_info", offline)
    assert leaving(export.main, str(runs["sft"]), "--to", "hub", "--repo", REPO, "--base", BASE, "--dry-run") == 0

    out = capsys.readouterr().out
    assert "base_model_relation: adapter" in out
    assert "adapter_model.safetensors" in out
    assert not hub.made


def offline(name: str):
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


def test_what_keeps_it_from_the_hub_is_one_line(runs, hub, monkeypatch, capsys):
    assert "--repo: None is no repository" in leave(capsys, runs, "--base", BASE)
    assert "no hub id, by which others could load it; give one with --base ORG/NAME" in leave(
        capsys, runs, "--repo", REPO
    )
    hub.error = ValueError(f"the header 'Bearer {TOKEN}' is wrong")
    line = leave(capsys, runs, "--repo", REPO, "--base", BASE)
    assert "HF_TOKEN" in line
    assert TOKEN not in line
    monkeypatch.setattr(hub, "model_info", offline)
    assert "card can't be read" in leave(capsys, runs, "--repo", REPO, "--base", BASE)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "set HF_TOKEN, or log in" in leave(capsys, runs, "--repo", REPO, "--base", BASE)


def leave(capsys, runs, *words: str) -> str:
    capsys.readouterr()
    assert leaving(export.main, str(runs["sft"]), "--to", "hub", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_keys_of_metrics_are_cleaned_and_only_the_adapter_is_copied(runs, hub, monkeypatch, tmp_path):
    run = tmp_path / "house" / "sft"
    shutil.copytree(runs["sft"], run)
    line = {"step": 1, f"scores/1: {HOME}/runs/a/reward": 0.5, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "lo', encoding="utf-8")
    (run / "adapter" / "notes.txt").write_text("mine")
    monkeypatch.setenv("HOME", HOME)
    assert leaving(export.main, str(run), "--to", "hub", "--repo", REPO, "--base", BASE) == 0

    pushed = hub.folder / REPO
    (row,) = map(json.loads, (pushed / "metrics.jsonl").read_text("utf-8").splitlines())
    assert row == {"step": 1, "scores/1: reward": 0.5, "loss": 1.0}
    assert not (pushed / "notes.txt").exists()
    own = {file.name for file in run.joinpath("adapter").iterdir()} - {"notes.txt"}
    assert own <= {file.name for file in pushed.iterdir()}


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "evaluation.json"])
def test_a_damaged_file_of_a_run_is_one_line(runs, hub, tmp_path, capsys, name):
    run = tmp_path / "house" / "sft"
    shutil.copytree(runs["sft"], run)
    (run / name).write_text('{"st')
    said = leave(capsys, {"sft": run}, "--repo", REPO, "--base", BASE)
    assert "is damaged" in said
    assert str(run) in said
