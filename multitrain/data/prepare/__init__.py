"""From downloaded files to a dataset that can be trained on: annotations, resized copies, and a check of every file.

`importing` reads official annotation files, `resize` makes small copies, `check` decodes everything and says what is wrong,
`stats` tells what is there. `crew` is how long work over many files is shared, interrupted and resumed.
"""
