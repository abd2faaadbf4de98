"""``python -m bitconvert``: the command line."""

from bitconvert.cli.main import main

main()
