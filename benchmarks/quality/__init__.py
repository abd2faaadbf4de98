"""Which recipe makes the best ternary model of equal tokens: run grids of recipes, keep every number, draw the table.

    python -m benchmarks.quality run rivals --models DIR --jobs 2
    python -m benchmarks.quality table docs/results/quality --grid rivals
    python -m benchmarks.quality plot docs/results/quality --grid rivals

A *bed* is what methods are compared on: a model, its texts, a number of tokens, seeds. A *grid* is a list of *cells*: a
name and what its recipe does otherwise than the bed's. A *trial* is one cell on one bed with one learning rate and one
seed: one ``bitconvert warmup`` and one ``bitconvert eval``, and one file of results. See README.md beside this file.
"""
