"""Rules that tell T5X what the parameters of experts are; needs no T5X.

T5X looks up the logical axes of every parameter in two tables: one says how
they are split over its mesh, the other how its Adafactor factors them.
"""

from mowe.models.families import costs
from mowe.training.optimization import factoring_rules


def axis_rules() -> tuple[tuple[str, str | None], ...]:
  """Returns pairs of logical axis and mesh axis that T5X's own rules lack.

  They are for `t5x.partitioning.standard_logical_axis_rules.additional_rules`.
  The mesh of T5X has no axis for experts, so every device holds them all. The
  mesh of t5x/contrib/moe has one, and rules of its own for these names.
  """
  return (('expert', None), ('expert_mlp', 'model'), ('unmodeled', None))


def factor_rules() -> dict[str, str]:
  """Returns logical axis -> 'row', 'column', 'batch' or 'none'.

  They are for `t5x.adafactor.Adafactor.logical_factor_rules`: T5X's standard
  rules, and those for the axes of experts, each of which has statistics of its
  own.
  """
  return {
    axis: rule.value for axis, rule in factoring_rules.FACTOR_RULES.items()
  }


def is_expert(path: tuple[str, ...]) -> bool:
  """Whether a parameter belongs to word experts, or to those of a MoeLayer.

  Routers do not, nor do shared experts, which every token meets.
  """
  is_table = len(path) > 1 and path[-2] == 'experts'
  return is_table or costs.is_expert(path)
