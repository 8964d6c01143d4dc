"""What T5X must know of the parameters of experts; needs no T5X.

T5X looks up the logical axes of every parameter in two tables: how they are
split over its mesh, and how its Adafactor factors them.
"""

from mowe.models.families import costs
from mowe.training.optimization import factoring_rules


def axis_rules() -> tuple[tuple[str, str | None], ...]:
  """Logical axis and mesh axis, for what T5X's standard rules lack.

  For `t5x.partitioning.standard_logical_axis_rules.additional_rules`. The mesh
  of T5X itself has no axis for experts: every device holds them all. That of
  t5x/contrib/moe has one, and rules of its own for these names.
  """
  return (('expert', None), ('expert_mlp', 'model'), ('unmodeled', None))


def factor_rules() -> dict[str, str]:
  """Logical axis and 'row', 'column', 'batch' or 'none', of all parameters.

  For `t5x.adafactor.Adafactor.logical_factor_rules`: T5X's standard rules and
  those of experts, each of which has statistics of its own.
  """
  return {
    axis: rule.value for axis, rule in factoring_rules.FACTOR_RULES.items()
  }


def is_expert(path: tuple[str, ...]) -> bool:
  """Whether a parameter belongs to word experts, or to those of a MoeLayer.

  Routers and shared experts, which every token meets, are not among them.
  """
  is_table = len(path) > 1 and path[-2] == 'experts'
  return is_table or costs.is_expert(path)
