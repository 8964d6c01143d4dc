"""Tests the solver of widths against a search through all of them."""

import functools

import numpy as np
import pytest

from mowe.comparison import budgets
from mowe.models.families import costs
from mowe.models.t5 import t5_config

_SOLVE = functools.partial(budgets.solve, name='MoWE', unit='FLOPs per token')


def _nearest(cost, target, granule, widest):
  widths = np.arange(granule, widest, granule)
  return widths[np.argmin([abs(cost(w) - target) for w in widths.tolist()])]


@pytest.mark.parametrize('granule', [1, 8, 12])
@pytest.mark.parametrize('target', [700.0, 9_111.0, 64_000.0])
@pytest.mark.parametrize(
  'cost',
  [
    lambda width: 190 + 6 * width,
    # This cost has steps, like the capacity of a layer, and a bend.
    lambda width: 190 + 40 * (width // 8) + width**2 // 900,
  ],
)
def test_the_nearest_of_all_widths(cost, target, granule):
  found = _SOLVE(cost, target, granule=granule, tolerance=0.2)
  assert found.width % granule == 0
  expected = _nearest(cost, target, granule, 12_000)
  assert abs(found.cost - target) == abs(cost(expected) - target)
  assert found.cost == cost(found.width)
  assert found.error == pytest.approx(found.cost / target - 1)


def test_costs_on_a_line_need_few_calls():
  asked = []

  def cost(width):
    asked.append(width)
    return 1e6 + 17 * width

  found = _SOLVE(cost, 1e6 + 17 * 40_000, granule=8, tolerance=1e-9)
  assert found.width == 40_000 and found.error == 0
  assert len(asked) <= 6 and len(set(asked)) == len(asked)


def test_costs_on_a_curve_are_bisected():
  asked = []

  def cost(width):
    asked.append(width)
    return 1e6 + width**2

  found = _SOLVE(cost, 1e6 + 3000.0**2, granule=1, tolerance=1e-9)
  assert found.width == 3000 and len(asked) <= 60


@pytest.mark.parametrize(
  ('target', 'nearest'),
  [
    # The narrowest model is too large, or no width between two comes close.
    (500.0, r'1,000 \(\+100.0%\) at width 16'),
    (2_000.0, r'1,800 \(-10.0%\) at width 32'),
  ],
)
def test_a_target_that_cannot_be_met_names_the_nearest(target, nearest):
  with pytest.raises(ValueError, match=nearest):
    _SOLVE(lambda w: 200 + 50 * w, target, granule=16, tolerance=0.02)


def test_a_width_that_changes_nothing():
  with pytest.raises(ValueError, match='both give 300.*Model.width'):
    _SOLVE(lambda width: 300, 500, granule=8, tolerance=0.1)
  with pytest.raises(ValueError, match='granule must be at least 1'):
    _SOLVE(lambda width: width, 500, granule=0, tolerance=0.1)


def test_flops_are_those_of_the_pretraining_examples():
  model = costs.ModelCosts(7000, 0, 0, 300, 500)
  lengths = {'inputs': 30, 'targets': 10}
  assert budgets.flops_per_token(model, lengths) == 350
  assert budgets.EqualFlops('T5').cost(model, lengths) == 350
  assert budgets.EqualParameters('T5').cost(model, lengths) == 7000
  # A language model has no inputs, so only targets are counted.
  assert budgets.flops_per_token(model, {'targets': 9}) == 500


def test_a_dense_model_of_equal_parameters():
  def cost(mlp_dim):
    config = t5_config.T5Config(13, 6, 2, 5, mlp_dim, 2, 1)
    return costs.model_costs(config).total_parameters

  found = _SOLVE(cost, cost(77), granule=1, tolerance=0.0)
  assert found.width == 77
