"""Routing ids and the plan of a batch, made on the host before its step."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from mowe.words import batch_plans, sharded_plan

Batch = dict[str, np.ndarray]


def add_routing_ids(batch: Batch, routing: Any) -> Batch:
  """The batch with routing ids, `decoder_routing_ids` and those of an encoder.

  The same function of the tokens that the model would apply itself.

  Args:
    batch: as in docs/architecture.md.
    routing: a RoutingVocabulary.
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


class BatchRouter:
  """Adds routing ids to batches and plans their experts.

  Args:
    routing: a RoutingVocabulary.
    streams: which of 'encoder' and 'decoder' have sparse layers.
    trial_batches: from which the capacity profiles are made: some twenty
      training batches.
    num_microbatches: parts into which a step cuts the batch.
    devices: along the mesh axes (data, expert). Experts on more than one get
      a ShardedPlan.

  Attributes:
    seen_loads: <int64>[num_experts], tokens of each in the trial batches.

  Call: a batch to (the batch with routing ids, its plan). May be called from
    several threads.
  """

  def __init__(
    self,
    routing: Any,
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
    # Of an ordinary batch, with some slack.
    self.experts_at_once = ladder[0].updates.num_experts
    self.planner = batch_plans.Planner(
      ladder,
      routing.num_experts,
      num_microbatches=num_microbatches,
      make_plan=make_plan,
    )

  def __call__(
    self, batch: Batch
  ) -> tuple[Batch, batch_plans.ExpertPlan | sharded_plan.ShardedPlan]:
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
