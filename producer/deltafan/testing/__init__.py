"""A model server for tests: real HTTP, scripted answers, streamed as the vendors' APIs stream them.

Chat Completions and Responses answer at `.url` as OpenAI streams them and at `.compatible_url` as DashScope does,
DashScope's native API at `.dashscope_url`. Each request takes the next script of the queue, or else the one its model's
name asks for (`sim-<deltas>x<gap_ms>`), or else the standing one. A script is an `Answer`, for any API, or a list of
frames of one API, made by the functions of `chat`, `responses` and `dashscope`, or a `Refuse`. Tests hold a generation
at an `asyncio.Event` of theirs instead of sleeping. An answer without its end, an error in a 200, a usage of another
shape are scripts like any other.

async with scripted_upstream() as upstream:
    upstream.then(Answer([Reasoning("Hm."), Text("Hello"), Text("!")]))
    ...  # whatever calls a model at upstream.url

`python -m deltafan.testing` is the same as a process: it prints its URLs as JSON and ends with its standard input.
"""

try:
    import aiohttp as _aiohttp  # noqa: F401  asked for here, so that its absence is told in one sentence
except ModuleNotFoundError as error:
    raise ImportError("deltafan.testing answers over HTTP with aiohttp: install deltafan[testing]") from error

from deltafan.testing import chat, dashscope, responses
from deltafan.testing._answer import Answer, Audio, Fault, Part, Reasoning, Refusal, Text, Tokens, ToolCall
from deltafan.testing._server import scripted_upstream
from deltafan.testing._steps import Cut, Frame, Gap, Named, Raw, Refuse, Step, simulated_delay
from deltafan.testing._upstream import Request, Script, ScriptedUpstream

__all__ = [
    "Answer",
    "Audio",
    "Cut",
    "Fault",
    "Frame",
    "Gap",
    "Named",
    "Part",
    "Raw",
    "Reasoning",
    "Refusal",
    "Refuse",
    "Request",
    "Script",
    "ScriptedUpstream",
    "Step",
    "Text",
    "Tokens",
    "ToolCall",
    "chat",
    "dashscope",
    "responses",
    "scripted_upstream",
    "simulated_delay",
]
