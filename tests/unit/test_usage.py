"""Token counts of all APIs in one shape, and what they cost."""

from typing import Any

import pytest

from deltafan_config import Price
from deltafan_worker._usage import TokenCounts, cost, normalise

PRICE = Price(
    currency="USD",
    input=1.0,
    cached_input=0.1,
    cache_write=2.0,
    output=4.0,
    reasoning=5.0,
    input_audio=10.0,
    output_audio=20.0,
)


@pytest.mark.parametrize(
    ("raw", "counts"),
    [
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 6,
                "total_tokens": 16,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_creation_input_tokens": 2, "audio_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 2},
            },
            TokenCounts(
                input_tokens=10,
                output_tokens=6,
                total_tokens=16,
                cached_input_tokens=4,
                cache_write_tokens=2,
                reasoning_tokens=3,
                input_audio_tokens=1,
                output_audio_tokens=2,
            ),
        ),
        (
            {"prompt_tokens": 18, "completion_tokens": 2, "prompt_cache_hit_tokens": 5, "reasoning_tokens": 1},
            TokenCounts(input_tokens=18, output_tokens=2, total_tokens=20, cached_input_tokens=5, reasoning_tokens=1),
        ),
        (
            {
                "input_tokens": 57,
                "output_tokens": 3,
                "total_tokens": 60,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
                "x_details": [
                    {
                        "input_tokens": 57,
                        "prompt_tokens_details": {"cache_creation_input_tokens": 9},
                        "input_tokens_details": {"audio_tokens": 8},
                        "output_tokens_details": {"audio_tokens": 2},
                    }
                ],
            },
            TokenCounts(
                input_tokens=57,
                output_tokens=3,
                total_tokens=60,
                cached_input_tokens=0,
                cache_write_tokens=9,
                reasoning_tokens=0,
                input_audio_tokens=8,
                output_audio_tokens=2,
            ),
        ),
        (
            {
                "input_tokens": 9,
                "output_tokens": 4,
                "image_tokens": 3,
                "audio_tokens": 2,
                "input_tokens_details": {"text_tokens": 4},
                "prompt_tokens_details": {"cached_tokens": 1},
                "output_tokens_details": {"text_tokens": 4},
            },
            TokenCounts(input_tokens=9, output_tokens=4, total_tokens=13, cached_input_tokens=1, input_audio_tokens=2),
        ),
        ({"prompt_tokens": None, "completion_tokens": True, "prompt_tokens_details": None}, TokenCounts()),
    ],
)
def test_every_apis_usage_is_one_shape(raw: dict[str, Any], counts: TokenCounts) -> None:
    assert normalise(raw) == counts


def test_each_kind_of_token_has_its_price() -> None:
    counts = TokenCounts(
        input_tokens=100,
        cached_input_tokens=40,
        cache_write_tokens=20,
        input_audio_tokens=10,
        output_tokens=50,
        reasoning_tokens=20,
        output_audio_tokens=10,
    )
    expected = 30 * 1.0 + 40 * 0.1 + 20 * 2.0 + 10 * 10.0 + 20 * 4.0 + 20 * 5.0 + 10 * 20.0
    assert cost(counts, PRICE).amount == pytest.approx(expected / 1e6)


def test_parts_that_exceed_their_whole_are_cut_to_it() -> None:
    counts = TokenCounts(input_tokens=10, cached_input_tokens=99, output_tokens=10, reasoning_tokens=11)
    assert cost(counts, PRICE).amount == pytest.approx((10 * 0.1 + 10 * 5.0) / 1e6)


def test_a_cost_that_can_not_be_told_says_why() -> None:
    assert cost(TokenCounts(input_tokens=1, output_tokens=1), None).note == "the catalogue has no price for this model"
    assert cost(TokenCounts(output_tokens=1), PRICE).note == "the input tokens are not known"
