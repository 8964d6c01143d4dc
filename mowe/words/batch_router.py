"""Routing ids and the plan of a batch, made on the host before its step."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mowe.words import plan as plans

Batch = dict[str, np.ndarray]


def add_routing_ids(batch: Batch, routing: Any) -> Batch:
  """The batch with `encoder_routing_ids` and `decoder_routing_ids`.

  The same function of the tokens that the model would apply itself.

  Args:
    batch: as in docs/architecture.md.
    routing: a RoutingVocabulary.
  """
  return batch | {
    'encoder_routing_ids': routing.encoder_ids(
      batch['encoder_input_tokens'], batch.get('encoder_segment_ids')
    ),
    'decoder_routing_ids': routing.decoder_ids(
      batch['decoder_input_tokens'], batch.get('decoder_segment_ids')
    ),
  }


class BatchRouter:
  """Adds routing ids to batches and plans their experts.

  Args:
    routing: a RoutingVocabulary.
    streams: which of 'encoder' and 'decoder' have sparse layers.
    trial_batches: from which the capacity profiles are made: some twenty
      training batches.
    num_microbatches: parts into which a step cuts the batch.

  Call: a batch to (the batch with routing ids, its ExpertPlan). May be called
    from several threads.
  """

  def __init__(
    self,
    routing: Any,
    *,
    streams: tuple[str, ...],
    trial_batches: Iterable[Batch],
    num_microbatches: int = 1,
  ):
    self._routing = routing
    self._streams = streams
    ladder = plans.profile_ladder(
      (self._ids(add_routing_ids(b, routing)) for b in trial_batches),
      routing.num_experts,
      num_microbatches=num_microbatches,
    )
    # Of an ordinary batch, with some slack.
    self.experts_at_once = ladder[0].updates.num_experts
    self.planner = plans.Planner(
      ladder, routing.num_experts, num_microbatches=num_microbatches
    )

  def __call__(self, batch: Batch) -> tuple[Batch, plans.ExpertPlan]:
    batch = add_routing_ids(batch, self._routing)
    return batch, self.planner(self._ids(batch))

  def _ids(self, batch: Batch) -> Batch:
    return {name: batch[f'{name}_routing_ids'] for name in self._streams}
