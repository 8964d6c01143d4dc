"""Sizing a model: as many FLOPs, or parameters, as another one.

`solve` looks for the width whose cost is nearest to a target, among multiples
of a granule. What a cost is, and what a width is of, the budgets and the
experiment say; here both are numbers.
"""

import dataclasses
import math
from collections.abc import Callable

from mowe.models.families import costs

# Widths beyond it are no widths of experts.
_WIDEST = 2**24


@dataclasses.dataclass(frozen=True)
class EqualFlops:
  """As many forward FLOPs for each token of pretraining as the base model.

  Attributes:
    base: name of the base model.
    tolerance: how far from the target a model may be, as a share of it.
  """

  base: str
  tolerance: float = 0.02

  unit = 'FLOPs per token'

  def cost(self, model: costs.ModelCosts, lengths: dict[str, int]) -> float:
    """What is to be equal."""
    return flops_per_token(model, lengths)


@dataclasses.dataclass(frozen=True)
class EqualParameters:
  """As many parameters in all as the base model.

  Attributes:
    base: name of the base model.
    tolerance: how far from the target a model may be, as a share of it.
  """

  base: str
  tolerance: float = 0.02

  unit = 'parameters'

  def cost(self, model: costs.ModelCosts, lengths: dict[str, int]) -> float:
    """What is to be equal."""
    del lengths
    return model.total_parameters


Budget = EqualFlops | EqualParameters


@dataclasses.dataclass(frozen=True)
class Solution:
  """A width, and how well it meets its target.

  Attributes:
    width: a multiple of the granule.
    cost: of the model of this width.
    target: what it was to be.
  """

  width: int
  cost: float
  target: float

  @property
  def error(self) -> float:
    """How far the cost is from the target, as a share of it."""
    return self.cost / self.target - 1


def flops_per_token(model: costs.ModelCosts, lengths: dict[str, int]) -> float:
  """Forward FLOPs of an example of full length, by its tokens.

  Args:
    model: its costs.
    lengths: tokens of 'inputs' and 'targets'.
  """
  inputs, targets = lengths.get('inputs', 0), lengths['targets']
  return model.flops_per_example(inputs, targets) / (inputs + targets)


def solve(
  cost_of: Callable[[int], float],
  target: float,
  *,
  granule: int,
  tolerance: float,
  name: str,
  unit: str,
) -> Solution:
  """The width whose cost is nearest to a target.

  Args:
    cost_of: of a model of some width; must not fall as widths rise. Each call
      may take a second: costs nearly on a line need about four.
    target: the cost to be met.
    granule: widths are multiples of it.
    tolerance: of the cost, as a share of the target.
    name: of the model, for errors.
    unit: of the cost, for errors.

  Raises:
    ValueError: no width is within the tolerance; names the nearest. Or the
      width makes no difference.
  """
  if granule < 1:
    raise ValueError(
      f'granule must be at least 1, but that of {name} is {granule}. Take a '
      'multiple of 8 for a GPU.'
    )
  known: dict[int, float] = {}

  def cost(count: int) -> float:
    if count not in known:
      known[count] = cost_of(count * granule)
    return known[count]

  # Far enough apart for costs that are rounded.
  low, high = 1, 16
  if cost(low) == cost(high):
    raise ValueError(
      f'The width of {name} must change its {unit}, but {granule} and '
      f'{high * granule} both give {cost(low):,.0f}. Give the name of another '
      'width to Model.width.'
    )
  limit = max(high, _WIDEST // granule)
  while cost(high) < target and high < limit:
    # Straight on from the two last: a guess that rounds down is doubled.
    guess = _crossing(low, high, cost, target)
    low, high = high, min(limit, max(guess + 1, 2 * high))
  before = math.inf
  while high - low > 1:
    guess = min(max(_crossing(low, high, cost, target), low + 1), high - 1)
    if high - low > before / 2:
      # The last line missed, as on a curve: it may do so again and again.
      guess = (low + high) // 2
    before = high - low
    if cost(guess) < target:
      low = guess
      # The line is nearly always right: its other side is close.
      if low + 1 < high and cost(low + 1) >= target:
        high = low + 1
    else:
      high = guess
      if high - 1 > low and cost(high - 1) < target:
        low = high - 1
  best = min((low, high), key=lambda count: abs(cost(count) - target))
  found = Solution(best * granule, cost(best), target)
  if abs(found.error) > tolerance:
    raise ValueError(
      f'{name} must have {target:,.0f} {unit} within {tolerance:.1%}, but the '
      f'nearest is {found.cost:,.0f} ({found.error:+.1%}) at width '
      f'{found.width}, of multiples of {granule}. Give a smaller '
      'Model.granule, a larger tolerance, or another base.'
    )
  return found


def _crossing(low, high, cost, target) -> int:
  """Where the line through two costs meets the target, rounded down."""
  slope = (cost(high) - cost(low)) / (high - low)
  if slope <= 0:
    return (low + high) // 2
  return int(low + (target - cost(low)) / slope)
