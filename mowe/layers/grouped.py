"""Moving tokens into slots, and products of slots with one kernel per group.

The three steps of a planned sparse layer: `dispatch` brings each token to its
slot, `grouped_product` multiplies every slot with the kernel of its group,
`combine` brings the results back. A token has at most one slot, so the
transpose of a gather is again a gather: no scatter-add is left.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Up to this many slots, gradients go slot by slot: XLA's batched products over
# such thin tiles are two to ten times slower on CPU.
_THIN = 8


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


@jax.custom_vjp
def grouped_product(
  parts: list[jax.Array], kernels: jax.Array
) -> list[jax.Array]:
  """Product of every slot with the kernel of its group.

  Args:
    parts: one <float>[groups, room, in] for each size class.
    kernels: <float>[all groups, in, out], groups in the order of the classes.
      Further kernels are not read and have gradient zero.

  Returns:
    One <float>[groups, room, out] for each size class.
  """
  return [
    jnp.einsum('ecm,emf->ecf', part, own)
    for part, own in zip(parts, _of_classes(kernels, parts), strict=True)
  ]


def _grouped_product_forward(parts, kernels):
  return grouped_product(parts, kernels), (parts, kernels)


def _grouped_product_backward(residuals, cotangents):
  parts, kernels = residuals
  d_parts = [
    _input_gradient(cotangent, own)
    for cotangent, own in zip(
      cotangents, _of_classes(kernels, parts), strict=True
    )
  ]
  # One concatenation: transposed slices would be padded and added up.
  d_kernels = [
    _kernel_gradient(part, cotangent)
    for part, cotangent in zip(parts, cotangents, strict=True)
  ]
  unread = kernels.shape[0] - sum(part.shape[0] for part in parts)
  d_kernels.append(jnp.zeros((unread, *kernels.shape[1:]), kernels.dtype))
  return d_parts, jnp.concatenate(d_kernels)


grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)


def _of_classes(kernels, parts):
  ends = np.cumsum([part.shape[0] for part in parts])
  return [
    kernels[end - part.shape[0] : end]
    for part, end in zip(parts, ends, strict=True)
  ]


def _input_gradient(cotangent, kernels):
  room = cotangent.shape[1]
  if room > _THIN:
    return jnp.einsum('ecf,emf->ecm', cotangent, kernels)
  by_slot = [
    jnp.einsum('ef,emf->em', cotangent[:, c], kernels) for c in range(room)
  ]
  return jnp.stack(by_slot, axis=1)


def _kernel_gradient(part, cotangent):
  room = part.shape[1]
  if room > _THIN:
    return jnp.einsum('ecm,ecf->emf', part, cotangent)
  outer = [part[:, c, :, None] * cotangent[:, c, None, :] for c in range(room)]
  return functools.reduce(jnp.add, outer)
