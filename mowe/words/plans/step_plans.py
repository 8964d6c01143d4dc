"""The plan of a step: word experts, and the rows of each memory."""

from typing import NamedTuple

from mowe.words.plans import batch_plans, row_plans, sharded_plan

# The name of the group of all tables of word experts. A memory's table is a
# group of its own, under the name of the memory.
EXPERTS = 'experts'

GroupPlan = (
  batch_plans.ExpertPlan | sharded_plan.ShardedPlan | row_plans.RowsPlan
)


class StepPlan(NamedTuple):
  """What a step has to know about the tables that its batch reads.

  Attributes:
    experts: the plan of word experts; None if the model has none.
    memories: name of a memory -> the plan of its rows.
  """

  experts: batch_plans.ExpertPlan | sharded_plan.ShardedPlan | None
  memories: dict[str, row_plans.RowsPlan]

  def groups(self) -> dict[str, GroupPlan]:
    """Returns the plan of each group of tables, by the group's name."""
    experts = {} if self.experts is None else {EXPERTS: self.experts}
    return {**experts, **self.memories}

  @classmethod
  def of_groups(cls, groups: dict[str, GroupPlan]) -> 'StepPlan':
    """Inverse of `groups`."""
    memories = {k: v for k, v in groups.items() if k != EXPERTS}
    return cls(groups.get(EXPERTS), memories)
