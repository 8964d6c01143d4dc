"""Products of every token with the kernel of its own expert.

A plan puts the experts into size classes (`words/plans/batch_plans.py`). Each
class is one batched product [experts, room, in] x [experts, in, out]: the
kernels of its experts and the tokens in its slots are gathered and multiplied.

- It is computed a few experts at a time. What was gathered is then still in the
  cache when it is multiplied, and the kernels of all present experts are never
  copied at once.
- A token has at most one slot. So the gradient of a gather is a gather as well,
  and no scatter-add is needed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers import platforms
from mowe.layers.memory import bfloat16_bits, rows_in_place
from mowe.words.plans import batch_plans

# How many numbers of kernels are gathered at a time. On CPU they are 4 MB in
# float32, which stay in the cache. Elsewhere the bound only limits temporary
# memory. On TPU it takes tens of microseconds to read so many, against a few
# for a step of the loop. On GPU each step launches several kernels, so that
# fewer steps are better.
_NUMBERS_AT_ONCE = {'cpu': 2**20, 'tpu': 2**24}
_NUMBERS_ELSEWHERE = 2**26

# Experts with up to this many slots have their gradients computed slot by slot:
# XLA's batched products of such thin matrices are two to ten times slower on
# CPU.
_THIN = 8


class Factors(NamedTuple):
  """The arrays from which the gradient of any expert's kernel can be formed.

  The gradient of an expert's kernel is the sum, over the tokens of the expert,
  of the outer products of `inputs` and `cotangents`.

  Attributes:
    inputs: <float>[tokens, in], the inputs of the product.
    cotangents: <float>[tokens, out], the cotangents of its outputs.
  """

  inputs: jax.Array
  cotangents: jax.Array


def experts_at_once(numbers_of_one: int) -> int:
  """Returns how many experts to gather at a time, at least one.

  Args:
    numbers_of_one: how many numbers the kernels of one expert have.
  """
  most = _NUMBERS_AT_ONCE.get(platforms.target(), _NUMBERS_ELSEWHERE)
  return max(1, most // numbers_of_one)


@jax.custom_vjp
def expert_product(
  tokens: jax.Array,
  kernels: jax.Array,
  plan: batch_plans.StreamPlan,
  factors: Factors | None = None,
) -> jax.Array:
  """Product of every token with the kernel of its expert.

  The gradient of `kernels` would be as large as the whole table, although a
  batch uses few of its rows. With `factors`, the function does not form it. It
  hands out the Factors instead, in the only way that a gradient leaves a
  differentiated function: as the gradient of an argument. `kernel_gradient`
  then forms the gradients of a few experts at a time.

  Args:
    tokens: <float>[tokens, in].
    kernels: <float>[num_experts, in, out], or their bits <uint16> in bfloat16
      (see `bfloat16_bits`). They are converted to the dtype of `tokens`.
    plan: the plan of these tokens.
    factors: zeros in the shapes of Factors. Their gradient is the true Factors,
      and `kernels` have no gradient. With None, `kernels` have a gradient of
      their own shape, unless they are bits.

  Returns:
    <float>[tokens, out], zeros for tokens without an expert.
  """
  del factors
  return _multiply(tokens, kernels, plan, _product)


def _forward(tokens, kernels, plan, factors):
  outputs = expert_product(tokens, kernels, plan, factors)
  marker = None if factors is None else ()
  return outputs, (tokens, kernels, plan, marker)


def _backward(residuals, cotangents):
  tokens, kernels, plan, marker = residuals
  d_tokens = _multiply(cotangents, kernels, plan, _transposed_product)
  factors = Factors(tokens, cotangents)
  if marker is not None or kernels.dtype == bfloat16_bits.DTYPE:
    return d_tokens, None, None, None if marker is None else factors
  d_kernels = jnp.zeros_like(kernels)
  for experts, sources in zip(*plan.classes, strict=True):
    d_kernels = rows_in_place.write(
      d_kernels,
      experts,
      kernel_gradient([factors], sources).astype(kernels.dtype),
    )
  return d_tokens, d_kernels, None, None


expert_product.defvjp(_forward, _backward)


def factors_of_experts(factors: list[Factors], sources: jax.Array) -> Factors:
  """Gathers the factors of the gradients of some experts.

  Args:
    factors: one entry for each layer that shares the kernels.
    sources: <int32>[experts, room], the token in each slot of each expert; a
      number out of range for an empty slot, which gives zeros.

  Returns:
    inputs <float32>[experts, layers * room, in] and cotangents
    <float32>[experts, layers * room, out].
  """
  return Factors(
    *(
      jnp.concatenate(
        [rows(one, sources) for one in same_field], axis=1
      ).astype(jnp.float32)
      for same_field in zip(*factors, strict=True)
    )
  )


def kernel_gradient(factors: list[Factors], sources: jax.Array) -> jax.Array:
  """Returns the gradients of the kernels of some experts.

  Args:
    factors: one entry for each layer that shares the kernels. The gradient is
      the sum over these layers.
    sources: <int32>[experts, room], the token in each slot of each expert; a
      number out of range for an empty slot.

  Returns:
    <float32>[experts, in, out].
  """
  inputs, cotangents = factors_of_experts(factors, sources)
  room = inputs.shape[1]
  if room > _THIN:
    return jnp.einsum('ecm,ecf->emf', inputs, cotangents)
  outer = [
    inputs[:, c, :, None] * cotangents[:, c, None, :] for c in range(room)
  ]
  return functools.reduce(jnp.add, outer)


def _multiply(tokens, kernels, plan, product):
  """Applies `product` to the slots and kernels of all experts.

  For each class, [experts, room, in] x [experts, in, out] gives [experts, room,
  out]. The results of all classes, one after another, are the slots [slots,
  out] that `plan.slots` counts, and each token reads its own.
  """
  at_once = experts_at_once(kernels[0].size)

  def some_experts(experts, sources):
    own = bfloat16_bits.to_float(rows_in_place.read(kernels, experts))
    return product(rows(tokens, sources), own.astype(tokens.dtype))

  parts = []
  for experts, sources in zip(*plan.classes, strict=True):
    # An expert in use has a token in its first slot. Places that are not in use
    # come last and are not computed, as no token reads their slots.
    num_used = jnp.sum(sources[:, 0] < tokens.shape[0])
    parts.append(_in_chunks(some_experts, at_once, num_used, experts, sources))
  slots = jnp.concatenate([p.reshape(-1, p.shape[-1]) for p in parts])
  return rows(slots, plan.slots.reshape(-1))


def _product(tokens, kernels):
  return jnp.einsum('ecm,emf->ecf', tokens, kernels)


def _transposed_product(cotangents, kernels):
  room = cotangents.shape[1]
  if room > _THIN:
    return jnp.einsum('ecf,emf->ecm', cotangents, kernels)
  by_slot = [
    jnp.einsum('ef,emf->em', cotangents[:, c], kernels) for c in range(room)
  ]
  return jnp.stack(by_slot, axis=1)


def rows(array: jax.Array, index: jax.Array) -> jax.Array:
  """Returns `array[index]`, with zeros where the index is out of range.

  Args:
    array: [rows, ...].
    index: <int32>[...], numbers of rows. Negative ones count from the end.
  """
  return jnp.take(array, index, axis=0, mode='fill', fill_value=0)


def _in_chunks(
  function: Callable[..., jax.Array],
  at_once: int,
  num_used: jax.Array,
  *arrays: jax.Array,
) -> jax.Array:
  """Computes function(*arrays) in a loop over `at_once` rows at a time.

  Only chunks that hold some of the first `num_used` rows are computed. The rows
  of the others are zeros.
  """
  num_rows = arrays[0].shape[0]
  if num_rows <= at_once:
    return function(*arrays)

  def cut(start):
    return (jax.lax.dynamic_slice_in_dim(a, start, at_once) for a in arrays)

  def some(number, outputs):
    # The last chunk is moved back to end at the last row. Some rows are then
    # computed twice, but all chunks have one size and share one loop.
    start = jnp.minimum(number * at_once, num_rows - at_once)
    return jax.lax.dynamic_update_slice_in_dim(
      outputs, function(*cut(start)), start, 0
    )

  one = jax.eval_shape(lambda: function(*cut(0)))
  outputs = jnp.zeros((num_rows, *one.shape[1:]), one.dtype)
  return jax.lax.fori_loop(0, -(-num_used // at_once), some, outputs)
