"""What routers of modules that were added or pruned have of the one they hold."""

from typing import Any


class WrappedRouter:
  """A router around a router whose tokens choose by learned logits.

  Settings that a layer reads are those of the router inside.

  Attributes:
    router: the one inside.
  """

  router: Any

  is_learned = True
  is_balanced = False
  routes_padding = False
  each_token_chooses = True

  @property
  def looks_ahead(self) -> bool:
    """See `routing.Router`."""
    return self.router.looks_ahead

  @property
  def sigmoid(self) -> bool:
    """Whether weights are sigmoids."""
    return self.router.sigmoid

  @property
  def use_bias(self) -> bool:
    """Whether logits have a learned bias."""
    return self.router.use_bias

  @property
  def jitter(self) -> float:
    """Of the router's inputs in training."""
    return self.router.jitter

  @property
  def bias_rate(self) -> float:
    """Of the selection bias."""
    return self.router.bias_rate

  @property
  def exclusion_rate(self) -> float:
    """Share of the modules that a token may not have in training."""
    return self.router.exclusion_rate
