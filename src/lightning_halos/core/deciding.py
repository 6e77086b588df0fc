"""Which member decides about validation, callbacks and checkpoints, and what it has given for the next one.

The choice only. The global node tells the members; ``training/callback_states.py`` does what the deciding job has to
do.
"""

from __future__ import annotations

from lightning_halos.core.members import Member
from lightning_halos.core.roster import Roster


class Deciding:
    """The member that decides.

    It keeps its part until it leaves or is lost, or the preferred one becomes active. The next one is the active member
    with the lowest index.

    Args:
        preferred: Name of the member that decides if it is active.

    Attributes:
        index: Index of the member that decides; ``None`` before the first one.
        callbacks: What it has last told of its callbacks' state.
    """

    def __init__(self, preferred: str | None) -> None:
        self.index: int | None = None
        self.callbacks = ""
        self._preferred = preferred

    def is_part_of(self, member: Member) -> bool:
        """Whether a member decides."""
        return self.index == member.index

    def choose(self, members: Roster) -> None:
        """Chooses the member that decides from now on."""
        preferred = [member.index for member in members.active if member.name == self._preferred]
        if preferred:
            self.index = preferred[0]
        elif self.index is None or not members[self.index].is_present:
            self.index = min((member.index for member in members.active), default=None)
        if self.index is not None:
            members[self.index].has_decided = True
