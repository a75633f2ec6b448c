"""A little of what `make fuzz` does at length."""

import random

import pytest

from fuzz.decoders import corpus, fuzz, mutated


@pytest.mark.parametrize("api", ["chat", "responses", "dashscope"])
def test_broken_streams_raise_only_documented_errors(api: str) -> None:
    assert fuzz(api, 1_000, seed=1) == 1_000


def test_streams_are_really_broken() -> None:
    whole, chance = corpus("chat")[0], random.Random(1)
    streams = {mutated(whole, chance) for _ in range(100)}
    assert len(streams) > 50
