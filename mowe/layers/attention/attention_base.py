"""The contract between an attention layer and the model that holds it."""

from collections.abc import Mapping

from flax import linen as nn


class Attention(nn.Module):
  """Base of all attention layers.

  The attributes and methods below are what models ask of a layer; a layer
  overrides those whose defaults are not true for it.

  Attributes:
    looks_ahead: the outputs of a query may depend on later queries of its row
      whatever the mask says, so that the layer is refused in a decoder.
    looks_back_only: the layer orders keys by how far behind the query they
      are, so that no key may lie ahead of it.
    needs_all_queries: queries and keys must be the same tokens, so that the
      layer cannot generate one token at a time.
  """

  # These are no fields: a layer overrides them with a value or a property.
  looks_ahead = False
  looks_back_only = False
  needs_all_queries = False

  def make_shared(self) -> dict[str, nn.Module]:
    """Modules by name that the model owns once and hands to all blocks."""
    return {}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'Attention':
    """This layer, not yet bound, with those of the shared modules it uses."""
    del shared
    return self

  def kind(self) -> str:
    """What kind of attention this is, for messages."""
    return type(self).__name__

  def check_width(self, embed_dim: int) -> None:
    """Raises ValueError if the layer does not fit the width of the model."""

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    """Raises ValueError if [batch, length] tokens cannot go over the mesh.

    Args:
      mesh_shape: the number of devices along each mesh axis, by its name.
      batch: rows that go through the layer at once.
      length: tokens of a row.
    """
