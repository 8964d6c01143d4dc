"""The train state a run begins with: resumed, from other weights, or fresh."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import optax

from mowe.commands import model_folder
from mowe.models import initialization, parameters, t5, threefry, upcycling
from mowe.training import checkpoints as checkpoints_lib
from mowe.training import optimizers, partitioning, row_optimizers, train_state


@dataclasses.dataclass(frozen=True)
class Setup:
  """How the train state is made, and where on the devices it lies.

  Attributes:
    model: the model.
    optimizer: the optax transformation of ordinary parameters.
    row_optimizer: of expert tables; None: they are frozen, and held apart from
      the trained state.
    abstract: shapes and shardings of the state, tables always included, as it
      is on disk.
    seed: of fresh parameters.
  """

  model: t5.T5
  optimizer: optax.GradientTransformation
  row_optimizer: row_optimizers.RowOptimizer | None
  abstract: train_state.TrainState
  seed: int

  @classmethod
  def make(
    cls,
    model: t5.T5,
    optimizer: optimizers.Optimizer,
    row_optimizer: row_optimizers.RowOptimizer | None,
    mesh: jax.sharding.Mesh,
    seed: int,
  ) -> 'Setup':
    """Builds the optimizer for the model's parameters; allocates nothing."""
    variables = initialization.abstract_variables(model)
    axes = partitioning.parameter_axes(variables['params_axes'])
    ordinary, tables = parameters.split_tables(variables['params'])
    paths = flax.traverse_util.flatten_dict(ordinary)
    built = optimizer.build(
      flax.traverse_util.unflatten_dict({path: axes[path] for path in paths})
    )
    abstract = jax.eval_shape(
      functools.partial(
        train_state.begin, optimizer=built, row_optimizer=row_optimizer
      ),
      ordinary,
      tables,
    )
    shardings = partitioning.state_shardings(abstract, axes, mesh)
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      shardings,
    )
    return cls(model, built, row_optimizer, abstract, seed)

  def start(
    self,
    checkpoints: checkpoints_lib.Checkpoints,
    described: dict[str, Any],
    initial_path: str | None,
  ) -> tuple[train_state.TrainState, parameters.Tables]:
    """The state to train, and the tables that are frozen ({} if none are).

    Args:
      checkpoints: of this run; its latest is resumed if there is one.
      described: what must be as it was when the run began.
      initial_path: whose parameters a new run takes; None: fresh ones. Those
        of a dense model become experts; see `upcycling`.
    """
    if checkpoints.latest_step() is not None:
      checkpoints.check_metadata(described)
      state = checkpoints.restore(self.abstract)
      print(f'Resumed {checkpoints.folder} at step {int(state.step)}.')
    elif initial_path is not None:
      state = train_state.begin(
        **self._parameters_of(initial_path), **self._how_to_make()
      )
    else:
      state = train_state.create(
        self.model, threefry.key(self.seed), **self._how_to_make()
      )
    if self.row_optimizer is not None:
      return state, {}
    return state.replace(tables={}), state.tables

  def jit(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """The jitted step: the state is donated and stays where it lies."""
    trained = self.abstract
    if self.row_optimizer is None:
      trained = trained.replace(tables={})
    return jax.jit(
      partitioning.on_mesh(train_step, self.abstract.step.sharding.mesh),
      donate_argnums=0,
      out_shardings=(_shardings(trained), None),
    )

  def _how_to_make(self) -> dict[str, Any]:
    return {
      'optimizer': self.optimizer,
      'row_optimizer': self.row_optimizer,
      'shardings': _shardings(self.abstract),
    }

  def _parameters_of(self, path: str) -> dict[str, Any]:
    folder, step = model_folder.split_checkpoint_path(path)
    wanted = {'params': self.abstract.params, 'tables': self.abstract.tables}
    is_dense = self._is_dense_twin(folder)
    if is_dense:
      wanted['params'] = upcycling.dense_shapes(self.abstract.params)
    with checkpoints_lib.Checkpoints(folder) as source:
      parts = source.restore_parameters(wanted, step)
      step = source.latest_step() if step is None else step
    print(f'Started from {folder}, step {step}.')
    if is_dense:
      parts['params'] = upcycling.upcycle(
        self.model,
        parts['params'],
        self.abstract.params,
        threefry.key(self.seed),
      )
      print('It is dense: every expert starts as a copy of its MLP.')
    return parts

  def _is_dense_twin(self, folder: pathlib.Path) -> bool:
    """Whether the folder has no experts and they are to be made of its MLPs."""
    if not self.model.config.routes_tokens:
      return False
    source, _ = model_folder.load_config(folder)
    if source.sparse_feed_forward is not None:
      return False
    upcycling.check(self.model.config)
    return True


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
