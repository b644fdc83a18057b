"""The tools behind `multitrain data VERB`: annotations, resized copies, packs, and a check of every file before training.

`importing` reads official annotation files, `resize` makes small copies, `packing` writes tar shards, `check` decodes every file and
reports problems, `stats` summarises datasets. `parallel_map` runs, interrupts and resumes work over many files.
"""
