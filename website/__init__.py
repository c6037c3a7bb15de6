"""The project's site: its pages are in ``docs``, this package builds them, checks their links and runs their commands.

python -m website build          the site as HTML that needs no network (make site)
python -m website walk           every command of the pages, in order, in a clone of its own (make site-test)
python -m website leaderboard    docs/results/leaderboard.md from the results beside it (make leaderboard)
python -m website llms           llms.txt, the list of pages for machines that read
"""
