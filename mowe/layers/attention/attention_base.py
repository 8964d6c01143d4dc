"""The contract between an attention layer and the model that holds it."""

from collections.abc import Mapping

from flax import linen as nn


class Attention(nn.Module):
  """Base of all attention layers.

  Models ask a layer for the attributes and methods below. A layer overrides
  those whose defaults are not true for it.

  Attributes:
    looks_ahead: whether the outputs of a query may depend on later queries of
      its row whatever the mask says. A decoder refuses such a layer.
    looks_back_only: whether the layer orders keys by how far behind the query
      they are, so that no key may lie ahead of it.
    needs_all_queries: whether queries and keys must be the same tokens, so that
      the layer cannot generate one token at a time.
  """

  # These are not dataclass fields: a layer overrides them with a value or a
  # property.
  looks_ahead = False
  looks_back_only = False
  needs_all_queries = False

  def make_shared(self) -> dict[str, nn.Module]:
    """Returns the modules, by name, that the layers of all blocks share.

    The model owns them once and hands them to every block.
    """
    return {}

  def with_shared(self, shared: Mapping[str, nn.Module]) -> 'Attention':
    """Returns an unbound copy of the layer that uses the shared modules.

    Args:
      shared: the model's shared modules by name; the layer takes those that it
        knows.
    """
    del shared
    return self

  def kind(self) -> str:
    """Returns the kind of the attention, as messages name it."""
    return type(self).__name__

  def check_width(self, embed_dim: int) -> None:
    """Raises ValueError if the layer does not fit the width of the model.

    Args:
      embed_dim: width of the model.
    """

  def check_mesh(
    self, mesh_shape: Mapping[str, int], batch: int, length: int
  ) -> None:
    """Raises ValueError if the layer cannot be split over the mesh.

    Args:
      mesh_shape: number of devices along each mesh axis, by the axis's name.
      batch: number of rows that go through the layer at once.
      length: number of tokens of a row.
    """
