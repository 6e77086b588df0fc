"""Runs all cases and makes the tables of ``docs/faults.md``.

Usage::

    python -m tests.faults.table                         # prints them, in Markdown
    python -m tests.faults.table docs/faults.md          # puts them there, too, if every case was as documented
    python -m tests.faults.table docs/faults.md star     # only the faults in a star of jobs
    python -m tests.faults.table docs/faults.md star --results star.json

With ``--results``, each outcome is written to that file at once, and a case whose outcome is there is not run again. So
a command that was interrupted, or in which a case was not as documented, goes on where it was. Start with no such file
after a change of the software. The machine should have nothing else to do, because the tables have durations.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tests.faults import star_cases
from tests.faults.cases import CASES, FAULTS, MOMENTS, VICTIMS, Case
from tests.faults.outcomes import GOES_ON, PREEMPTED, Outcome, observe
from tests.star.network import missing

BROKEN = "**not as documented**"


class Results:
    """Outcomes by case, as texts.

    Args:
        path: File in which they are kept; ``None`` for none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, str] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def of(self, case: Case | star_cases.StarCase) -> str:
        """Returns the outcome of a case, which is run if it is not known."""
        name = f"{case}, in {'one job' if isinstance(case, Case) else 'a star'}"
        if name not in self._known:
            outcome = run(case)
            print(f"{name}: {outcome}", file=sys.stderr, flush=True)
            if outcome == BROKEN:
                return outcome
            self._known[name] = outcome
            if self._path is not None:
                self._path.write_text(json.dumps(self._known, indent=1) + "\n")
        return self._known[name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("path", nargs="?", type=Path, help="the page into which they are put")
    parser.add_argument("only", nargs="?", choices=["job", "star"], help="only this table")
    parser.add_argument("--results", type=Path, help="a file with the outcomes so far, which goes on")
    options = parser.parse_args(arguments)
    if options.only != "job" and (why := missing()):
        parser.error(f"the table of a star of jobs cannot be made here: {why}")
    results = Results(options.results)
    tables = {"job": of_one_job, "star": of_a_star}
    made = {name: table(results) for name, table in tables.items() if options.only in (None, name)}
    print(*made.values(), sep="\n", end="")
    if any(BROKEN in table for table in made.values()):
        return 1
    if options.path:
        text = options.path.read_text()
        for name, table in made.items():
            text = put(text, name, table)
        options.path.write_text(text)
    return 0


def put(text: str, name: str, table: str) -> str:
    """Returns the text of a page with a new table in the place of the old one."""
    begin, end = f"<!-- python -m tests.faults.table docs/faults.md {name} -->\n", "<!-- end -->\n"
    before, rest = text.split(begin)
    return f"{before}{begin}{table}{end}{rest.split(end, 1)[1]}"


def of_one_job(results: Results) -> str:
    cells = {case: results.of(case) for case in CASES}
    rows = [
        [moment, fault, *(cells[Case(moment, fault, victim)] for victim in VICTIMS)]
        for moment, fault in product(MOMENTS, FAULTS)
    ]
    return markdown(["when", "what", *VICTIMS], rows)


def of_a_star(results: Results) -> str:
    cells = {case: results.of(case) for case in star_cases.CASES}
    rows = [
        [moment, fault, *(cells.get(star_cases.StarCase(moment, fault, victim), "") for victim in star_cases.VICTIMS)]
        for moment, fault in product(star_cases.MOMENTS, star_cases.FAULTS)
    ]
    return markdown(["when", "what", *star_cases.VICTIMS], [row for row in rows if any(row[2:])])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")


def run(case: Case | star_cases.StarCase) -> str:
    """Runs a case. Returns its outcome, or :data:`BROKEN`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if isinstance(case, Case):
                return described(observe(case, Path(folder)))
            return str(star_cases.observe(case, Path(folder)))
        except AssertionError as error:
            print(f"{case}: {error}", file=sys.stderr)
            return BROKEN


def described(outcome: Outcome) -> str:
    if outcome.kind == GOES_ON:
        return GOES_ON
    name = outcome.resumed_from
    then = {"": "starts from scratch", PREEMPTED: "resumes from that"}.get(name, f"resumes from {name}")
    return f"{outcome.kind} in {outcome.seconds:.1f} s, {then}"


if __name__ == "__main__":
    sys.exit(main())
