"""Makes routing ids and plans of batches, on the host and before the step."""

import abc
import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mowe.words import routing_vocabulary
from mowe.words.plans import batch_plans, row_plans, sharded_plan, step_plans

Batch = dict[str, np.ndarray]
Plan = batch_plans.ExpertPlan | sharded_plan.ShardedPlan


def add_routing_ids(
  batch: Batch, routing: routing_vocabulary.RoutingVocabulary
) -> Batch:
  """Returns a batch with routing ids, those that the model would find itself.

  Args:
    batch: arrays <int32>[batch, length] by name, among them
      `decoder_input_tokens`, and `encoder_input_tokens` if the model has an
      encoder; with `decoder_segment_ids` and so on if the batch is packed.
    routing: the routing vocabulary of the model.

  Returns:
    The batch with `decoder_routing_ids`, and with `encoder_routing_ids` if it
    has inputs of an encoder; both are <int32>[batch, length].
  """
  batch = batch | {
    'decoder_routing_ids': routing.decoder_ids(
      batch['decoder_input_tokens'], batch.get('decoder_segment_ids')
    )
  }
  if 'encoder_input_tokens' in batch:
    batch['encoder_routing_ids'] = routing.encoder_ids(
      batch['encoder_input_tokens'], batch.get('encoder_segment_ids')
    )
  return batch


class RoutesBatches(abc.ABC):
  """What is done on the host with each batch before a step.

  Attributes:
    seen_loads: <int64>[num_experts], number of tokens of each word expert in
      the trial batches, if there were any; empty without word experts.
    at_once: name of a group of tables (see `step_plans`) -> number of rows that
      an ordinary batch reads, with some slack; {} if batches have no plan.

  Call: takes a batch, returns the batch with its routing ids, if the model
    needs them, and its plan or None. It may be called from several threads.
  """

  seen_loads: np.ndarray = np.zeros(0, np.int64)
  at_once: Mapping[str, int] = types.MappingProxyType({})

  @abc.abstractmethod
  def __call__(self, batch: Batch) -> tuple[Batch, Any]: ...


class NoRouter(RoutesBatches):
  """Leaves batches as they are: the model has no tables."""

  def __call__(self, batch: Batch) -> tuple[Batch, None]:
    return batch, None


@dataclasses.dataclass(frozen=True)
class IdsRouter(RoutesBatches):
  """Adds routing ids and plans nothing, as for experts read from the host.

  Attributes:
    routing: the routing vocabulary of the model.
  """

  routing: routing_vocabulary.RoutingVocabulary

  def __call__(self, batch: Batch) -> tuple[Batch, None]:
    return add_routing_ids(batch, self.routing), None


class BatchRouter(RoutesBatches):
  """Adds routing ids to batches and plans their experts.

  Args:
    routing: the routing vocabulary of the model.
    streams: which of 'encoder' and 'decoder' have sparse layers.
    trial_batches: training batches, some twenty, from which the profiles of
      plans are made.
    num_microbatches: number of parts into which a step cuts the batch.
    devices: number of devices along the mesh axes (data, expert). With more
      than one along `expert`, plans are ShardedPlans.

  Attributes:
    planner: makes the plans, and counts which profiles it used.
  """

  def __init__(
    self,
    routing: routing_vocabulary.RoutingVocabulary,
    *,
    streams: tuple[str, ...],
    trial_batches: Iterable[Batch],
    num_microbatches: int = 1,
    devices: tuple[int, int] = (1, 1),
  ):
    self._routing = routing
    self._streams = streams
    self.seen_loads = np.zeros(routing.num_experts, np.int64)
    make_ladder, make_plan = batch_plans.profile_ladder, batch_plans.make_plan
    if devices[1] > 1:
      make_ladder, make_plan = (
        functools.partial(function, devices=devices)
        for function in (sharded_plan.profile_ladder, sharded_plan.make_plan)
      )
    ladder = make_ladder(
      map(self._seen_ids, trial_batches),
      routing.num_experts,
      num_microbatches=num_microbatches,
    )
    self.at_once = {step_plans.EXPERTS: ladder[0].updates.num_experts}
    self.planner = batch_plans.Planner(
      ladder,
      routing.num_experts,
      num_microbatches=num_microbatches,
      make_plan=make_plan,
    )

  def __call__(self, batch: Batch) -> tuple[Batch, Plan]:
    batch = add_routing_ids(batch, self._routing)
    return batch, self.planner(self._ids(batch))

  def _ids(self, batch: Batch) -> Batch:
    return {name: batch[f'{name}_routing_ids'] for name in self._streams}

  def _seen_ids(self, batch: Batch) -> Batch:
    ids = self._ids(add_routing_ids(batch, self._routing))
    num_experts = self._routing.num_experts
    for of_stream in ids.values():
      has_expert = (of_stream >= 0) & (of_stream < num_experts)
      self.seen_loads += np.bincount(
        of_stream[has_expert], minlength=num_experts
      )
    return ids


class StepRouter(RoutesBatches):
  """Plans word experts and the rows of all memories.

  Args:
    experts: plans word experts; None if the model has none.
    memories: name of a memory -> the planner of its rows.
  """

  def __init__(
    self,
    experts: BatchRouter | None,
    memories: Mapping[str, row_plans.RowPlanner],
  ):
    self._experts = experts
    self._memories = memories
    self.at_once = {
      name: planner.rows_at_once for name, planner in memories.items()
    }
    if experts is not None:
      self.seen_loads = experts.seen_loads
      self.at_once |= experts.at_once

  def __call__(self, batch: Batch) -> tuple[Batch, step_plans.StepPlan]:
    plan = None
    if self._experts is not None:
      batch, plan = self._experts(batch)
    rows = {name: planner(batch) for name, planner in self._memories.items()}
    return batch, step_plans.StepPlan(plan, rows)
