"""Writes what docs/ says about the code from the code: the reference, and the pictures of the explanation."""
