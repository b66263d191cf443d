"""What a request reads and changes in this process: the published routing and the requests in flight.

`Published` is replaced as a whole, never changed, so that a request sees one state. Everything here runs on the event
loop; nothing waits or does I/O. Knows nothing of vLLM, HTTP or the database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from scion_adapters.routing import Routing

EMPTY_ROUTING = Routing(0, MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Published:
    """The routing that requests follow now. `names` maps a resident LoRA id to its name in vLLM's table."""

    routing: Routing = EMPTY_ROUTING
    resident: frozenset[int] = frozenset()
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Serving:
    """The state of this server process. `in_flight` counts unfinished requests by LoRA id."""

    published: Published = field(default_factory=Published)
    in_flight: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))


class Flight:
    """One unfinished request of a version: counted from here until `land`, which is safe to call twice.

    `__del__` lands it too: a streaming answer whose client left before the first chunk is dropped without ever being
    run, and a version with a request in flight for ever could never be unloaded.
    """

    __slots__ = ("_counts", "_lora_id")

    def __init__(self, counts: defaultdict[int, int], lora_id: int) -> None:
        counts[lora_id] += 1
        self._counts: defaultdict[int, int] | None = counts
        self._lora_id = lora_id

    def land(self) -> None:
        if self._counts is not None:
            self._counts[self._lora_id] -= 1
            self._counts = None

    __del__ = land
