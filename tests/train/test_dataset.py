"""What the header says of a stage's rows: columns, rows that are in two places, margins the wrong way round."""

from types import SimpleNamespace

import pytest

from qalign.config.recipe import Recipe
from qalign.data.formats import dialogues, labelled_answers, preferences, prompts, scored_preferences
from qalign.errors import UserError
from qalign.train.dataset import ROWS_HASH, check_same_rows, encode_rows, read_rows, record
from qalign.train.run_folder import RunFolder

READERS = {"sft": dialogues, "reward": preferences, "dpo": preferences, "kto": labelled_answers, "ppo": prompts}


@pytest.fixture
def notes(tmp_path, write_jsonl):
    """The header's lines on rows: `data` and `eval_data` are lists of files, each a list of rows."""

    def lines(stage: str, *files: list, eval_data=None, takes=(), read=None, left_out=(), **keys) -> list:
        section = {"data": [write_jsonl(f"{number}.jsonl", rows) for number, rows in enumerate(files)], **keys}
        section |= {"eval_data": write_jsonl("held_out.jsonl", eval_data)} if eval_data else {}
        section |= {"reward": "mine.py:reward", "batch_size": 4, "samples_per_prompt": 2} if stage == "ppo" else {}
        recipe = Recipe.model_validate({"model": {"base": "b"}, "output": str(tmp_path / "runs"), stage: section})
        run = RunFolder(recipe, stage)
        found = read_rows(run, read or READERS[stage])
        found.intake.by_rewards = set(takes)
        template = SimpleNamespace(left_out=set(left_out))
        encoded = encode_rows(run, template, found, lambda template, rows, length: (rows, []))
        return [(name, text.replace(str(tmp_path) + "/", "")) for name, text in encoded.notes]

    return lines


def pair(number: int, **more) -> dict:
    return {"prompt": f"{number}?", "chosen": "Yes", "rejected": "No", **more}


@pytest.mark.parametrize(
    ("stage", "row", "read", "unread"),
    [
        ("dpo", pair(1, system_prompt="Be brief.", topic="a", score_chosen=2, score_rejected=1),
         "prompt, chosen, rejected, system_prompt", "topic, score_chosen, score_rejected"),
        ("reward", pair(1, score_chosen=2, score_rejected=1),
         "prompt, chosen, rejected, score_chosen, score_rejected", ""),
        ("dpo", {"question": "Why?", "response_j": "Yes", "response_k": "No", "qid": 7},
         "question, response_j, response_k", "qid"),
        ("sft", {"instruction": "Why?", "context": "It rains.", "response": "Yes", "category": "x", "none": None},
         "instruction, context, response", "category"),
        ("sft", {"messages": [{"role": "user", "content": "Why?", "id": 1, "ts": None},
                              {"role": "assistant", "content": "Yes", "timestamp": "noon"}], "tools": []},
         "messages, tools", "messages[].id, messages[].timestamp"),
        ("sft", {"text": "Once.", "system": "Be brief.", "source": "book"}, "text", "system, source"),
        ("ppo", {"prompt": "Why?", "answer": 4, "meta": {"a": 1}}, "prompt", "answer, meta"),
    ],
)  # fmt: skip
def test_columns_are_named_once_with_what_reads_them(notes, stage, row, read, unread):
    expected = [("data", f"columns read: {read}")] + ([("", f"columns not used: {unread}")] if unread else [])

    assert notes(stage, [row]) == expected


def test_facts_of_turns_that_the_template_does_not_show_are_named(notes):
    said = notes("sft", [{"prompt": "1?", "completion": "Yes"}], left_out=["tool_call_id", "name"])
    assert said[-1] == ("", "not used by the chat template: name, tool_call_id")


def test_a_column_is_not_used_if_no_row_of_any_source_has_it_read(notes):
    said = notes("dpo", [pair(1, topic="a"), pair(2, system="Be brief.")], [pair(3, system=None, id=7)])

    assert said[:2] == [
        ("data", "columns read: prompt, chosen, rejected, system"),
        ("", "columns not used: topic, id"),
    ]


def test_columns_that_a_reward_function_takes_are_used(notes):
    assert notes("ppo", [{"prompt": "Why?", "answer": 4, "id": 7}], takes=["answer"]) == [
        ("data", "columns read: prompt"),
        ("", "columns for the rewards: answer"),
        ("", "columns not used: id"),
    ]


def test_rows_that_are_in_two_sources_or_in_the_held_out_rows_too_are_counted(notes):
    one, two = [pair(1), pair(2), pair(3)], [pair(2, topic="a"), pair(3), pair(4), pair(2)]

    assert notes("dpo", one, two, eval_data=[pair(4), pair(5), pair(1)])[2:] == [
        ("overlap", "3 of the 4 rows of 1.jsonl are in 0.jsonl too"),
        ("overlap", "2 rows of eval_data are in data too: they don't measure what was learned"),
    ]
    assert notes("dpo", one, [pair(4)], eval_data=[pair(5)])[1:] == []


def test_other_answers_to_the_same_prompt_are_other_rows(notes):
    assert len(notes("dpo", [pair(1)], eval_data=[pair(1, chosen="Sure")])) == 1


def test_scores_the_wrong_way_round_are_counted_where_they_are_trained_on(notes):
    rows = [pair(number, score_chosen=score, score_rejected=7) for number, score in enumerate((2, 9, "6.5", 7))]

    said = notes("reward", rows, margin=True, read=scored_preferences)

    assert said[1:] == [("margins", "score_chosen is below score_rejected in 2 of 4 rows")]
    assert notes("reward", rows)[1:] == []


TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "weight": 0}]
ANSWERED = {"messages": [*TALK, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]}
TRAINED = {"messages": [*TALK[:1], {"role": "assistant", "content": "So."}, *ANSWERED["messages"][2:]]}


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        ("dpo", [pair(1), pair(2)], [pair(1), pair(2, rejected="Never")]),
        ("dpo", [pair(1), pair(2)], [pair(2), pair(1)]),
        ("dpo", [pair(1), pair(2)], [pair(1), pair(2), pair(3)]),
        ("sft", [ANSWERED], [TRAINED]),
        ("ppo", [{"prompt": "Why?", "answer": 4}], [{"prompt": "Why?", "answer": 5}]),
    ],
)
def test_a_run_goes_on_with_the_rows_that_it_began_with(tmp_path, write_jsonl, stage, before, after):
    more = {"reward": "mine.py:reward"} if stage == "ppo" else {}

    def resumed(name: str, rows: list) -> RunFolder:
        section = {
            "data": str(write_jsonl(name, rows)),
            "eval_data": str(write_jsonl("held_out.jsonl", before)),
            **more,
        }
        recipe = Recipe.model_validate({"model": {"base": "b"}, "output": str(tmp_path / "runs"), stage: section})
        run = RunFolder(recipe, stage)
        run.resume = True
        return run

    run = resumed("rows.jsonl", before)
    run.path.mkdir(parents=True)
    template = SimpleNamespace(is_dated=False, left_out=set())
    rows = encode_rows(run, template, read_rows(run, READERS[stage]), lambda template, rows, length: (rows, []))
    record(run, rows, template)

    read_rows(run, READERS[stage])
    read_rows(resumed("moved.jsonl", before), READERS[stage])
    with pytest.raises(UserError, match=rf"^{stage}\.data: its rows are no longer those that .*{stage} began with"):
        read_rows(resumed("rows.jsonl", after), READERS[stage])
    with pytest.raises(UserError, match=rf"^{stage}\.eval_data: its rows"):
        check_same_rows(run, "eval_data", [])
    (run.path / ROWS_HASH).unlink()  # as an older run has none
    read_rows(resumed("rows.jsonl", after), READERS[stage])
