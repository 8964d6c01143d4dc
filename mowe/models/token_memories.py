"""Memories of a model: what names rows, what rows hold, and where they enter.

A config has any number of them. Each has one table, whose rows are named by the
tokens alone (`words/addresses`), and in each block that reads it a payload
(`layers/memory/payloads`) turns rows into something for the stream of tokens.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
from flax import linen as nn

from mowe.layers import feed_forward_base
from mowe.layers.memory import host_rows, row_table
from mowe.layers.memory.payloads import payload_base
from mowe.models import model_config
from mowe.words.addresses import address_base
from mowe.words.plans import step_plans

_ROW_MULTIPLE = 128
_TABLE_DTYPES = ('float32', 'bfloat16')
_NAME = re.compile(r'[a-z][a-z0-9_]*')
# Names that other parts of a model have, and those of Linen.
_TAKEN = frozenset(
  {
    'config',
    'decoder',
    'encoder',
    'experts',
    'memory_values',
    'of_batch',
    'decode',
    'encode',
    'remember',
    'start_generation',
    'token_embedder',
    *dir(nn.Module),
    'name',
    'parent',
    'scope',
  }
)


@dataclasses.dataclass(frozen=True)
class MemoryPlace:
  """Base of the places where a memory enters blocks.

  Attributes:
    encoder: numbers of the blocks of the encoder, counted from 0.
    decoder: numbers of the blocks of the decoder, counted from 0.
  """

  encoder: tuple[int, ...] = ()
  decoder: tuple[int, ...] = ()

  def blocks(self) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of the blocks, by stream."""
    return {'encoder': self.encoder, 'decoder': self.decoder}


class BeforeAttention(MemoryPlace):
  """The payload reads the stream, and what it returns is added to it."""


class BesideFeedForward(MemoryPlace):
  """The payload reads what the feed-forward reads, and both are added up."""


class InsteadOfFeedForward(MemoryPlace):
  """The payload takes the place of the feed-forward."""


class AfterFeedForward(MemoryPlace):
  """The payload reads the stream after the block, and is added to it."""


@dataclasses.dataclass(frozen=True)
class AtInput:
  """The payload reads embedded tokens before the first block.

  Attributes:
    encoder: whether it is in the encoder.
    decoder: whether it is in the decoder.
  """

  encoder: bool = False
  decoder: bool = False

  # What stands before the first block counts as a part of it.
  _FIRST: ClassVar[tuple[int, ...]] = (0,)

  def blocks(self) -> dict[str, tuple[int, ...]]:
    """Returns {stream: (0,)} for each stream with the memory."""
    return {
      'encoder': self._FIRST if self.encoder else (),
      'decoder': self._FIRST if self.decoder else (),
    }


AnyPlace = MemoryPlace | AtInput


@dataclasses.dataclass(frozen=True)
class Memory:
  """A memory of a model.

  Attributes:
    name: names its table and its payloads in the tree of parameters.
    address: names the rows of each token.
    payload: factory of the payload.
    place: where payloads stand.
    shares_rows: whether all blocks read the same rows. Otherwise a row has a
      part for each block.
    table_dtype: 'float32', or 'bfloat16', which takes half the memory.
    rows_from: reads rows of the table, where a run keeps none of it on the
      device; None if the table is on the device.
  """

  name: str
  address: address_base.Address
  payload: model_config.Factory
  place: AnyPlace
  shares_rows: bool = False
  table_dtype: str = 'float32'
  rows_from: host_rows.RowsFrom | None = None

  @property
  def num_rows(self) -> int:
    """The rows of the table.

    They are a multiple of 128, so that the table can be split over devices.
    Those beyond the rows of the address are never named.
    """
    return -(-self.address.num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE

  def __post_init__(self):
    if not _NAME.fullmatch(self.name) or self.name in _TAKEN:
      raise ValueError(
        'The name of a memory must be of small letters, digits and underscores '
        f'and no name of another part of a model, but is {self.name!r}. Take '
        "another, such as 'engram'."
      )
    if self.table_dtype not in _TABLE_DTYPES:
      raise ValueError(
        f'table_dtype must be one of {_TABLE_DTYPES}, but is '
        f"{self.table_dtype!r}. Take 'bfloat16' for half the memory."
      )
    repeated = [
      numbers
      for numbers in self.place.blocks().values()
      if len(set(numbers)) < len(numbers)
    ]
    if repeated:
      raise ValueError(
        f'The blocks of the memory {self.name!r} must be different, but are '
        f'{repeated[0]}. Name each block once.'
      )
    if not any(self.place.blocks().values()):
      raise ValueError(
        f'The memory {self.name!r} must stand in at least one block, but its '
        f'place is {self.place}. Give blocks of the encoder or the decoder.'
      )

  def places(self) -> tuple[tuple[str, int], ...]:
    """Returns the stream and the number of each block that reads it."""
    return tuple(
      (stream, number)
      for stream, numbers in self.place.blocks().items()
      for number in numbers
    )

  def is_in(self, stream: str) -> bool:
    """Returns whether any block of a stream reads it."""
    return bool(self.place.blocks()[stream])

  def part_of(self, stream: str, number: int) -> int:
    """Returns which part of the rows a block reads."""
    return 0 if self.shares_rows else self.places().index((stream, number))

  @property
  def adds(self) -> bool:
    """Whether what the payload returns is added to the stream of tokens."""
    return self.make_payload(parent=None).adds

  def make_payload(self, **given: Any) -> payload_base.Payload:
    """Returns a new payload.

    Args:
      **given: `dropout_rate`, `dtype`, and for Linen `parent` or `name`.
    """
    return self.payload(**given)

  def make_table(self, embed_dim: int) -> row_table.RowTable:
    """Returns the table, which the model owns once."""
    payload = self.make_payload(parent=None)
    return row_table.RowTable(
      self.num_rows,
      1 if self.shares_rows else len(self.places()),
      payload.row_dim(embed_dim, self.address.num_slots),
      payload.row_init,
      self.table_dtype,
      self.rows_from,
      parent=None,
    )


class BlockMemories(nn.Module):
  """The payloads of all memories that one block reads.

  Attributes:
    config: the config of the model.
    stream: 'encoder' or 'decoder'.
    number: the number of the block.
    tables: the tables of all memories, by name.

  Call: a class of places, tokens <dtype>[batch, length, embed],
    `model_config.MemoryInputs`, and by name `decode` and `deterministic`, to a
    list with what each payload at such a place returns, <dtype>[batch, length,
    embed] each.
  """

  config: model_config.ModelConfig
  stream: str
  number: int
  tables: dict[str, row_table.RowTable]

  @nn.compact
  def __call__(
    self,
    kind: type[AnyPlace],
    tokens: jax.Array,
    inputs: model_config.MemoryInputs,
    *,
    decode: bool,
    deterministic: bool,
  ) -> list[jax.Array]:
    outputs = []
    for memory in here(self.config, self.stream, self.number, kind):
      rows = self.tables[memory.name].read(
        inputs.rows[memory.name],
        memory.part_of(self.stream, self.number),
        inputs.segment_ids,
      )
      payload = memory.make_payload(
        dropout_rate=self.config.dropout_rate,
        dtype=self.config.dtype,
        name=memory.name,
      )
      outputs.append(
        payload(
          tokens,
          rows,
          embedded=inputs.embedded,
          decode=decode,
          deterministic=deterministic,
        )
      )
    return outputs


def at_input(
  block: BlockMemories,
  tokens: jax.Array,
  inputs: model_config.MemoryInputs,
  *,
  decode: bool,
  deterministic: bool,
) -> jax.Array:
  """Returns embedded tokens after the memory at the input of a stack."""
  memories = here(block.config, block.stream, 0, AtInput)
  outputs = block(
    AtInput, tokens, inputs, decode=decode, deterministic=deterministic
  )
  for memory, output in zip(memories, outputs, strict=True):
    tokens = tokens + output if memory.adds else output
  return tokens


class Block(Protocol):
  """What a block has whose feed-forward stands among memories.

  Attributes:
    memories: the memories of the block.
    has_feed_forward: whether it has a feed-forward beside them, `mlp`.
    mlp: the feed-forward.
    pre_mlp_layer_norm: the norm before the feed-forward.
    dropout: the dropout of what is added to the stream of tokens.
  """

  memories: BlockMemories
  has_feed_forward: bool
  mlp: nn.Module
  pre_mlp_layer_norm: nn.Module
  dropout: nn.Module


def before_attention(
  block: Block,
  tokens: jax.Array,
  routing: model_config.StreamRouting,
  *,
  decode: bool,
  deterministic: bool,
) -> jax.Array:
  """Returns tokens <dtype>[batch, length, embed] for a block's attention."""
  return _added(
    block,
    BeforeAttention,
    tokens,
    routing,
    decode=decode,
    deterministic=deterministic,
  )


def feed_forward(
  block: Block,
  tokens: jax.Array,
  routing: model_config.StreamRouting,
  *,
  decode: bool,
  deterministic: bool,
) -> jax.Array:
  """Adds a block's feed-forward, and memories beside, instead of and after it.

  Args:
    block: the block.
    tokens: <dtype>[batch, length, embed], after the attention.
    routing: the inputs of sparse layers and memories.
    decode: whether to go on from a cache, one token at a time.
    deterministic: turns dropout off.

  Returns:
    <dtype>[batch, length, embed].
  """
  settings = {'decode': decode, 'deterministic': deterministic}
  normed = block.pre_mlp_layer_norm(tokens)
  outputs = []
  for kind in (BesideFeedForward, InsteadOfFeedForward):
    outputs += block.memories(kind, normed, routing.memories, **settings)
  if block.has_feed_forward:
    outputs.append(
      feed_forward_base.call(
        block.mlp,
        normed,
        routing_ids=routing.ids,
        plan=routing.plan,
        deterministic=deterministic,
      )
    )
  tokens = tokens + block.dropout(sum(outputs), deterministic=deterministic)
  return _added(block, AfterFeedForward, tokens, routing, **settings)


def _added(block, kind, tokens, routing, *, decode, deterministic):
  """The tokens with what the memories at one kind of place return."""
  for output in block.memories(
    kind,
    tokens,
    routing.memories,
    decode=decode,
    deterministic=deterministic,
  ):
    tokens = tokens + block.dropout(output, deterministic=deterministic)
  return tokens


def has_feed_forward(
  config: model_config.ModelConfig, stream: str, number: int
) -> bool:
  """Returns whether a block has a feed-forward beside its memories."""
  return not here(config, stream, number, InsteadOfFeedForward)


def here(
  config: model_config.ModelConfig,
  stream: str,
  number: int,
  kind: type[AnyPlace] | None = None,
) -> list[Memory]:
  """Returns the memories that stand in a block, at one kind of place or any."""
  return [
    memory
    for memory in config.memories
    if (kind is None or isinstance(memory.place, kind))
    and (stream, number) in memory.places()
  ]


def streams_of(memory: Memory) -> tuple[str, ...]:
  """Returns the streams in which a memory is read."""
  return tuple(
    stream for stream, numbers in memory.place.blocks().items() if numbers
  )


def has_tables(config: model_config.ModelConfig) -> bool:
  """Returns whether a model has tables of word experts or of memories."""
  return bool(model_config.word_streams(config) or config.memories)


def with_changes(
  memories: tuple[Memory, ...], changes: Mapping[str, Any]
) -> tuple[Memory, ...]:
  """Returns the memories with what a run gives to its tables, if it does."""
  if 'rows_from' not in changes:
    return memories
  return tuple(
    dataclasses.replace(memory, rows_from=changes['rows_from'])
    for memory in memories
  )


def make_tables(
  config: model_config.ModelConfig,
) -> dict[str, row_table.RowTable]:
  """Returns the tables of all memories, by name."""
  return {
    memory.name: memory.make_table(config.emb_dim) for memory in config.memories
  }


def rows_of(
  config: model_config.ModelConfig,
  stream: str,
  tokens: Any,
  segment_ids: Any = None,
) -> dict[str, Any]:
  """Returns the rows that the tokens of a stream name in each memory.

  Args:
    config: the config of the model.
    stream: 'encoder' or 'decoder'.
    tokens: <int32>[batch, length], of NumPy or JAX.
    segment_ids: <int32>[batch, length], the segments of packed rows, or None.

  Returns:
    Name -> <int32>[batch, length, slots], of the memories in this stream.
  """
  found = {}
  for memory in config.memories:
    if memory.is_in(stream):
      address = memory.address
      rows = {'encoder': address.encoder_rows, 'decoder': address.decoder_rows}
      found[memory.name] = rows[stream](tokens, segment_ids)
  return found


def with_rows(
  routing: model_config.StreamRouting,
  config: model_config.ModelConfig,
  stream: str,
  tokens: jax.Array,
  segment_ids: jax.Array | None,
) -> model_config.StreamRouting:
  """Returns the routing with the rows of all memories, unless it has them.

  Arguments are those of `rows_of`.
  """
  rows = routing.memories.rows
  if rows is None:
    rows = rows_of(config, stream, tokens, segment_ids)
  return routing._replace(memories=model_config.MemoryInputs(rows, segment_ids))


def initial_states(
  config: model_config.ModelConfig, batch: int
) -> dict[str, Any]:
  """Returns the states of the addresses in the decoder, before any token."""
  return {
    memory.name: memory.address.initial_state(batch)
    for memory in config.memories
    if memory.is_in('decoder')
  }


def next_rows(
  config: model_config.ModelConfig, tokens: jax.Array, states: dict[str, Any]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """Returns the rows of one step of decoding, and the next states.

  Args:
    config: the config of the model.
    tokens: <int32>[batch, 1].
    states: what the step before returned, or `initial_states`.
  """
  rows, after = {}, {}
  for memory in config.memories:
    if memory.name in states:
      rows[memory.name], after[memory.name] = memory.address.decoder_step(
        tokens, states[memory.name]
      )
  return rows, after


def addresses(
  config: model_config.ModelConfig,
) -> dict[str, address_base.Address]:
  """Returns the addresses of all memories, by name, and that of experts."""
  named = {memory.name: memory.address for memory in config.memories}
  if config.expert_names is not None:
    named[step_plans.EXPERTS] = config.expert_names.address
  return named


def check_memories(config: model_config.ModelConfig) -> None:
  """Raises ValueError if memories do not fit the stacks of the model."""
  names = [memory.name for memory in config.memories]
  if len(set(names)) < len(names):
    raise ValueError(
      f'Each memory must have a name of its own, but the names are {names}. '
      'Rename one of them.'
    )
  for name, address in addresses(config).items():
    _check_routing(config, name, address)
  depths = config.depths()
  for memory in config.memories:
    for stream, number in memory.places():
      depth = depths.get(stream, 0)
      if not 0 <= number < depth:
        raise ValueError(
          f'The memory {memory.name!r} must stand in blocks of the model, '
          f'which has {depth} in its {stream}, but stands in {number}. Correct '
          f'its place, {memory.place}; blocks are counted from 0.'
        )
      for kind in (InsteadOfFeedForward, AtInput):
        same = here(config, stream, number, kind)
        if len(same) > 1:
          raise ValueError(
            f'One memory at most can stand {kind.__name__} in one place, but '
            f'{[one.name for one in same]} do in block {number} of the '
            f'{stream}. Move one of them.'
          )
      instead = here(config, stream, number, InsteadOfFeedForward)
      if instead and number in config.sparse_blocks()[stream]:
        raise ValueError(
          f'Block {number} of the {stream} must have one feed-forward, but '
          f'has a sparse one and the memory {instead[0].name!r} instead of it. '
          'Take the block out of one of them.'
        )
    _check_segment_memory(config, memory)
    if not (memory.adds or isinstance(memory.place, AtInput)):
      raise ValueError(
        f'The payload of {memory.name!r} takes the place of the embedding, so '
        f'it must stand at the input, but stands {memory.place}. Set its place '
        'to token_memories.AtInput.'
      )
    # The sizes of rows are checked here, before anything is compiled.
    memory.make_table(config.emb_dim)


def _check_routing(
  config: model_config.ModelConfig, name: str, address: address_base.Address
) -> None:
  """Raises ValueError unless the address reads the model's routing vocabulary.

  A model folder has one routing vocabulary, that of the config.
  """
  own = address.routing_vocabulary()
  if own is None:
    return
  if config.routing is None or config.routing.sha256 != own.sha256:
    there = 'none' if config.routing is None else config.routing.sha256[:12]
    raise ValueError(
      f'The address of {name!r} must read the routing vocabulary of the '
      f'model, but has sha256 {own.sha256[:12]} and the model '
      f'{there}. Set `routing` of the config to that of the address.'
    )


def _check_segment_memory(
  config: model_config.ModelConfig, memory: Memory
) -> None:
  """Raises ValueError if a memory looks back where batches cut a text.

  With a memory of earlier batches a text goes on in the next one, but n-grams
  and convolutions begin anew there.
  """
  has_state = memory.address.initial_state(1).shape[1] > 0
  looks_back = memory.make_payload(parent=None).looks_back
  if config.memory_length and (has_state or looks_back):
    raise ValueError(
      f'With memory_length, {config.memory_length}, the rows of a token must '
      f'not depend on tokens before it, but those of {memory.name!r} do. Set '
      'memory_length to 0, or take Pieces and no convolution.'
    )
