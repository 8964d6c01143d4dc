"""sigma-MoE: a mixture of experts with sigmoid weights, made of its parts."""

from typing import Any

from mowe.layers.mixtures import initial_experts, moe
from mowe.layers.routers import tokens_choose


class SigmaMoe(moe.MoeLayer):
  """MoeLayer with the parts of sigma-MoE.

  Each token chooses the k experts with the largest logits and weighs them by
  the sigmoids of those, which are not divided by their sum; experts are ReLU
  layers whose initialisation knows that together they are one dense layer.
  Nothing is dropped. The entropy regulariser is a coefficient of the training
  step (`RouterLossConfig.entropy`), as every loss of a router.

  Variants are other parts: `TokensChoose(sigmoid=False)` is softmax before the
  choice, with `renormalize` after it; `SinkhornChoose` is S-BASE.

  Source: arXiv 2310.10837; https://github.com/RobertCsordas/moe.

  Attributes:
    initialization: SigmaInit with the blocks of the stack.
    expert_dropout_rate: none, in training as well: `exclusion_rate` of the
      router leaves out whole experts instead.

  The other attributes, the call and the errors are those of MoeLayer.
  """

  activations: tuple[str, ...] = ('relu',)
  routing: Any = tokens_choose.TokensChoose(4, sigmoid=True)
  initialization: Any = initial_experts.SigmaInit(12)
  expert_dropout_rate: float | None = 0.0
