"""``python -m tests.chaos``."""

from tests.chaos.runs import main

raise SystemExit(main())
