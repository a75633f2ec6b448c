"""A model server for tests: real HTTP, scripted answers, streamed as the vendors' APIs stream them.

A script is a list of steps; each request takes the next script of the queue, or else the one its model's name asks for
(`sim-<deltas>x<gap_ms>`), or else the standing one. Tests hold a generation at an `asyncio.Event` of theirs instead of
sleeping. An answer without its end, an error in a 200, a usage of another shape are scripts like any other.

async with scripted_upstream() as upstream:
    upstream.then(chat.text("Hello", "!"))
    ...  # whatever calls a model at upstream.url

`python -m deltafan.testing` is the same as a process: it prints its URLs as JSON and ends with its standard input.
"""

try:
    import aiohttp as _aiohttp  # noqa: F401  asked for here, so that its absence is told in one sentence
except ModuleNotFoundError as error:
    raise ImportError("deltafan.testing answers over HTTP with aiohttp: install deltafan[testing]") from error

from deltafan.testing import chat
from deltafan.testing._server import Request, Script, ScriptedUpstream, scripted_upstream
from deltafan.testing._steps import Cut, Frame, Gap, Raw, Refuse, Step, simulated_delay

__all__ = [
    "Cut",
    "Frame",
    "Gap",
    "Raw",
    "Refuse",
    "Request",
    "Script",
    "ScriptedUpstream",
    "Step",
    "chat",
    "scripted_upstream",
    "simulated_delay",
]
