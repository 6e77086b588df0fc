"""The members of a run by index and by name, and the sessions that may not join it.

It decides nothing: the founding and the global node change the members and refuse sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lightning_halos.core.members import Member, MemberState

_SHOWN = 500  # characters of the reason of a refusal
_MOST_REFUSED = 1000  # sessions that are remembered as refused


class Roster:
    """The members of a run.

    Args:
        members: The first members.
        refused: Sessions that may not join, as pairs of a member's index and its session, with the reasons.

    Attributes:
        refused: The same, with those that :meth:`refuse` has added.
    """

    def __init__(self, members: Iterable[Member] = (), refused: Mapping[tuple[int, str], str] | None = None) -> None:
        self._members = {member.index: member for member in members}
        self.refused = dict(refused or {})

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __getitem__(self, index: int) -> Member:
        return self._members[index]

    def get(self, index: int) -> Member | None:
        return self._members.get(index)

    def index_of(self, name: str, is_stale: bool = False) -> int:
        """Returns the index of the member with a name, which is the same for ever. A new one is added."""
        member = next((member for member in self if member.name == name), None)
        return (self.add(name, is_stale) if member is None else member).index

    def add(self, name: str, is_stale: bool = False) -> Member:
        """Adds a member."""
        member = Member(name, len(self._members), is_stale=is_stale)
        self._members[member.index] = member
        return member

    def enrol(self, member: Member, workers: int) -> None:
        """Records the number of a member's workers, unless it is known. They come after those of all others."""
        if not member.workers:
            member.first = max((other.first + other.workers for other in self), default=0)
            member.workers = workers

    @property
    def workers(self) -> int:
        """Number of the workers of all members."""
        return sum(member.workers for member in self)

    @property
    def joining(self) -> list[Member]:
        """Members that have joined and are not welcome yet."""
        return [member for member in self if member.session and member.state is MemberState.JOINING]

    @property
    def active(self) -> list[Member]:
        """Members that are connected."""
        return [member for member in self if member.is_active]

    @property
    def present(self) -> list[Member]:
        """Members that take part in the run, even if they are not connected just now."""
        return [member for member in self if member.is_present]

    def refuse(self, member: Member, reason: str, session: str | None = None) -> None:
        """Refuses a session of a member, its present one by default, from now on."""
        if session := member.session if session is None else session:
            self.refused[member.index, session] = reason[:_SHOWN]
        while len(self.refused) > _MOST_REFUSED:
            del self.refused[next(iter(self.refused))]

    def refusal(self, member: Member, session: str) -> str:
        """Returns the reason why a session of a member may not join, or an empty text."""
        return self.refused.get((member.index, session), "")
