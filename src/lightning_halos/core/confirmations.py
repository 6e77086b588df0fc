"""What the snapshots under way have of each member, so that members can be told what they need not repeat.

The content of a snapshot is made by the global node, and written by ``serving``.
"""

from __future__ import annotations

from lightning_halos.core.members import Member
from lightning_halos.core.roster import Roster


class Confirmations:
    """The snapshots that have begun and are not on disk yet.

    Args:
        members: The members.
    """

    def __init__(self, members: Roster) -> None:
        self._members = members
        self._last = 0  # number of the last snapshot
        # Of each snapshot under way, what it has of the members: session, update and publication.
        self._snapshots: dict[str, dict[int, tuple[str, int, int]]] = {}

    def __contains__(self, save: str) -> bool:
        """Whether a snapshot is under way."""
        return save in self._snapshots

    @property
    def is_needed(self) -> bool:
        """Whether a member waits for a snapshot that has it, and none is under way."""
        under_way = list(self._snapshots.values())
        return any(
            not member.is_saved and not any(saved.get(member.index, ("",))[0] == member.session for saved in under_way)
            for member in self._members.active
        )

    def begin(self) -> str:
        """Records that a snapshot has the members as they are now. Returns its identity."""
        self._last += 1
        members = [*self._members.present, *self._members.joining]
        self._snapshots[str(self._last)] = {m.index: (m.session, m.update, m.publication) for m in members}
        return str(self._last)

    def confirm(self, save: str) -> list[Member]:
        """Records that a snapshot is on disk. Returns the members that it has."""
        for token in [token for token in self._snapshots if int(token) < int(save)]:
            del self._snapshots[token]
        confirmed = []
        for index, (session, update, publication) in self._snapshots.pop(save).items():
            member = self._members[index]
            if member.session == session:
                member.is_saved, member.saved = True, (update, publication)
                confirmed.append(member)
        return confirmed

    def forget(self, member: Member) -> None:
        """Records that a member is lost: if it returns, a snapshot must know of it before it gets data."""
        member.is_saved = False
        for saved in self._snapshots.values():
            saved.pop(member.index, None)
