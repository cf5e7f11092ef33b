"""Compares a base with aligned models, side by side, in a browser; `qalign page` is the same.

    python app.py                               # the newest run under runs/ against its base
    python app.py runs/a/dpo runs/b/ppo         # any two runs, or `base`

Only this computer can open the page, unless --host or --share are given; those need --auth.
"""

from qalign.page.launch import main

if __name__ == "__main__":
    main()
