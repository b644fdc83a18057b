"""One file per verb of ``multitrain``: its command line and its output. The work is done in other packages."""
