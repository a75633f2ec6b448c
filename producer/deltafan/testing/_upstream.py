"""What a test says to the simulated model server, and what it sees of it."""

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deltafan.testing._answer import Answer, Text, paced
from deltafan.testing._steps import Refuse, Step

Script: TypeAlias = Answer | Sequence[Step] | Refuse


@dataclass
class Request:
    """What arrived, and what became of it."""

    body: dict[str, Any]
    """Empty where the request had none."""
    headers: dict[str, str]
    path: str = ""
    method: str = "POST"
    query: dict[str, str] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The answer was sent whole, or the client has gone away."""
    was_cut: bool = False
    """The client went away first."""

    def as_json(self) -> dict[str, Any]:
        """For those who look from another process."""
        asked = {"method": self.method, "path": self.path, "query": self.query}
        told = {"body": self.body, "headers": self.headers}
        return {**asked, **told, "ended": self.ended.is_set(), "was_cut": self.was_cut}


class ScriptedUpstream:
    """Give it scripts, look at its requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        """All, in order of arrival, also those that ask for a stored response or cancel it."""
        self.arrived = asyncio.Event()
        self.standing: Script = Answer([Text("Hello"), Text(", "), Text("world"), Text("!")])
        """For requests that find no other script."""
        self.url = ""
        """Chat Completions and Responses as OpenAI streams them."""
        self.compatible_url = ""
        """Chat Completions and Responses as DashScope streams them."""
        self.dashscope_url = ""
        """DashScope's native API."""
        self.wrong_path_status = 400
        """How the native API refuses a model that lives on its other path: 400, or 200 with an error event."""
        self._queue: deque[Script] = deque()
        self._retrievals: deque[Refuse] = deque()

    def then(self, *scripts: Script) -> None:
        """Answer the next requests with these, one each."""
        self._queue.extend(scripts)

    def then_refuse_retrieving(self, *refusals: Refuse) -> None:
        """Refuse the next requests for a stored response with these, one each."""
        self._retrievals.extend(refusals)

    def script_for(self, request: Request) -> Script:
        """What this request is to be answered with."""
        if self._queue:
            return self._queue.popleft()
        if named := re.fullmatch(r"sim-(\d+)x(\d+)", str(request.body.get("model"))):
            return paced(int(named[1]), int(named[2]) / 1000)
        return self.standing

    def refusal_to_retrieve(self) -> Refuse | None:
        """What a request for a stored response is refused with, if it is."""
        return self._retrievals.popleft() if self._retrievals else None
