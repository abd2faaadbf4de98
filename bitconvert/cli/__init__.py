"""The command line: a file per command that parses, checks, calls and renders.

Heavy imports live inside the commands, behind all that can be checked without them: neither ``--help`` nor a wrong
argument waits for torch.
"""
