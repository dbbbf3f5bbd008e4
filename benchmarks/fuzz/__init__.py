"""Hostile inputs: whatever a file, a name or a text holds, this project answers with errors of its own.

    python -m benchmarks.fuzz [--inputs 100000] [--seed 0] [--kinds headers,names] [--only headers/17]

Every input is made from the seed, its kind and its number, so each can be tried again alone. One counts as
unexpected when an error comes out that is not ours, when it takes longer than ten seconds, or when anything
is written, started or connected to outside the folder it was given.
"""
