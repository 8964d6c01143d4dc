"""Moving tokens into slots, and products of slots with one kernel per group.

The three steps of a planned sparse layer: `dispatch` brings each token to its
slot, `grouped_product` multiplies every slot with the kernel of its group,
`combine` brings the results back. A token has at most one slot, so the
transpose of a gather is again a gather: no scatter-add is left.
"""

import functools

import jax
import jax.numpy as jnp

# Up to this many slots, a group's weight gradient is a sum of outer products:
# XLA's batched product over such thin tiles is several times slower on CPU.
_THIN = 4


def dispatch(
    tokens: jax.Array, sources: tuple[jax.Array, ...], slots: jax.Array
) -> list[jax.Array]:
  """Tokens in their slots, zeros in empty ones.

  Args:
    tokens: <float>[tokens, embed].
    sources: one <int32>[groups, room] for each size class: the token in each
      slot, `tokens.shape[0]` for an empty slot.
    slots: <int32>[tokens], the slot of each token, counted over all classes;
      the number of slots for a token without one.

  Returns:
    One <float>[groups, room, embed] for each size class.
  """
  flat = jnp.concatenate([source.reshape(-1) for source in sources])
  moved = _permute(tokens, flat, slots)
  parts, at = [], 0
  for source in sources:
    part = moved[at : at + source.size]
    parts.append(part.reshape(*source.shape, tokens.shape[-1]))
    at += source.size
  return parts


def combine(
    parts: list[jax.Array], sources: tuple[jax.Array, ...], slots: jax.Array
) -> jax.Array:
  """Inverse of `dispatch`: <float>[tokens, embed], zeros without a slot."""
  flat = jnp.concatenate([source.reshape(-1) for source in sources])
  moved = jnp.concatenate([p.reshape(-1, p.shape[-1]) for p in parts])
  return _permute(moved, slots, flat)


@jax.custom_vjp
def _permute(rows, index, inverse):
  """rows[index], zeros where the index is out of range."""
  del inverse
  return jnp.take(rows, index, axis=0, mode='fill', fill_value=0)


def _permute_forward(rows, index, inverse):
  return _permute(rows, index, inverse), (index, inverse)


def _permute_backward(residuals, cotangent):
  index, inverse = residuals
  return _permute(cotangent, inverse, index), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def grouped_product(
    parts: list[jax.Array], kernels: jax.Array
) -> list[jax.Array]:
  """Product of every slot with the kernel of its group.

  Args:
    parts: one <float>[groups, room, in] for each size class.
    kernels: <float>[all groups, in, out], groups in the order of the classes.

  Returns:
    One <float>[groups, room, out] for each size class.
  """
  products, at = [], 0
  for part in parts:
    products.append(_class_product(part, kernels[at : at + part.shape[0]]))
    at += part.shape[0]
  return products


@jax.custom_vjp
def _class_product(part, kernels):
  return jnp.einsum('ecm,emf->ecf', part, kernels)


def _class_product_forward(part, kernels):
  return _class_product(part, kernels), (part, kernels)


def _class_product_backward(residuals, cotangent):
  part, kernels = residuals
  d_part = jnp.einsum('ecf,emf->ecm', cotangent, kernels)
  room = part.shape[1]
  if room <= _THIN:
    outer = [
        part[:, c, :, None] * cotangent[:, c, None, :] for c in range(room)
    ]
    d_kernels = functools.reduce(jnp.add, outer)
  else:
    d_kernels = jnp.einsum('ecm,ecf->emf', part, cotangent)
  return d_part, d_kernels


_class_product.defvjp(_class_product_forward, _class_product_backward)
