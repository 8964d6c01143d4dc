"""Products of every token with the kernel of its own expert.

Experts come in size classes (`words/batch_plans.py`). A class is one batched product:
the kernels of its experts and the tokens in its slots are gathered and
multiplied, a few experts at a time, so that what is gathered is still in the
cache when it is multiplied, and no copy of all present experts is ever made. A
token has at most one slot, so the transpose of a gather is again a gather: no
scatter-add is left.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mowe.layers.memory import bfloat16_bits
from mowe.words import batch_plans

# Numbers of kernels that are gathered at a time: 4 MB stay in a CPU's cache;
# elsewhere the bound is on temporary memory, and a loop should be short.
_CACHED_NUMBERS = 2**20
_MOST_NUMBERS = 2**26

# Up to this many slots, gradients go slot by slot: XLA's batched products over
# such thin tiles are two to ten times slower on CPU.
_THIN = 8


class Factors(NamedTuple):
  """What the gradient of all kernels follows from.

  The gradient of an expert's kernel is the sum of the outer products of
  `inputs` and `cotangents` over its tokens.

  Attributes:
    inputs: <float>[tokens, in].
    cotangents: <float>[tokens, out].
  """

  inputs: jax.Array
  cotangents: jax.Array


def experts_at_once(numbers_of_one: int) -> int:
  """How many experts of so many numbers are worked on at a time."""
  on_cpu = jax.default_backend() == 'cpu'
  most = _CACHED_NUMBERS if on_cpu else _MOST_NUMBERS
  return max(1, most // numbers_of_one)


@jax.custom_vjp
def expert_product(
  tokens: jax.Array,
  kernels: jax.Array,
  plan: batch_plans.StreamPlan,
  factors: Factors | None = None,
) -> jax.Array:
  """Product of every token with the kernel of its expert.

  Args:
    tokens: <float>[tokens, in].
    kernels: <float>[num_experts, in, out], or bits <uint16> of bfloat16 (see
      `bfloat16_bits`); read in the dtype of `tokens`.
    plan: of these tokens.
    factors: without, `kernels` have a gradient as large as themselves. With
      zeros in the shapes of Factors, they have none; the gradient of `factors`
      are the Factors from which `kernel_gradient` makes that of a few experts.

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
    d_kernels = d_kernels.at[experts].set(
      kernel_gradient([factors], sources).astype(kernels.dtype),
      mode='drop',
      unique_indices=True,
    )
  return d_tokens, d_kernels, None, None


expert_product.defvjp(_forward, _backward)


def factors_of_experts(factors: list[Factors], sources: jax.Array) -> Factors:
  """Factors of the gradients of some experts.

  Args:
    factors: of each layer that shares the kernels.
    sources: <int32>[experts, room], their tokens; out of range: none.

  Returns:
    inputs <float32>[experts, layers room, in] and cotangents
    <float32>[experts, layers room, out].
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
  """Gradient of the kernels of some experts.

  Args:
    factors: of each layer that shares these kernels.
    sources: <int32>[experts, room], their tokens; out of range: none.

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
  """Applies `product` to the slots and kernels of all experts."""
  at_once = experts_at_once(kernels[0].size)

  def some_experts(experts, sources):
    own = jnp.take(kernels, experts, axis=0, mode='clip')
    own = bfloat16_bits.to_float(own)
    return product(rows(tokens, sources), own.astype(tokens.dtype))

  parts = []
  for experts, sources in zip(*plan.classes, strict=True):
    # Unused places come last: what they would be given is never read.
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
  """array[index], zeros where the index is out of range."""
  return jnp.take(array, index, axis=0, mode='fill', fill_value=0)


def _in_chunks(
  function: Callable[..., jax.Array],
  at_once: int,
  num_used: jax.Array,
  *arrays: jax.Array,
) -> jax.Array:
  """function(*arrays), of so many rows at a time; zeros after `num_used`."""
  num_rows = arrays[0].shape[0]
  if num_rows <= at_once:
    return function(*arrays)

  def cut(start):
    return (jax.lax.dynamic_slice_in_dim(a, start, at_once) for a in arrays)

  def some(number, outputs):
    # The last rows are computed twice rather than in a program of their own.
    start = jnp.minimum(number * at_once, num_rows - at_once)
    return jax.lax.dynamic_update_slice_in_dim(
      outputs, function(*cut(start)), start, 0
    )

  one = jax.eval_shape(lambda: function(*cut(0)))
  outputs = jnp.zeros((num_rows, *one.shape[1:]), one.dtype)
  return jax.lax.fori_loop(0, -(-num_used // at_once), some, outputs)
