"""Runs all cases and makes the tables of ``docs/faults.md``.

Usage::

    python -m tests.faults.table                         # prints them, in Markdown
    python -m tests.faults.table docs/faults.md          # puts them there, too
    python -m tests.faults.table docs/faults.md star     # only the faults in a star of jobs
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path

from tests.faults import star_cases
from tests.faults.cases import CASES, FAULTS, MOMENTS, VICTIMS, Case
from tests.faults.outcomes import GOES_ON, PREEMPTED, Outcome, observe

BROKEN = "**not as documented**"


def main(path: str = "", only: str = "") -> int:
    tables = {"job": of_one_job, "star": of_a_star}
    made = {name: table() for name, table in tables.items() if only in ("", name)}
    for name, table in made.items():
        print(table)
        if path:
            begin, end = f"<!-- python -m tests.faults.table docs/faults.md {name} -->\n", "<!-- end -->\n"
            before, rest = Path(path).read_text().split(begin)
            Path(path).write_text(f"{before}{begin}{table}{end}{rest.split(end, 1)[1]}")
    return int(any(BROKEN in table for table in made.values()))


def of_one_job() -> str:
    cells = {case: cell(case) for case in CASES}
    rows = [
        [moment, fault, *(cells[Case(moment, fault, victim)] for victim in VICTIMS)]
        for moment, fault in product(MOMENTS, FAULTS)
    ]
    return markdown(["when", "what", *VICTIMS], rows)


def of_a_star() -> str:
    cells = {case: cell(case) for case in star_cases.CASES}
    rows = [
        [moment, fault, *(cells.get(star_cases.StarCase(moment, fault, victim), "") for victim in star_cases.VICTIMS)]
        for moment, fault in product(star_cases.MOMENTS, star_cases.FAULTS)
    ]
    return markdown(["when", "what", *star_cases.VICTIMS], [row for row in rows if any(row[2:])])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def cell(case: Case | star_cases.StarCase) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            if isinstance(case, Case):
                outcome = described(observe(case, Path(folder)))
            else:
                outcome = str(star_cases.observe(case, Path(folder)))
        except AssertionError as error:
            print(f"{case}: {error}", file=sys.stderr)
            return BROKEN
    print(f"{case}: {outcome}", file=sys.stderr)
    return outcome


def described(outcome: Outcome) -> str:
    if outcome.kind == GOES_ON:
        return GOES_ON
    name = outcome.resumed_from
    then = {"": "starts from scratch", PREEMPTED: "resumes from that"}.get(name, f"resumes from {name}")
    return f"{outcome.kind} in {outcome.seconds:.1f} s, {then}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
