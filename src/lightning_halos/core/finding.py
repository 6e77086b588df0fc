"""What inspecting an update finds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_halos.core.messages import RegionUpdate


class Finding(NamedTuple):
    """The result of inspecting an update."""

    fault: str | None  # why the update is invalid, regardless of other updates
    norm: float  # Euclidean norm of its parameters
    # Indices of the parameters that have values other than 0, in any lane; `None` if there is one lane, whose server
    # sees it by itself.
    touched: Collection[int] | None = None


def combine(findings: Sequence[Finding]) -> Finding:
    """Returns the finding for an update, given those for its slices in all lanes."""
    fault = next((finding.fault for finding in findings if finding.fault is not None), None)
    touched = [finding.touched for finding in findings if finding.touched is not None]
    together = sorted(set().union(*touched)) if touched else None
    return Finding(fault, math.hypot(*(finding.norm for finding in findings)), together)


def plain_finding(finding: Finding | None) -> tuple[str | None, float, list[int]] | None:
    """Returns the finding of several lanes as plain values, for a snapshot; ``None`` for one lane."""
    if finding is None or finding.touched is None:
        return None
    return finding.fault, finding.norm, list(finding.touched)


def update_of_snapshot(fields: Mapping[str, Any]) -> tuple[RegionUpdate, Finding | None]:
    """Returns an update of a snapshot, as a copy, and the finding of several lanes for it."""
    fields = dict(fields)
    finding = fields.pop("finding", None)
    fields["vector"] = fields["vector"].clone()
    return RegionUpdate(**fields), None if finding is None else Finding(*finding)
