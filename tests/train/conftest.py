"""Fixtures of the training tests."""

import pytest
import torch

from qalign.config.load import load
from tests.train.talks import write_kind


@pytest.fixture(scope="module")
def one_thread():
    """These models are too small for two threads, which wait for each other ten times as long on a busy machine. Gives
    the number of threads for those that are not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path, tiny_folder, write_jsonl):
    data = write_jsonl("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{base: {tiny_folder}}}\noutput: {tmp_path / 'runs'}\ndpo: {{data: {data}}}\n")
    return load(str(path))


@pytest.fixture(scope="session")
def kind_folder(tmp_path_factory):
    """Gives a folder with a tiny random model of some family (`tests.train.talks.KINDS`)."""
    made = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp("kinds") / kind)
            write_kind(kind, made[kind])
        return made[kind]

    return folder
