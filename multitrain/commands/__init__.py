"""One file a verb of ``multitrain``: its command line, and what it prints. The work is done in other rooms."""
