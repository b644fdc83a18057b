"""``python -m multitrain VERB``: the same as the command ``multitrain``."""

from __future__ import annotations

from multitrain import cli

raise SystemExit(cli.main())
