"""Both pictures are drawn whatever the numbers are, saved whole, and cost nothing until they are drawn."""

import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from qalign.reports import ppo_report, reward_report
from qalign.reports.alarms import EvalPoint
from qalign.reports.plots import picture
from tests.reports.test_ppo_report import SEARCH, START, THREE, unjudged
from tests.reports.test_reward_report import FOUR, pair, simulated

pytestmark = pytest.mark.pictures


def long_run(scale: float = 1.0, offset: float = 0.0) -> list[EvalPoint]:
    random = np.random.default_rng(1)
    rewards = (scale * random.normal(np.arange(60) / 20, 0.1) + offset).tolist()
    return [
        replace(START, step=25 * at, kl_nats=0.5 * at, proxy=reward, proxy_std=scale, judge=-reward, clipped=at / 600)
        for at, reward in enumerate(rewards)
    ]


def assert_png(file, width: int, height: int) -> None:
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (width, height)
    assert 20_000 < len(content) < 1_000_000
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing is left beside it


@pytest.mark.parametrize(
    "points",
    [
        THREE, THREE[:1], THREE[1:2], unjudged(THREE), unjudged(THREE[:1]), [*THREE[:2], *unjudged(THREE[2:])],
        [replace(START, step=step, proxy_std=0.0, judge_std=0.0, entropy=0.0, kl_nats=0.0) for step in range(5)],
        long_run(), long_run(1e-4, 1e3), long_run(1e5),
    ],
    ids=[
        "three", "start", "one later", "unjudged", "start, unjudged", "partly judged",
        "constant", "long", "small on a large offset", "large",
    ],
)  # fmt: skip
def test_every_ppo_run_is_drawn(points, tmp_path):
    ppo_report.draw(points, tmp_path / "ppo.png", best_of=SEARCH, alarm_steps=[0, 20])
    assert_png(tmp_path / "ppo.png", 1500, 900)


@pytest.mark.parametrize(
    "pairs",
    [
        FOUR[:1], FOUR, [pair(0.0, 0.0)] * 3, [pair(1e-4 * k, 0.0) for k in range(1, 9)],
        simulated(2000, skill=1.0), simulated(72, by_length=-5.0, longer_is_better=0.2),
    ],
    ids=["one", "four", "all equal", "hardly trained", "2000", "short"],
)  # fmt: skip
def test_every_reward_model_is_drawn(pairs, tmp_path):
    reward_report.draw(pairs, reward_report.measure(pairs), tmp_path / "report.png")
    assert_png(tmp_path / "report.png", 1200, 900)


def test_a_picture_that_fails_keeps_the_old_one(tmp_path):
    file = tmp_path / "old.png"
    file.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), picture(file, (2, 2), 0.1):
        raise ZeroDivisionError
    assert file.read_bytes() == b"old"


def test_importing_the_reports_loads_nothing_heavy_and_drawing_no_pyplot(tmp_path):
    """In a process of its own."""
    code = (
        "import sys; from pathlib import Path; from qalign.reports import alarms, ppo_report\n"
        "assert not {'torch', 'numpy', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "from qalign.reports import reward_report\n"
        "assert not {'torch', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "names = 'step answers kl_nats proxy proxy_std length ended distinct repeated entropy clipped'.split()\n"
        "point = alarms.EvalPoint(**{name: 1 for name in names}, judge=None, judge_std=None)\n"
        "ppo_report.draw([point], Path(sys.argv[1]))\n"
        "assert 'matplotlib' in sys.modules; assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "ppo.png")], check=True)
