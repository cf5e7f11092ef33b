"""`python -m qalign.page` opens the page, as `qalign page` and `python app.py` do."""

from qalign.page.launch import main

main()
