"""Runs all cases and makes the table of ``docs/faults.md``.

Usage::

    python -m tests.faults.table                    # prints it, in Markdown
    python -m tests.faults.table docs/faults.md     # puts it there, too
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.faults.cases import CASES, FAULTS, MOMENTS, VICTIMS, Case
from tests.faults.outcomes import GOES_ON, PREEMPTED, Outcome, observe

BEGIN, END = "<!-- python -m tests.faults.table docs/faults.md -->\n", "<!-- end -->\n"
BROKEN = "**not as documented**"


def main(*paths: str) -> int:
    cells = {case: cell(case) for case in CASES}
    lines = [f"| when | what | {' | '.join(VICTIMS)} |", f"|---|---|{'---|' * len(VICTIMS)}"]
    for moment in MOMENTS:
        for fault in FAULTS:
            row = [cells[Case(moment, fault, victim)] for victim in VICTIMS]
            lines.append(f"| {moment} | {fault} | {' | '.join(row)} |")
    table = "\n".join(lines) + "\n"
    print(table)
    for path in map(Path, paths):
        before, rest = path.read_text().split(BEGIN)
        path.write_text(f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}")
    return int(BROKEN in cells.values())


def cell(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = observe(case, Path(folder))
        except AssertionError as error:
            print(f"{case}: {error}", file=sys.stderr)
            return BROKEN
    print(f"{case}: {outcome}", file=sys.stderr)
    return described(outcome)


def described(outcome: Outcome) -> str:
    if outcome.kind == GOES_ON:
        return GOES_ON
    name = outcome.resumed_from
    then = {"": "starts from scratch", PREEMPTED: "resumes from that"}.get(name, f"resumes from {name}")
    return f"{outcome.kind} in {outcome.seconds:.1f} s, {then}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
