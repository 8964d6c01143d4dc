"""The contract between a feed-forward layer and the model that holds it."""

import fractions
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn


class FeedForward(nn.Module):
  """Base of all feed-forward layers.

  A model config calls the class, or a factory of it, with `dropout_rate`,
  `dtype` and `parent`, and a block calls the layer. Models and training ask a
  layer for the attributes and methods below. A layer overrides those whose
  defaults are not true for it. A plain `nn.Module` can be used as well: the
  defaults hold for it, and it is called with its tokens alone, see `call`.

  Attributes:
    looks_ahead: whether the outputs of a token may depend on later tokens of
      its row. A decoder refuses such a layer.
    reads_token_ids: whether the layer, in a model without a routing vocabulary,
      is given the ids of the tokens as routing ids, with -1 for padding.
    reads_plans: whether the layer can be given the plan of a batch instead of
      ids.
    rows_from: from where the layer reads rows of a table that is on the host;
      None for a layer whose parameters are all on the device.

  Call: tokens <float>[batch, length, embed] and routing_ids <int32>[batch,
    length] or None, to <dtype>[batch, length, embed]. `deterministic` turns
    dropout off. A layer with `reads_plans` also takes the keyword argument
    `plan`, and is given either a plan or ids.
  """

  # These are not dataclass fields: a layer overrides them with a value or a
  # property.
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
    """Returns the kind of the layer, as messages name it."""
    return type(self).__name__

  def num_word_experts(self) -> int | None:
    """Returns how many experts the ids of a routing vocabulary can name.

    None says that the layer does not take its experts from such ids.
    """
    return None

  def make_shared(self, embed_dim: int) -> dict[str, nn.Module]:
    """Returns the modules, by name, that all layers of this kind share.

    The model owns them once and hands them to every such layer.

    Args:
      embed_dim: width of the model.
    """
    del embed_dim
    return {}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'FeedForward':
    """Returns an unbound copy of the layer that uses the shared modules.

    Args:
      shared: the model's shared modules by name; the layer takes those that it
        knows.
    """
    del shared
    return self

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    """Raises ValueError if the layer cannot be split over the mesh.

    Args:
      mesh_shape: number of devices along each mesh axis, by the axis's name.
      batch: number of rows that go through the layer at once.
      length: number of tokens of a row.
    """

  def share_read(self, name: str) -> fractions.Fraction:
    """Returns the share of a parameter that each token is multiplied with.

    It is asked for parameters that stand directly below the layer. Parameters
    called `kernel` are not asked for: they count as read as a whole. The share
    is 0 for a bias and for a scale.

    Args:
      name: the last part of the parameter's path.
    """
    del name
    return fractions.Fraction(0)


# Holds the defaults, which are true for a plain Linen module.
_PLAIN = FeedForward(parent=None)


def contract(layer: nn.Module) -> FeedForward:
  """Returns the layer, or for a plain Linen module an object with defaults."""
  return layer if isinstance(layer, FeedForward) else _PLAIN


def call(
  layer: nn.Module,
  tokens: jax.Array,
  *,
  routing_ids: jax.Array | None,
  plan: Any,
  deterministic: bool,
) -> jax.Array:
  """Calls a layer with the plan, the ids or neither, as it can read them.

  Args:
    layer: a FeedForward, or a plain Linen module that is called as
      `layer(tokens, deterministic=...)`.
    tokens: <float>[batch, length, embed].
    routing_ids: <int32>[batch, length], or None.
    plan: the plan of these tokens (`batch_plans.StreamPlan`), or None.
    deterministic: turns dropout off.

  Returns:
    <float>[batch, length, embed].
  """
  if not isinstance(layer, FeedForward):
    return layer(tokens, deterministic=deterministic)
  if plan is not None and layer.reads_plans:
    return layer(tokens, plan=plan, deterministic=deterministic)
  return layer(tokens, routing_ids, deterministic=deterministic)
