"""Base of routers that wrap another router and forward its settings."""

from mowe.layers.routers import router_base


class WrappedRouter:
  """A router around another one, in which tokens choose by learned logits.

  A layer reads the settings of the inner router through this one.

  Attributes:
    router: the inner router.
  """

  router: router_base.LearnedRouter

  is_learned = True
  is_balanced = False
  routes_padding = False
  each_token_chooses = True

  @property
  def looks_ahead(self) -> bool:
    """See `router_base.Router`."""
    return self.router.looks_ahead

  @property
  def sigmoid(self) -> bool:
    """See `router_base.LearnedRouter`."""
    return self.router.sigmoid

  @property
  def use_bias(self) -> bool:
    """See `router_base.LearnedRouter`."""
    return self.router.use_bias

  @property
  def jitter(self) -> float:
    """See `router_base.LearnedRouter`."""
    return self.router.jitter

  @property
  def bias_rate(self) -> float:
    """See `router_base.LearnedRouter`."""
    return self.router.bias_rate

  @property
  def exclusion_rate(self) -> float:
    """See `router_base.LearnedRouter`."""
    return self.router.exclusion_rate
