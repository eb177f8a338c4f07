"""The order in which sequences are served: the `Policy` protocol, first come first served, and priorities."""

from __future__ import annotations

from typing import Protocol

from kvarn.errors import RequestError
from kvarn.request import Request
from kvarn.scheduler.sequence import Sequence

PRIORITY_LIMIT = 2**31
"""Priorities are at least the negative of this, and below it."""


class Policy(Protocol):
    """Who comes first: admitted before others, given tokens before others, preempted after them.

    The order has two levels. Each sequence belongs to a lane; within a lane the order never changes, so it can be kept
    sorted; lanes are compared by a rank that may change with every token. So the next sequence is found in
    O(number of lanes), and a token costs O(1), however many sequences wait. A policy whose order is fixed has one lane.
    """

    def check(self, request: Request) -> None:
        """Raises RequestError where the request asks for what this policy does not do. Any thread may call."""
        ...

    def lane(self, sequence: Sequence) -> str:
        """The lane it belongs to. Constant."""
        ...

    def place(self, sequence: Sequence) -> tuple[int, ...]:
        """Its place within its lane, and among lanes of equal rank. Smaller is first. Unique, and constant."""
        ...

    def rank(self, lane: str) -> float:
        """Smaller is served first. Changes only by the calls below."""
        ...

    def open(self, lane: str) -> None:
        """Told when a sequence of the lane begins to wait and none of it waited before."""
        ...

    def close(self, lane: str) -> None:
        """Told when the last waiting sequence of the lane has been admitted, or has ended."""
        ...

    def charge_prompt(self, lane: str, tokens: int) -> None:
        """Told once of each prompt: of the tokens that were computed for it, when its last chunk is scheduled.

        Not of those that a prefix cache held, nor of their repetition after preemption. Until then a sequence keeps its
        place, so that it may be overtaken, but not because of itself.
        """
        ...

    def charge_output(self, lane: str) -> None:
        """Told of each token that is sampled."""
        ...

    def price(self, sequence: Sequence) -> float:
        """What its prompt will add to its lane's rank, if nothing of it is cached."""
        ...


def order_key(policy: Policy, sequence: Sequence) -> tuple[float, ...]:
    """Where the sequence is in the policy's order as of now; smaller is first."""
    return (policy.rank(policy.lane(sequence)), *policy.place(sequence))


class FirstComeFirstServed:
    """In order of arrival; the sequences of one request by index."""

    name = "fcfs"

    def check(self, request: Request) -> None:
        """Raises RequestError for a priority, rather than to ignore it."""
        if request.priority != 0:
            raise RequestError(
                f"priority must be 0, not {request.priority}: this server's scheduling policy is {self.name}, and only "
                "the policy priority looks at it",
                field="priority",
            )

    def lane(self, sequence: Sequence) -> str:
        """All are in one."""
        del sequence
        return ""

    def place(self, sequence: Sequence) -> tuple[int, ...]:
        """Arrival, then index."""
        return (sequence.arrival, sequence.index)

    def rank(self, lane: str) -> float:
        """The one lane's."""
        del lane
        return 0

    def open(self, lane: str) -> None:
        """Changes nothing."""

    def close(self, lane: str) -> None:
        """Changes nothing."""

    def charge_prompt(self, lane: str, tokens: int) -> None:
        """Changes nothing."""

    def charge_output(self, lane: str) -> None:
        """Changes nothing."""

    def price(self, sequence: Sequence) -> float:
        """Nothing."""
        del sequence
        return 0


class PriorityClasses(FirstComeFirstServed):
    """Requests of a smaller `priority` first, whoever came first; within a class in order of arrival.

    As strict as its name: while smaller ones keep coming and take all there is, larger ones wait.
    """

    name = "priority"

    def check(self, request: Request) -> None:
        """Raises RequestError for a priority out of range."""
        if not -PRIORITY_LIMIT <= request.priority < PRIORITY_LIMIT:
            raise RequestError(
                f"priority must be between {-PRIORITY_LIMIT} and {PRIORITY_LIMIT - 1}, not {request.priority}",
                field="priority",
            )

    def place(self, sequence: Sequence) -> tuple[int, ...]:
        """Priority, arrival, index."""
        return (sequence.request.priority, sequence.arrival, sequence.index)
