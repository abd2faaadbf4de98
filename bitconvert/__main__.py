"""``python -m bitconvert``: the command line."""

from bitconvert.cli.main import main

if __name__ == "__main__":  # and not in the processes that tokenize, which import this file too
    main()
