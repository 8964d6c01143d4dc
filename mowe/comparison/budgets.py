"""Makes a model as large as another one, in FLOPs or in parameters.

`solve` looks for the width whose cost is nearest to a target, among multiples
of a granule. A budget says what is counted as the cost, and an experiment says
which width is changed; for `solve` both are numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from mowe.models.families import costs

# The search ends here, because no sensible expert is wider.
_WIDEST = 2**24

# Counts of granules to begin with. They are far enough apart that their costs
# differ even where costs are rounded.
_FIRST_COUNTS = (1, 16)


@dataclasses.dataclass(frozen=True)
class EqualFlops:
  """Asks for as many forward FLOPs per pretraining token as a base model has.

  Attributes:
    base: name of the base model.
    tolerance: how far a model may be from the target, as a fraction of it.
  """

  base: str
  tolerance: float = 0.02

  unit = 'FLOPs per token'

  def cost(self, model: costs.ModelCosts, lengths: dict[str, int]) -> float:
    """Returns the FLOPs per token of a model, for examples of these lengths."""
    return flops_per_token(model, lengths)


@dataclasses.dataclass(frozen=True)
class EqualParameters:
  """Asks for as many parameters in total as a base model has.

  Attributes:
    base: name of the base model.
    tolerance: how far a model may be from the target, as a fraction of it.
  """

  base: str
  tolerance: float = 0.02

  unit = 'parameters'

  def cost(self, model: costs.ModelCosts, lengths: dict[str, int]) -> float:
    """Returns the number of parameters of a model; lengths do not matter."""
    del lengths
    return model.total_parameters


Budget = EqualFlops | EqualParameters


@dataclasses.dataclass(frozen=True)
class Solution:
  """A width, and how well it meets its target.

  Attributes:
    width: the width that was found, a multiple of the granule.
    cost: the cost of the model of this width.
    target: the cost that was asked for.
  """

  width: int
  cost: float
  target: float

  @property
  def error(self) -> float:
    """How far the cost is above the target, as a fraction of the target."""
    return self.cost / self.target - 1


def flops_per_token(model: costs.ModelCosts, lengths: dict[str, int]) -> float:
  """Returns the forward FLOPs of a full-length example, per token.

  Args:
    model: the costs of the model.
    lengths: number of tokens of 'inputs' and of 'targets'.
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
  """Returns the width whose cost is nearest to a target.

  Args:
    cost_of: returns the cost of the model of a width; it must not fall as
      widths rise. A call may take a second; about four calls are made if the
      costs lie nearly on a line.
    target: the cost to be met.
    granule: the width is a multiple of this number.
    tolerance: how far the cost may be from the target, as a fraction of it.
    name: name of the model, for error messages.
    unit: unit of the cost, for error messages.

  Raises:
    ValueError: no width is within the tolerance (the message names the nearest
      one), or the width does not change the cost.
  """
  if granule < 1:
    raise ValueError(
      f'granule must be at least 1, but that of {name} is {granule}. Take a '
      'multiple of 8 for a GPU.'
    )

  @functools.cache
  def cost(count: int) -> float:
    return cost_of(count * granule)

  low, high = _FIRST_COUNTS
  if cost(low) == cost(high):
    raise ValueError(
      f'The width of {name} must change its {unit}, but {granule} and '
      f'{high * granule} both give {cost(low):,.0f}. Give the name of another '
      'width to Model.width.'
    )
  limit = max(high, _WIDEST // granule)
  low, high = _narrowed(*_bracket(cost, target, limit), cost, target)
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


def _bracket(cost, target, limit) -> tuple[int, int]:
  """Returns two counts between which the target lies, or the last before it."""
  low, high = _FIRST_COUNTS
  while cost(high) < target and high < limit:
    # The line through the last two costs gives the next count, which is at
    # least doubled, because a guess that is rounded down may not advance.
    guess = _crossing(low, high, cost, target)
    low, high = high, min(limit, max(guess + 1, 2 * high))
  return low, high


def _narrowed(low, high, cost, target) -> tuple[int, int]:
  """Returns the neighbours between which the target lies."""
  before = math.inf
  while high - low > 1:
    guess = min(max(_crossing(low, high, cost, target), low + 1), high - 1)
    if high - low > before / 2:
      # The last line missed, as it does on a curve, where it may miss again
      # and again: bisection does not.
      guess = (low + high) // 2
    before = high - low
    if cost(guess) < target:
      low = guess
      # The line is nearly always right, so that its other side is close.
      if low + 1 < high and cost(low + 1) >= target:
        high = low + 1
    else:
      high = guess
      if high - 1 > low and cost(high - 1) < target:
        low = high - 1
  return low, high


def _crossing(low, high, cost, target) -> int:
  """Returns where the line through two costs meets the target, rounded down."""
  slope = (cost(high) - cost(low)) / (high - low)
  if slope <= 0:
    return (low + high) // 2
  return int(low + (target - cost(low)) / slope)
