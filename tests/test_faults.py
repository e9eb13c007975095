"""Runs that are killed, against runs that are not; `fault_campaign.py` has the long version."""

import pytest

from fault_campaign import CHECKPOINT_INTERVAL, campaign


@pytest.mark.parametrize(
    "variant, kills",
    [
        ("newton", 5),
        pytest.param("published", 3, marks=pytest.mark.slow),
        pytest.param("vanilla", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(variant, kills, tmp_path):
    """SIGKILL at random moments: the end is bit-identical to that of an undisturbed run, and no
    step older than the checkpoint interval is ever done again."""
    result = campaign(tmp_path, variant, kills)
    assert result["kills"] == kills and result["mismatches"] == 0, result
    assert result["most_repeated"] <= CHECKPOINT_INTERVAL
