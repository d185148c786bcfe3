"""The host benchmark runs, small, and names everything that is registered."""

from benchmarks import host_costs
from unipic2_jax.models.registry import SIZES
from unipic2_jax.rewards.base import REWARDS


def test_every_reward_and_conditioner_is_measured_or_has_a_reason():
    rows = list(host_costs.rows(samples=4, size=64, group=2, few=1))
    assert {row.what for row in rows} >= {"pictures", *REWARDS, *SIZES}
    assert all((row.seconds is None) == bool(row.reason) for row in rows)
    measured = {row.what for row in rows if row.seconds is not None}
    assert measured >= host_costs.BOUNDS.keys() | {"judge", "remote", "shapes_edit", "deepgen", "tiny_metaquery"}
