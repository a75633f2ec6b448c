"""An answer as a model gives it, before any API has dressed it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from deltafan.testing._steps import Gap, Step


@dataclass(frozen=True)
class Reasoning:
    """One delta of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """One delta of the answer."""

    text: str


@dataclass(frozen=True)
class Refusal:
    """One delta of a refusal. The native API has no field for it, and streams it as text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its opener, then one delta for each fragment of its arguments."""

    id: str
    name: str
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Audio:
    """Sound, one delta, and before it what is said, if anything, another: no API sends both in one."""

    pcm: bytes
    transcript: str = ""


@dataclass(frozen=True)
class Fault:
    """The answer ends here, with the API's own form of an error inside a 200."""

    code: str
    message: str
    status: int = 500


Part: TypeAlias = Reasoning | Text | Refusal | ToolCall | Audio | Fault


@dataclass(frozen=True)
class Tokens:
    """What an answer used. Cached and written input is part of `input`, reasoning of `output`."""

    input: int
    output: int
    cached_input: int = 0
    cache_write: int = 0
    reasoning: int = 0

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input + self.output


DEFAULT_USAGE = Tokens(7, 5, cached_input=2)


@dataclass(frozen=True)
class Answer:
    """A script for any API: its parts are streamed in order as the API that was called streams them.

    Steps between the parts happen where they stand; a frame among them is written as it is. `finish` is `stop`,
    `length`, `tool_calls` or `content_filter`; an API that has other words for it uses those.
    """

    parts: Sequence[Part | Step]
    finish: str = "stop"
    usage: Tokens | None = DEFAULT_USAGE

    @property
    def text(self) -> str:
        """All text of the answer."""
        return _joined(self.parts, Text)

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return _joined(self.parts, Reasoning)

    @property
    def refusal(self) -> str:
        """The whole refusal."""
        return _joined(self.parts, Refusal)

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls, in order."""
        return [part for part in self.parts if isinstance(part, ToolCall)]

    @property
    def fault(self) -> Fault | None:
        """What ends it early, if anything does."""
        return next((part for part in self.parts if isinstance(part, Fault)), None)


def paced(deltas: int, gap_s: float) -> Answer:
    """An answer of so many deltas, each after a gap."""
    return Answer([part for number in range(deltas) for part in (Gap(gap_s), Text(f"{number} "))])


Worded = TypeVar("Worded", Text, Reasoning, Refusal)


def _joined(parts: Iterable[Any], kind: type[Worded]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))
