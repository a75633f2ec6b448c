import sys

import pytest

from deltafan_cli._commands import command_name


@pytest.mark.parametrize(
    ("called", "found", "typed"),
    [
        ("deltafan", "/usr/bin/deltafan", "deltafan"),
        (".venv/bin/deltafan", None, ".venv/bin/deltafan"),
        ("cli/deltafan_cli/__main__.py", None, f"{sys.executable} -m deltafan_cli"),
    ],
)
def test_what_is_shown_as_the_next_command_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, called: str, found: str | None, typed: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("shutil.which", lambda _name: found)
    assert command_name() == typed
