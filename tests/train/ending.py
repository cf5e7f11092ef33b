"""A command for the tiny base, of whose tokens a tenth ends an answer: `python -m tests.train.ending COMMAND …`."""

import runpy
import sys

from qalign.data import tokenize

if __name__ == "__main__":
    own = tokenize.end_of_turn_ids
    tokenize.end_of_turn_ids = lambda template: tuple(dict.fromkeys([*own(template), *range(0, 2006, 10)]))
    runpy.run_module(f"qalign.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
