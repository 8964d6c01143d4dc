"""The contract between a feed-forward layer and the model that holds it."""

import fractions
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn


class FeedForward(nn.Module):
  """Base of all feed-forward layers.

  A model config calls the class, or a factory of it, with `dropout_rate`,
  `dtype` and `parent`, and a block calls the layer. The attributes and methods
  below are what models and training ask of a layer; a layer overrides those
  whose defaults are not true for it. A plain `nn.Module` can be used as well:
  the defaults hold for it, and it is called with its tokens alone, see `call`.

  Attributes:
    looks_ahead: the outputs of a token may depend on later tokens of its row,
      so that the layer is refused in a decoder.
    reads_token_ids: without a routing vocabulary the layer is given the ids of
      the tokens as routing ids, with -1 for padding.
    reads_plans: the layer can be given the plan of a batch instead of ids.
    rows_from: where the layer reads rows of a table that is on the host; None
      for layers whose parameters are all on the device.

  Call: tokens <float>[batch, length, embed] and routing_ids <int32>[batch,
    length] or None, to <dtype>[batch, length, embed]. `deterministic` turns
    dropout off. A layer with `reads_plans` also takes `plan`, by name, in which
    case there are no ids.
  """

  # These are no fields: a layer overrides them with a value or a property.
  looks_ahead = False
  reads_token_ids = False
  reads_plans = False
  rows_from = None

  def __call__(
    self,
    tokens: jax.Array,
    routing_ids: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    raise NotImplementedError

  def kind(self) -> str:
    """What kind of layer this is, for messages."""
    return type(self).__name__

  def num_word_experts(self) -> int | None:
    """Experts that the ids of a routing vocabulary name; None if none are."""
    return None

  def make_shared(self, embed_dim: int) -> dict[str, nn.Module]:
    """Modules by name that the model owns once and hands to all such layers."""
    del embed_dim
    return {}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'FeedForward':
    """This layer, not yet bound, with those of the shared modules it uses."""
    del shared
    return self

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    """Raises ValueError if [batch, length] tokens cannot go over the mesh.

    Args:
      mesh_shape: the number of devices along each mesh axis, by its name.
      batch: rows that go through the layer at once.
      length: tokens of a row.
    """

  def share_read(self, name: str) -> fractions.Fraction:
    """Share of one parameter that each token is multiplied with.

    Asked of parameters that stand directly below the layer and are not called
    `kernel`, which count as wholly read. It is 0 for what is added or scales.

    Args:
      name: the last part of the parameter's path.
    """
    del name
    return fractions.Fraction(0)


# What holds for a layer that is a plain Linen module.
_PLAIN = FeedForward(parent=None)


def contract(layer: nn.Module) -> FeedForward:
  """The layer, or for a plain Linen module an object with the defaults."""
  return layer if isinstance(layer, FeedForward) else _PLAIN


def call(
  layer: nn.Module,
  tokens: jax.Array,
  *,
  routing_ids: jax.Array | None,
  plan: Any,
  deterministic: bool,
) -> jax.Array:
  """Calls a layer with what it reads: the plan, or the ids, or neither.

  Args:
    layer: a FeedForward, or a plain Linen module that is called as
      `layer(tokens, deterministic=...)`.
    tokens: <float>[batch, length, embed].
    routing_ids: <int32>[batch, length], or None.
    plan: the plan of these tokens (`batch_plans.StreamPlan`), or None.
    deterministic: without dropout.
  """
  if not isinstance(layer, FeedForward):
    return layer(tokens, deterministic=deterministic)
  if plan is not None and layer.reads_plans:
    return layer(tokens, plan=plan, deterministic=deterministic)
  return layer(tokens, routing_ids, deterministic=deterministic)
