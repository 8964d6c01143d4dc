"""The protocol of all model configs, and the functions that they share.

Training, data and commands know a model by `ModelConfig` alone. `T5Config` and
`DecoderOnlyConfig` implement it with the checks and factories below.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mowe.layers import feed_forward_base, platforms
from mowe.layers.attention import attention_base
from mowe.words.addresses import expert_address

# Linen collection that a batch leaves to the next one; see `memory_length`.
MEMORY = 'segment_memory'

# Names, in a block, of the self-attention of an encoder and of the attention of
# a decoder to the encoder.
ENCODER_ATTENTION = 'attention'
CROSS_ATTENTION = 'encoder_decoder_attention'

# A callable that makes a layer, such as the class of the layer.
Factory = Callable[..., nn.Module]


class Routing(Protocol):
  """What names the word experts of tokens; it takes JAX arrays.

  A routing vocabulary is one, and so is `expert_address.ExpertAddress`.

  Attributes:
    num_experts: the number of word experts that it tells apart.
  """

  num_experts: int

  def encoder_ids(self, tokens, segment_ids=None):
    """Routing ids <int32>[batch, length] of whole words."""

  def decoder_ids(self, tokens, segment_ids=None):
    """Routing ids <int32>[batch, length] of the words so far."""

  def decoder_step(self, tokens, state):
    """Routing ids of one token [batch, 1], and the next state."""

  def initial_state(self, batch):
    """State before the first token, <int32 or uint32>[batch, any]."""


class ModelConfig(Protocol):
  """Sizes and parts of a model.

  `families.build` makes a Linen module of it, which keeps it as `config` and
  has two calls:
    of_batch(batch, enable_dropout=...): logits <float32>[batch, targets, vocab]
      of a batch as docs/architecture/data.md describes it;
    start_generation(variables, inputs, max_length, rows_per_example): the
      `decoding.CountedStep` and the cache that generation begins with.
  Its parameters stand below the names of its streams.

  Attributes:
    vocab_size: number of rows of the embedding.
    emb_dim: width of the model, the size of one token's activation.
    dropout_rate: dropout probability in all layers.
    dtype: dtype of activations; parameters are float32.
    logits_via_embedding: whether the logits are products with the embedding;
      otherwise they have a kernel of their own.
    routing: the routing vocabulary; None if the model reads no words. It makes
      routing ids where the batch has none.
    expert_names: makes routing ids in its place, by an address; None for the
      experts of words. See `names_experts`.
    sparse_feed_forward: factory of the sparse feed-forwards; None if all
      feed-forwards are dense.
    streams: the streams of tokens in a batch: 'decoder', preceded by 'encoder'
      if the inputs have a stack of their own.
    memory_length: number of tokens of earlier batches that a batch attends to.
      If it is not 0, `initial_memory(batch_size)` returns the collection MEMORY
      before the first batch, and every pass returns it for the next one.
    block_layers: pairs of a place and a factory, for layers of single blocks
      that differ from the others: `(('decoder/layers_3/mlp', factory),)`.
      `of_block` returns the config of one block.
    layer_fields: from the stream and the name of a layer in a block to the
      config field whose factory makes it.
    shared_fields: from a config field that may be None to the field whose
      factory then takes its place.
    memories: the memories of the model (`token_memories.Memory`).
  """

  vocab_size: int
  emb_dim: int
  dropout_rate: float
  dtype: Any
  logits_via_embedding: bool
  routing: Routing | None
  expert_names: expert_address.ExpertAddress | None
  sparse_feed_forward: Factory | None
  streams: tuple[str, ...]
  memory_length: int
  block_layers: tuple[tuple[str, Factory], ...]
  layer_fields: Mapping[tuple[str, str], str]
  shared_fields: Mapping[str, str]
  memories: tuple[Any, ...]

  def depths(self) -> dict[str, int]:
    """The number of blocks of each stream."""

  def sparse_blocks(self) -> dict[str, tuple[int, ...]]:
    """Of each stream the blocks, from 0, whose feed-forward is sparse."""

  def sparse_layers(self) -> dict[str, nn.Module]:
    """Of each stream a sparse layer; {} without `sparse_feed_forward`."""

  def attentions(self) -> dict[str, attention_base.Attention]:
    """An attention of each kind, by its name in a block."""

  def parts(self) -> dict[str, nn.Module]:
    """A layer of each field that makes some, by the name of the field."""

  def with_layer_changes(self, **changes: Any) -> 'ModelConfig':
    """This config with other fields in those sparse layers that have them."""

  def check_mesh(
    self,
    mesh_shape: Mapping[str, int],
    batch_size: int,
    lengths: Mapping[str, int],
  ) -> None:
    """Raises ValueError if sparse layers cannot be split over a mesh."""


def default_dtype() -> str:
  """'bfloat16' on accelerators, 'float32' on CPU, where it is faster."""
  return 'float32' if platforms.target() == 'cpu' else 'bfloat16'


def activation_dtype(dtype: Any) -> np.dtype:
  """The dtype that a name or type stands for.

  Raises:
    ValueError: it is neither float32 nor bfloat16.
  """
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16):
    reason = ''
    if found == jnp.float16:
      reason = (
        ': the activations of T5 exceed its largest number, 65504, and '
        'training ends in NaN'
      )
    raise ValueError(
      f'dtype must be float32 or bfloat16, but is {found or dtype}{reason}. Use '
      "'bfloat16'."
    )
  return found


def of_block(config: Any, stream: str, number: int) -> Any:
  """The config whose layers are those of one block; see `block_layers`."""
  start = f'{stream}/layers_{number}/'
  own = {
    config.layer_fields[stream, place.removeprefix(start)]: factory
    for place, factory in config.block_layers
    if place.startswith(start)
  }
  if not own:
    return config
  for field, shared in config.shared_fields.items():
    # A field that is None uses the shared field. If the block replaces the
    # shared field, fields that it does not replace keep the old factory.
    if shared in own and getattr(config, field) is None:
      own.setdefault(field, getattr(config, shared))
  return dataclasses.replace(config, block_layers=(), **own)


def check_block_layers(config: ModelConfig) -> None:
  """Raises ValueError if `block_layers` names places that do not exist."""
  depths = config.depths()

  def is_known(place):
    # The names are not listed, because a wrong depth may be very large.
    found = re.fullmatch(r'(\w+)/layers_(0|[1-9]\d*)/(\w+)', place)
    if found is None or (found[1], found[3]) not in config.layer_fields:
      return False
    return int(found[2]) < depths[found[1]]

  unknown = [place for place, _ in config.block_layers if not is_known(place)]
  if unknown:
    stream, name = min(config.layer_fields)
    example = f'{stream}/layers_0/{name}'
    raise ValueError(
      'block_layers must name layers of the blocks of the model, such as '
      f"'{example}', but names {unknown}. Correct these places; blocks are "
      'counted from 0.'
    )


def changed_block_layers(
  config: ModelConfig, changes: Mapping[str, Any]
) -> tuple[tuple[str, Factory], ...]:
  """`block_layers` with other fields in the layers that have them."""
  return tuple(
    (place, changed_factory(factory, changes))
    for place, factory in config.block_layers
  )


def check_blocks(stream: str, blocks: tuple[int, ...], depth: int) -> None:
  """Raises ValueError unless all sparse blocks of a stream exist.

  Args:
    stream: the stream, 'encoder' or 'decoder'.
    blocks: numbers of the sparse blocks, counted from 0.
    depth: number of blocks of the stream.
  """
  outside = [i for i in blocks if not 0 <= i < depth]
  if outside:
    raise ValueError(
      f'sparse_{stream}_layers must lie in 0..{depth - 1}, as the {stream} '
      f'has {depth} blocks, but holds {outside}. Count blocks from 0: the '
      'fifth is 4.'
    )


def check_layers(config: ModelConfig) -> None:
  """Raises ValueError if sparse layers do not fit their stream or routing."""
  if config.sparse_feed_forward is None:
    if config.expert_names is not None:
      raise ValueError(
        'expert_names needs layers with word experts, but sparse_feed_forward '
        'is None. Set both or neither.'
      )
    return
  layers, blocks = config.sparse_layers(), config.sparse_blocks()
  decoder = layers['decoder']
  if blocks['decoder'] and feed_forward_base.contract(decoder).looks_ahead:
    raise ValueError(
      'In a decoder, the experts of a token and whether they have a slot for '
      f'it must not depend on later tokens, but with {decoder.kind()} they do: '
      'the decoder would learn from the future and fail when it generates. '
      'Give the decoder a layer with a hash router, or with TokensChoose whose '
      'first_choices_first and batch_prioritized are False '
      '(sparse_decoder_feed_forward of a T5Config).'
    )
  names = names_experts(config)
  if names is None:
    return
  for layer in layers.values():
    experts = feed_forward_base.contract(layer).num_word_experts()
    if experts not in (None, names.num_experts):
      what = 'vocabulary' if config.expert_names is None else 'address'
      raise ValueError(
        'The layer and what names its experts must have the same number of '
        f'experts, but the layer has {experts} and the {what} '
        f'{names.num_experts}. Set num_experts of the layer, or build the '
        'vocabulary with --num_experts.'
      )


def names_experts(config: ModelConfig) -> Routing | None:
  """Returns what names the word experts of tokens; None if nothing does."""
  return config.routing if config.expert_names is None else config.expert_names


def check_mesh(
  config: ModelConfig,
  mesh_shape: Mapping[str, int],
  batch_size: int,
  lengths: Mapping[str, int],
) -> None:
  """Raises ValueError if sparse layers cannot be split over a mesh.

  Args:
    config: the config of the model.
    mesh_shape: number of devices along each axis of the mesh, by its name.
    batch_size: number of rows that go through the model at once.
    lengths: number of tokens of a row, by stream.
  """
  for stream, numbers in config.sparse_blocks().items():
    for number in numbers:
      layer = of_block(config, stream, number).sparse_layers()[stream]
      feed_forward_base.contract(layer).check_mesh(
        mesh_shape, batch_size, lengths[stream]
      )
  own = {place.rpartition('/')[0] for place, _ in config.block_layers}
  split = lambda block: (
    block.split('/')[0],
    int(block.rpartition('_')[2]),
  )
  for one in [config, *(of_block(config, *split(block)) for block in own)]:
    for name, layer in one.attentions().items():
      stream = 'encoder' if name == ENCODER_ATTENTION else 'decoder'
      layer.check_mesh(mesh_shape, batch_size, lengths[stream])


def check_attentions(config: ModelConfig) -> None:
  """Raises ValueError if an attention does not fit its place in a block."""
  for name, layer in config.attentions().items():
    if not isinstance(layer, attention_base.Attention):
      raise ValueError(
        'An attention must be an instance of attention_base.Attention or of a '
        f'subclass, but that of {name} is a {type(layer).__name__}. Derive '
        'your class from attention_base.Attention.'
      )
    layer.check_width(config.emb_dim)
    if name != ENCODER_ATTENTION and layer.looks_ahead:
      raise ValueError(
        'In a decoder, the modules of a token and whether they have a slot for '
        f'it must not depend on later tokens, but with {layer.kind()} in '
        f'{name} they do. Use TokensChoose whose first_choices_first and '
        'batch_prioritized are False there.'
      )
    if name == ENCODER_ATTENTION and layer.looks_back_only:
      raise ValueError(
        'Attention of an encoder must look in both directions, but it is '
        f'{layer.kind()}. Use Softmax or NearestFirst there.'
      )
    if name != ENCODER_ATTENTION and layer.needs_all_queries:
      raise ValueError(
        f'{name} must work with one query at a time, so that the model can '
        f'generate text, but it is {layer.kind()}, which needs all queries at '
        'once. Use Softmax or StickBreaking there.'
      )
    if name == CROSS_ATTENTION and layer.looks_back_only:
      raise ValueError(
        'Attention to the encoder must not depend on the order of its tokens, '
        f'but it is {layer.kind()}, which does. Use Softmax there.'
      )


def routes_tokens(config: ModelConfig) -> bool:
  """Returns whether some sparse layer can take token ids for routing ids."""
  return any(
    feed_forward_base.contract(layer).reads_token_ids
    for layer in config.sparse_layers().values()
  )


def word_streams(config: ModelConfig) -> tuple[str, ...]:
  """Returns the streams that have sparse layers which read word experts."""
  if config.sparse_feed_forward is None or names_experts(config) is None:
    return ()
  return tuple(
    name for name, blocks in config.sparse_blocks().items() if blocks
  )


class MemoryInputs(NamedTuple):
  """What the memories of one stream are given besides the tokens.

  Attributes:
    rows: name of a memory -> <int32>[batch, length, slots], the rows that
      tokens name; None before they are looked up.
    segment_ids: <int32>[batch, length], the segments of packed rows, or None.
    embedded: <float>[batch, length, embed], the tokens before the first block;
      None before they are known.
  """

  rows: Mapping[str, jax.Array] | None = None
  segment_ids: jax.Array | None = None
  embedded: jax.Array | None = None


class StreamRouting(NamedTuple):
  """Inputs of sparse layers and memories of one stream, besides its tokens.

  Attributes:
    ids: <int32>[batch, length], the routing ids; None where no layer of the
      model reads any.
    plan: the plan of the batch for word experts (`batch_plans.StreamPlan`), or
      None, in which case they read the ids.
    memories: the inputs of memories.
  """

  ids: jax.Array | None = None
  plan: Any = None
  memories: MemoryInputs = MemoryInputs()

  @property
  def is_given(self) -> bool:
    """Whether the batch says anything; otherwise the model looks ids up."""
    return self.ids is not None or self.plan is not None

  def with_embedded(self, embedded: jax.Array) -> 'StreamRouting':
    """Returns the same with the tokens before the first block."""
    return self._replace(memories=self.memories._replace(embedded=embedded))


def routing_ids(
  config: ModelConfig,
  method: str,
  ids: jax.Array,
  real: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array | None:
  """Routing ids <int32>[batch, length] that the model makes itself.

  Args:
    config: the config of the model.
    method: which ids, 'encoder_ids' or 'decoder_ids' of `Routing`; it is not
      used if nothing names experts.
    ids: <int32>[batch, length], token ids of the inputs of the stream.
    real: <bool>[batch, length], False for padding.
    segment_ids: <int32>[batch, length], the number of the example to which each
      token of a packed row belongs; None if rows are not packed.

  Returns:
    The routing ids, -1 for padding; None if no layer reads token ids.
  """
  names = names_experts(config)
  if names is not None:
    return getattr(names, method)(ids, segment_ids)
  # Word experts cannot use ids of tokens in place of those of words: they get
  # None, and raise an error that says so.
  return jnp.where(real, ids, -1) if routes_tokens(config) else None


def changed_factory(factory: Factory | None, changes: Mapping[str, Any]):
  """Returns a factory whose layers have the changed fields.

  Layers that lack one of the fields stay as they are.
  """
  if factory is None:
    return None

  def make(**given):
    layer = factory(**given)
    fields = {field.name for field in dataclasses.fields(layer)}
    if not fields >= changes.keys():
      return layer
    return layer.clone(parent=None, **changes)

  return make


def shared_modules(
  layers: Iterable[nn.Module], emb_dim: int
) -> dict[str, nn.Module]:
  """Returns the modules, by name, that all sparse layers share.

  Args:
    layers: the sparse layers; the first that shares modules makes them.
    emb_dim: width of the model.
  """
  for layer in layers:
    shared = feed_forward_base.contract(layer).make_shared(emb_dim)
    if shared:
      return shared
  return {}


def with_shared(layer: nn.Module, shared: dict[str, nn.Module]) -> nn.Module:
  """Returns the layer with those of the shared modules that it uses."""
  if shared and isinstance(layer, feed_forward_base.FeedForward):
    return layer.with_shared(shared)
  return layer
