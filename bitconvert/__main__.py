"""``python -m bitconvert``: the command line."""

from bitconvert.cli import main

main()
