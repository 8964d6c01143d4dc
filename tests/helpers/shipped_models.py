"""Makes all shipped models that are small enough to run from gin files."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mowe.commands.gin_files import gin_config
from mowe.models import initialization, token_memories
from mowe.models.families import families
from mowe.words import byte_vocabulary, vocabulary_builder

_FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'gin_configs' / 'models'
# What a payload does with its rows is the same in both kinds of stack. So T5 has
# every memory, and the stack without an encoder two of them, of which one looks
# at several tokens and one has several rows for a token.
_MEMORIES = {
  'stem',
  'per_layer',
  'over_encoding',
  'mole',
  'memory_plus',
  'peer',
}
# Some mini models have the parts of a tiny model, in larger sizes. The attention
# of `decoder_only_mini` is also that of the ModuleFormers.
_WIDER = {
  'decoder_only_mini',
  'moduleformer_mini',
  'xl_mini',
  'xl_sigma_moe_mini',
}
_LEFT_OUT = _WIDER | {f'decoder_only_{name}_tiny' for name in _MEMORIES}
NAMES = sorted(
  path.stem
  for path in _FOLDER.glob('*.gin')
  if path.stem.endswith(('_tiny', '_mini')) and path.stem not in _LEFT_OUT
)
# The model reads the ids of bytes; 0 is padding and 1 is EOS.
VOCAB = 384
# More blocks would take longer, and could do nothing that these cannot. Those of
# a decoder are of both kinds, dense and sparse, if the model has both.
_DEPTHS = {'encoder': 1, 'decoder': 2}


def make(name, folder):
  """Makes a model, and parameters whose routers crowd tokens together.

  Args:
    name: one of NAMES.
    folder: a folder for the routing vocabulary.

  Returns:
    The Linen module without dropout, and {'params': ...}.
  """
  routing, _ = vocabulary_builder.build_routing_vocabulary(
    ['a few words and a few more of them, and then some others'],
    byte_vocabulary.ByteVocabulary(),
    num_words=9,
    num_experts=8,
    num_skipped=1,
  )
  routing.save(folder / 'words.npz')
  bindings = ["VOCABULARY_PATH = 'bytes'", "DTYPE = 'float32'"]
  bindings.append(f'VOCAB_SIZE = {VOCAB}')
  if name.startswith('mowe'):
    bindings.append(f'ROUTING_VOCABULARY = {str(folder / "words.npz")!r}')
    bindings.append('NUM_EXPERTS = 8')
  gin_config.parse([f'gin_configs/models/{name}.gin'], bindings)
  config = dataclasses.replace(
    _shallow(gin_config.made('MODEL')), dropout_rate=0.0
  )
  model = families.build(config)
  shapes = initialization.abstract_variables(model)['params']
  draw = functools.partial(_draw, np.random.default_rng(0))
  return model, {'params': jax.tree_util.tree_map_with_path(draw, shapes)}


def _shallow(config):
  """The model with few blocks in each stack."""
  fields = {}
  for stream, depth in config.depths().items():
    blocks = config.sparse_blocks()[stream]
    name = f'sparse_{stream}_layers'
    fields[name] = kept = _kept(stream, blocks)
    if stream == 'decoder':
      assert (len(blocks) == depth) == (len(kept) == _DEPTHS[stream])
    field = f'num_{stream}_layers' if len(config.depths()) > 1 else 'num_layers'
    fields[field] = _DEPTHS[stream]
  memories = tuple(map(_in_first_blocks, config.memories))
  return dataclasses.replace(config, memories=memories, **fields)


def _kept(stream, blocks):
  """Those of some blocks of a stack that are left; at least one, if any."""
  kept = tuple(i for i in blocks if i < _DEPTHS[stream])
  return kept or (0,) * bool(blocks)


def _in_first_blocks(memory):
  """The memory in those of its blocks that are left."""
  place = memory.place
  if isinstance(place, token_memories.MemoryPlace):
    kept = {
      stream: _kept(stream, blocks) for stream, blocks in place.blocks().items()
    }
    place = dataclasses.replace(place, **kept)
  return dataclasses.replace(memory, place=place)


def _draw(rng, path, leaf):
  """Draws a parameter; compiling the model's own initializers takes longer."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  if name.endswith('scale'):
    # A norm after a memory's projection makes rounding errors of all blocks as
    # large as its own scale.
    return jnp.full(leaf.shape, 0.3 if '/memories/' in name else 1.0)
  # Logits of routers are far apart, so that many tokens want the same expert.
  # The hidden units of routers stay small, as they would make each rounding
  # error 50 times as large.
  is_last = 'router_weights' in name and 'hidden' not in name
  size = 3.0 if is_last else 1.0
  rows = leaf.shape[-2] if len(leaf.shape) > 1 else 100
  return jnp.asarray(size * rng.normal(size=leaf.shape) / rows**0.5, leaf.dtype)


def make_batch(config, seed, batch, inputs, length):
  """Random tokens under T5X's keys; every other row is packed."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.integers(3, 259, shape).astype(np.int32)
  segments = np.ones((batch, length), np.int32)
  segments[::2, length // 3 :] = 2
  # The last row ends with padding.
  targets = draw(batch, length)
  targets[-1, -2:] = segments[-1, -2:] = 0
  # A model with a memory reads running text, which is not packed.
  is_packed = not config.memory_length
  made = with_targets(
    {'decoder_segment_ids': segments} if is_packed else {}, targets
  )
  if 'encoder' in config.streams:
    made['encoder_input_tokens'] = draw(batch, inputs)
    made['encoder_segment_ids'] = np.ones((batch, inputs), np.int32)
    made['encoder_segment_ids'][::2, inputs // 2 :] = 2
  return made


def with_targets(batch, targets):
  """Replaces the targets of a batch, and its inputs by the shifted targets."""
  inputs = np.zeros_like(targets)
  inputs[:, 1:] = targets[:, :-1]
  segments = batch.get('decoder_segment_ids')
  if segments is not None:
    begins = segments[:, 1:] != segments[:, :-1]
    inputs[:, 1:] = np.where(begins, 0, inputs[:, 1:])
  return batch | {
    'decoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
  }


def logits_of(model, training):
  """A jitted (variables, batch) -> logits; training has no dropout here."""
  config = model.config

  def logits(variables, batch):
    if config.memory_length:
      size = batch['decoder_input_tokens'].shape[0]
      variables = variables | {'segment_memory': config.initial_memory(size)}
    return model.apply(
      variables,
      batch,
      enable_dropout=training,
      rngs={'dropout': jax.random.key(7)},
      method='of_batch',
      mutable=['segment_memory', 'router_stats'],
    )[0]

  return jax.jit(logits)


def generated(model, max_length):
  """A jitted (variables, inputs, ends) -> tokens and logits of each step.

  Decodes greedily. From step `ends` <int32>[batch] on a row is fed padding,
  like a row that has ended.
  """

  def generate(variables, inputs, ends):
    step, cache = model.start_generation(variables, inputs, max_length, 1)

    def one(carry, number):
      last, cache = carry
      logits, cache, _ = step(last, cache)
      chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      chosen = jnp.where(number >= ends, 0, chosen)[:, None]
      return (chosen, cache), (chosen[:, 0], logits)

    start = jnp.zeros((inputs.shape[0], 1), jnp.int32), cache
    _, (tokens, logits) = jax.lax.scan(one, start, jnp.arange(max_length))
    return tokens.T, logits.swapaxes(0, 1)

  return jax.jit(generate)
