"""The plug-in for T5X: our T5, with any of our layers, in T5X's own trainer.

A run of `python -m t5x.train`, `t5x.eval` or `t5x.infer` takes its model from
gin_configs/t5x/; nothing of T5X is changed. Expert tables are ordinary
parameters here, with ordinary gradients as large as themselves, and the model
looks up its routing ids itself. No other file of the package imports T5X.

Source: google-research/t5x at commit cc342d4.
"""

import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from mowe.interop.t5x import t5x_rules
from mowe.layers import feed_forward_base
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import router_losses
from mowe.models import parameters
from mowe.models.t5 import t5, t5_config
from mowe.training import router_training, training_step
from mowe.words import byte_vocabulary, routing_vocabulary

try:
  import seqio
  import tensorflow as tf
  from clu import metrics as clu_metrics
  from t5x import adafactor, decoding, losses, models, optimizers
except ImportError as error:
  raise ImportError(
    'mowe.interop.t5x.t5x_models needs T5X and what T5X imports, but '
    f'{error}. Put a clone of google-research/t5x on PYTHONPATH and install '
    'what docs/t5x.md lists, or train with `mowe train`, which needs no T5X.'
  ) from error

Batch = Mapping[str, jax.Array]
Metrics = MutableMapping[str, clu_metrics.Metric]

# The share of a microbatch in the tokens of its batch: T5X adds up the losses
# of microbatches itself, and gives each to the model as if it were a whole
# batch.
_WHOLE = {'encoder': 1.0, 'decoder': 1.0}

# T5X's name of a metric over all layers -> our name of the metric of a layer.
_OF_ALL_LAYERS = {
  'auxiliary_loss': 'load_balance_loss',
  'router_z_loss': 'router_z_loss',
  'fraction_tokens_left_behind': 'left_behind',
  'expert_usage': 'usage',
  'router_confidence': 'confidence',
}


class EncoderDecoderModel(models.EncoderDecoderModel):
  """T5X's encoder-decoder model around `mowe.models.t5.t5.T5`.

  The loss is T5X's: a sum over target tokens, unless it is normalised. The
  losses of routers weigh as in `mowe train`, as parts of the mean loss of a
  token, whatever the normalising factor and the number of microbatches are.

  There are these metrics: those of T5X; those of t5x/contrib/moe, named
  `experts/...`, over all layers and without coefficients; those of each router
  under the name of its layer, as `encoder/layers_1/mlp/dropped`; and with a
  routing vocabulary the shares of tokens `encoder_routed`, `encoder_skipped`
  and `encoder_padding`, and the same of the decoder.

  Attributes:
    module: the model.
    input_vocabulary: the subwords of the inputs of T5X's tasks.
    output_vocabulary: the subwords of the targets of T5X's tasks.
    optimizer_def: one of T5X's optimizers, or `freeze_experts` of one.
    decode_fn: T5X's function that generates text. It and the arguments that
      are not named here are those of T5X's class.
    router_loss: coefficients of the losses of learned routers.

  Raises:
    ValueError: a part of the model cannot be trained by T5X, or the routing
      vocabulary was built for other subwords.
  """

  def __init__(
    self,
    module: t5.T5,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: optimizers.OptimizerDefType,
    decode_fn: Callable[..., Any] = decoding.beam_search,
    feature_converter_cls: Callable[..., Any] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float | str | None = None,
    router_loss: router_training.RouterLossConfig = (
      router_training.RouterLossConfig()
    ),
  ):
    _check_layers(module.config)
    _check_routing(module.config.routing, input_vocabulary)
    super().__init__(
      module=module,
      input_vocabulary=input_vocabulary,
      output_vocabulary=output_vocabulary,
      optimizer_def=optimizer_def,
      decode_fn=decode_fn,
      feature_converter_cls=feature_converter_cls,
      label_smoothing=label_smoothing,
      z_loss=z_loss,
      loss_normalizing_factor=loss_normalizing_factor,
    )
    self._router_loss = router_loss

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> flax.core.FrozenDict:
    """Returns parameters and their logical axes.

    No shape depends on the inputs. Linen's `init` gives statistics of routers
    as well, which are left out, as they would become a part of the train state.
    """
    del input_shapes, input_types
    variables = parameters.initial_variables(self.module, rng)
    return flax.core.freeze(
      {name: variables[name] for name in ('params', 'params_axes')}
    )

  def loss_fn(
    self, params: Any, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, Metrics]:
    """Returns the loss, <float32>[], and the metrics; see the class."""
    logits, variables = self._compute_logits(
      params, batch, dropout_rng, mutable=[router_losses.COLLECTION]
    )
    divisor, weights = losses.get_loss_normalizing_factor_and_weights(
      self._loss_normalizing_factor, batch
    )
    targets = batch['decoder_target_tokens']
    loss, z_loss, weight_sum = losses.compute_weighted_cross_entropy(
      logits,
      targets,
      weights=weights,
      label_smoothing=self._label_smoothing,
      z_loss=self._z_loss,
      loss_normalizing_factor=divisor,
    )
    stats = router_training.layer_stats(variables)
    router_loss = router_training.loss(stats, self._router_loss, shares=_WHOLE)
    router_loss *= weight_sum / (1.0 if divisor is None else divisor)
    metrics = self._compute_metrics(
      logits=logits,
      targets=targets,
      mask=weights,
      loss=loss + router_loss,
      z_loss=z_loss,
      segment_ids=_segments(batch),
    )
    # T5X takes these two from the loss, of which routers' losses are a part.
    for name in ('cross_ent_loss', 'cross_ent_loss_per_all_target_tokens'):
      metrics[name] = metrics[name].replace(
        total=metrics[name].total - router_loss
      )
    metrics |= _router_metrics(stats) | self._routing_metrics(batch)
    return loss + router_loss, metrics

  # Gin binds the arguments of methods class by class: without a method of this
  # class, a gin file could not set the number of beams.
  def predict_batch_with_aux(
    self,
    params: Any,
    batch: Batch,
    rng: jax.Array | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    prompt_with_targets: bool = False,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Returns what T5X's does: tokens <int32>[batch, targets], and their
    scores.

    Returns:
      The tokens, and {'scores': <float32>[batch]}.
    """
    return super().predict_batch_with_aux(
      params,
      batch,
      rng=rng,
      decoder_params=decoder_params,
      return_all_decodes=return_all_decodes,
      num_decodes=num_decodes,
      prompt_with_targets=prompt_with_targets,
    )

  def _routing_metrics(self, batch):
    """Returns the shares of tokens with and without an expert."""
    routing = self.module.config.routing
    if routing is None:
      return {}
    # The model looks up the same ids, and XLA does it once.
    ids = {
      'encoder_routing_ids': routing.encoder_ids(
        batch['encoder_input_tokens'], batch.get('encoder_segment_ids')
      ),
      'decoder_routing_ids': routing.decoder_ids(
        batch['decoder_input_tokens'], batch.get('decoder_segment_ids')
      ),
    }
    means = training_step.routing_metrics(self.module, ids)
    return {name: _average(mean) for name, mean in means.items()}


class _FrozenExperts(optimizers.MultiOptimizer):
  """An Adafactor for all parameters that leaves experts as they are.

  A MultiOptimizer that gives experts to no optimizer would keep no state for
  them, so that T5X could not restore a checkpoint of a run that trained them.
  This one has the state of an ordinary Adafactor, and puts back the parameters
  and statistics of experts after each update. It is a MultiOptimizer because
  T5X's partitioners know the state of T5X's own classes only.
  """

  def __init__(self, optimizer):
    everything = flax.traverse_util.ModelParamTraversal(lambda path, _: True)
    super().__init__([(everything, optimizer)])

  def init_state(self, params):
    names = flax.traverse_util.flatten_dict(flax.core.unfreeze(params))
    if not any(map(t5x_rules.is_expert, names)):
      raise ValueError(
        'freeze_experts needs a model with experts, but none of its '
        f'{len(names)} parameters belongs to one. Leave out '
        'gin_configs/t5x/frozen_experts.gin.'
      )
    return super().init_state(params)

  def apply_gradient(self, hyper_params, params, state, grads):
    # Zeros, so that XLA does not compute them and no norm counts them.
    grads = _where_expert(jax.tree.map(jnp.zeros_like, grads), grads)
    new_params, new_state = super().apply_gradient(
      hyper_params, params, state, grads
    )
    return (
      _where_expert(params, new_params),
      new_state.replace(
        param_states=_where_expert(state.param_states, new_state.param_states)
      ),
    )


def freeze_experts(
  optimizer: optimizers.OptimizerDefType,
) -> optimizers.OptimizerDefType:
  """Returns an optimizer for all parameters but experts, which do not change.

  Word experts, and those of MoeLayers, keep their statistics as well, so that
  checkpoints of runs with and without frozen experts fit each other. Routers
  are trained.

  Raises:
    ValueError: the optimizer is not T5X's Adafactor; or, when it is given
      parameters, none of them belongs to an expert.
  """
  if not isinstance(optimizer, adafactor.Adafactor):
    raise ValueError(
      "freeze_experts needs T5X's Adafactor, but got a "
      f'{type(optimizer).__name__}. With optax, wrap '
      'mowe.training.optimization.optimizers.freeze in '
      't5x.optimizers.OptaxWrapper.'
    )
  return _FrozenExperts(optimizer)


def _where_expert(experts: Any, others: Any) -> Any:
  """Returns experts of the first tree, and all else of the second.

  Both are trees of parameters, or of what an optimizer keeps of each parameter.
  """
  flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(others))
  of_experts = flax.traverse_util.flatten_dict(flax.core.unfreeze(experts))
  chosen = flax.traverse_util.unflatten_dict(
    {
      path: of_experts[path] if t5x_rules.is_expert(path) else value
      for path, value in flat.items()
    }
  )
  is_frozen = isinstance(others, flax.core.FrozenDict)
  return flax.core.freeze(chosen) if is_frozen else chosen


def _segments(batch):
  """Returns the arrays in which T5X counts padding and packed examples."""
  streams = ('encoder', 'decoder')
  if 'encoder_segment_ids' in batch:
    return {name: batch[f'{name}_segment_ids'] for name in streams}
  names = ('encoder_input_tokens', 'decoder_target_tokens')
  return {name: batch[name] > 0 for name in names}


def _router_metrics(stats) -> Metrics:
  """Returns the metrics of each layer, and of all layers together."""
  means = {
    name: mean
    for name, mean in router_training.metrics(stats).items()
    # T5X writes single numbers, and has no place for one of each expert.
    if jnp.ndim(mean.total) == 0
  }
  found = {name: _average(mean) for name, mean in means.items()}
  if stats:
    for theirs, ours in _OF_ALL_LAYERS.items():
      parts = [m for name, m in means.items() if name.split('/')[-1] == ours]
      total, count = (sum(part) for part in zip(*parts, strict=True))
      found[f'experts/{theirs}'] = clu_metrics.Average(total, count)
  return found


def _average(mean) -> clu_metrics.Average:
  return clu_metrics.Average(jnp.asarray(mean.total), jnp.asarray(mean.count))


def _check_layers(config: t5_config.T5Config) -> None:
  """Raises ValueError if a layer has a part that T5X cannot train."""
  if config.memories:
    names = [memory.name for memory in config.memories]
    raise ValueError(
      'In T5X a model must have no memories, as their rows need an optimizer '
      f'of their own, but this one has {names}. Train it with `mowe train`.'
    )
  if config.expert_names is not None:
    raise ValueError(
      'In T5X the experts of a model must be those of words, but here '
      f'{type(config.expert_names.address).__name__} names them. Train it with '
      '`mowe train`.'
    )
  for layer in config.sparse_layers().values():
    reads_tokens = feed_forward_base.contract(layer).reads_token_ids
    if not reads_tokens and config.routing is None:
      raise ValueError(
        'In T5X a model with word experts looks words up itself and needs a '
        'routing vocabulary, but T5Config.routing is None. Set '
        'ROUTING_VOCABULARY to a file of `mowe build-routing-vocabulary`.'
      )
    is_mowe = isinstance(layer, word_experts.MoweLayer)
    if is_mowe and layer.table_dtype != 'float32':
      raise ValueError(
        "In T5X table_dtype must be 'float32', but is "
        f'{layer.table_dtype!r}, which is kept as bits without a gradient. '
        'Set it to float32, or train with `mowe train`.'
      )
    is_learned = isinstance(layer, moe.MoeLayer) and layer.routing.is_learned
    if is_learned and layer.routing.bias_rate > 0:
      raise ValueError(
        "In T5X a router's bias_rate must be 0, but is "
        f'{layer.routing.bias_rate}: its selection bias follows from counts, '
        "and T5X's optimizers know gradients only. Set it to 0 and use the "
        'load-balancing loss, or train with `mowe train`.'
      )


def _check_routing(
  routing: routing_vocabulary.RoutingVocabulary | None,
  vocabulary: seqio.Vocabulary,
) -> None:
  """Raises ValueError if the routing vocabulary is for other subwords."""
  if routing is None:
    return
  if isinstance(vocabulary, seqio.ByteVocabulary):
    digest = byte_vocabulary.ByteVocabulary(vocabulary.extra_ids).sha256
  elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
    # The file, and not `sp_model`, to which seqio has added the sentinels.
    with tf.io.gfile.GFile(vocabulary.sentencepiece_model_file, 'rb') as file:
      digest = hashlib.sha256(file.read()).hexdigest()
  else:
    raise ValueError(
      'A model with word experts needs a SentencePieceVocabulary or a '
      f'ByteVocabulary of seqio, but has {vocabulary}. Take one of these, and '
      'build the routing vocabulary for it.'
    )
  if (digest, vocabulary.vocab_size) != (
    routing.subwords_sha256,
    routing.subwords_size,
  ):
    raise ValueError(
      'The routing vocabulary must be built for the subword vocabulary in use: '
      f'it was built for sha256 {routing.subwords_sha256} with '
      f'{routing.subwords_size} ids, but {vocabulary} has sha256 {digest} with '
      f'{vocabulary.vocab_size}. Set VOCABULARY_PATH to that vocabulary, or '
      'build the routing vocabulary again.'
    )
