"""Evaluations during training: loss on other data, and questions answered."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn

from mowe.commands import data_config
from mowe.evaluation import language_modeling, task_evaluation
from mowe.layers import feed_forward_base
from mowe.models import model_config, parameters, token_memories
from mowe.training import train_metrics, training_step
from mowe.words.plans import batch_router, row_plans

# Takes (params, tables), and returns numbers by name.
Evaluation = Callable[[Any, parameters.Tables], dict[str, float]]


def make_router(
  config: model_config.ModelConfig,
  trial_batches: Iterable[batch_router.Batch],
  mesh_shape: Mapping[str, int],
  num_microbatches: int = 1,
) -> batch_router.RoutesBatches:
  """Makes what adds routing ids and plans to the batches of a model.

  Batches of a model without tables stay as they are. There is no plan for a
  model whose layers read tables from the host.

  Args:
    config: the config of the model.
    trial_batches: batches from which the plan is sized.
    mesh_shape: size of each mesh axis by its name; an axis that is left out
      has size 1.
    num_microbatches: number of parts into which a batch is cut.
  """
  streams = model_config.word_streams(config)
  names = model_config.names_experts(config)
  if _reads_from_host(config):
    if streams:
      return batch_router.IdsRouter(names)
    return batch_router.NoRouter()
  if not (streams or config.memories):
    return batch_router.NoRouter()
  trial_batches = list(trial_batches)
  experts = None
  if streams:
    experts = batch_router.BatchRouter(
      names,
      streams=streams,
      trial_batches=trial_batches,
      num_microbatches=num_microbatches,
      devices=tuple(mesh_shape.get(axis, 1) for axis in ('data', 'expert')),
    )
  memories = {
    memory.name: row_plans.RowPlanner(
      memory.address,
      streams=token_memories.streams_of(memory),
      num_rows=memory.num_rows,
      trial_batches=trial_batches,
      num_microbatches=num_microbatches,
    )
    for memory in config.memories
  }
  return batch_router.StepRouter(experts, memories)


def _reads_from_host(config: model_config.ModelConfig) -> bool:
  """Whether the layers or memories of a model read tables from the host."""
  layers = map(feed_forward_base.contract, config.sparse_layers().values())
  return any(layer.rows_from is not None for layer in layers) or any(
    memory.rows_from is not None for memory in config.memories
  )


@dataclasses.dataclass(frozen=True)
class LossEvaluation:
  """Loss and accuracy with teacher forcing.

  Attributes:
    data: the examples; each of them is read once, in order.
    num_batches: maximum number of batches; None: all of them.
    name: prefix of the names of the metrics.
  """

  data: data_config.DataConfig
  num_batches: int | None = None
  name: str = 'validation'

  def prepare(
    self, model: nn.Module, vocabulary: Any, loss: training_step.LossConfig
  ) -> Evaluation:
    """Makes the batches once, and the router that plans them for the mesh."""
    batches = list(
      itertools.islice(
        self.data.open(vocabulary, model.config).eval_batches(),
        self.num_batches,
      )
    )
    router = make_router(
      model.config, batches, jax.sharding.get_abstract_mesh().shape
    )
    eval_step = jax.jit(training_step.make_eval_step(model, loss))

    def evaluation(params, tables):
      totals: dict[str, train_metrics.Mean] = {}
      for batch in batches:
        metrics = eval_step(params, tables, *router(batch))
        totals = train_metrics.merge(totals, jax.device_get(metrics))
      values = train_metrics.compute(totals)
      return {f'{self.name}/{key}': value for key, value in values.items()}

    return evaluation


@dataclasses.dataclass(frozen=True)
class TextEvaluation:
  """Perplexity of a text, and bits per byte where its bytes were counted.

  Attributes:
    data: one token cache of text. The length of 'targets' is the number of
      tokens of a window.
    reading: how the windows follow each other.
    name: prefix of the names of the metrics.
  """

  data: data_config.DataConfig
  reading: language_modeling.ReadingConfig = language_modeling.ReadingConfig()
  name: str = 'validation'

  def prepare(
    self, model: nn.Module, vocabulary: Any, loss: training_step.LossConfig
  ) -> Evaluation:
    """Opens the text once."""
    del loss
    cache = self.data.open_verified(self.data.mixture_or_task_name, vocabulary)

    def evaluation(params, tables):
      score = language_modeling.score_text(
        model,
        parameters.merge_tables(params, tables),
        cache,
        batch_size=self.data.batch_size,
        length=self.data.task_feature_lengths['targets'],
        reading=self.reading,
      )
      values = score.metrics()
      return {f'{self.name}/{key}': value for key, value in values.items()}

    return evaluation


@dataclasses.dataclass(frozen=True)
class QuestionEvaluation:
  """Exact match and F1 of greedily generated answers, or a task's metrics.

  A task of GLUE or SuperGLUE has metrics of its own. They are returned besides
  'em', and a metric of the name 'f1' replaces the F1 of words.

  Attributes:
    data: a token cache of questions.
    metric: `text_metrics.squad` or `text_metrics.trivia_qa`; None: the metric
      that the token cache names.
    name: prefix of the names of the metrics.
  """

  data: data_config.DataConfig
  metric: Callable[..., dict[str, float]] | None = None
  name: str = 'validation'

  def prepare(
    self, model: nn.Module, vocabulary: Any, loss: training_step.LossConfig
  ) -> Evaluation:
    """Opens the questions once."""
    del loss
    cache = self.data.open_verified(self.data.mixture_or_task_name, vocabulary)

    def evaluation(params, tables):
      generator = self.data.make_generator(
        model, parameters.merge_tables(params, tables)
      )
      result = task_evaluation.evaluate_questions(
        generator,
        cache,
        vocabulary,
        metric=self.metric,
      )
      values = {'em': result.em, 'f1': result.f1, **result.scores}
      return {
        f'{self.name}/{key}': value
        for key, value in values.items()
        if value is not None
      }

    return evaluation
