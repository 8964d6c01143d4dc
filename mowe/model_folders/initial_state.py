"""The train state a run begins with: resumed, from other weights, or fresh."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import optax
from flax import linen as nn

from mowe.model_folders import model_folder
from mowe.models import initialization, model_config, parameters, threefry
from mowe.models.surgery import upcycling
from mowe.stores import (
  expert_records,
  expert_sources,
  expert_stores,
  no_experts,
  row_file,
  row_index,
)
from mowe.training import checkpointing, partitioning, train_state
from mowe.training.optimization import optimizers, row_optimizers


@dataclasses.dataclass(frozen=True)
class Setup:
  """How the train state is made, and where on the devices it lies.

  Attributes:
    model: the model.
    optimizer: the optax transformation of ordinary parameters.
    row_optimizer: the optimizer of the expert tables; None: they are frozen,
      and held apart from the trained state.
    abstract: shapes and shardings of the state, whole tables always included.
    seed: the seed of fresh parameters.
    make_memory: gives the memory before the first batch; None: there is none.
  """

  model: nn.Module
  optimizer: optax.GradientTransformation
  row_optimizer: row_optimizers.RowOptimizer | None
  abstract: train_state.TrainState
  seed: int
  make_memory: Callable[[], Any] | None = None

  @classmethod
  def make(
    cls,
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    row_optimizer: row_optimizers.RowOptimizer | None,
    mesh: jax.sharding.Mesh,
    seed: int,
    batch_size: int,
  ) -> 'Setup':
    """Builds the optimizer for the model's parameters; allocates nothing."""
    make_memory = None
    if model.config.memory_length:
      make_memory = functools.partial(model.config.initial_memory, batch_size)
    variables = initialization.abstract_variables(model)
    axes = partitioning.parameter_axes(variables['params_axes'])
    ordinary, tables = parameters.split_tables(variables['params'])
    paths = flax.traverse_util.flatten_dict(ordinary)
    built = optimizer.build(
      flax.traverse_util.unflatten_dict({path: axes[path] for path in paths})
    )
    abstract = jax.eval_shape(
      functools.partial(
        train_state.begin,
        optimizer=built,
        row_optimizer=row_optimizer,
        make_memory=make_memory,
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
    return cls(model, built, row_optimizer, abstract, seed, make_memory)

  def start(
    self,
    checkpoints: checkpointing.Checkpoints,
    described: dict[str, Any],
    initial_path: str | None,
    store: expert_stores.Store = expert_stores.DeviceStore(),
    experts_at_once: int = 0,
  ) -> tuple[train_state.TrainState, expert_stores.Experts]:
    """The state to train, and its word experts, to be closed in the end.

    Args:
      checkpoints: of this run; its latest is resumed if there is one.
      described: what must be as it was when the run began.
      initial_path: whose parameters a new run takes; None: fresh ones. Those
        of a dense model become experts; see `upcycling`.
      store: where word experts lie.
      experts_at_once: that an ordinary batch has.
    """
    if not self.abstract.tables:
      state, _, _ = self._start(checkpoints, described, initial_path)
      return state, no_experts.NoExperts()
    with contextlib.ExitStack() as if_it_fails:
      # Before looking for checkpoints: another run may be about to end.
      file = row_file.LockedFile(checkpoints.folder, jax.process_index())
      if_it_fails.callback(file.close)
      state, source, is_resumed = self._start(
        checkpoints, described, initial_path
      )
      with contextlib.closing(source):
        experts = store.open(
          row_file.RowFile(
            file,
            self._index(source, is_resumed),
            jax.process_index(),
            jax.process_count(),
          ),
          self._tables(),
          is_trained=self.row_optimizer is not None,
          is_resumed=is_resumed,
          experts_at_once=experts_at_once,
        )
        tables, table_state = experts.start(source)
      if_it_fails.pop_all()
    return state.replace(tables=tables, table_state=table_state), experts

  def _start(self, checkpoints, described, initial_path):
    """The state without tables, their source, whether a run is resumed."""
    if checkpoints.latest_step() is not None:
      checkpoints.check_metadata(described)
      state = checkpoints.restore(self._without_tables())
      print(f'Resumed {checkpoints.folder} at step {int(state.step)}.')
      return state, self._saved_experts(checkpoints, None), True
    if initial_path is not None:
      params, source = self._parameters_of(initial_path)
    else:
      params, source = self._fresh_parameters()
    return self._begin(params), source, False

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

  def _tables(self) -> expert_sources.Arrays:
    return self.abstract.tables, self.abstract.table_state

  def _without_tables(self) -> train_state.TrainState:
    return self.abstract.replace(tables={}, table_state={})

  def _begin(self, params: Any) -> train_state.TrainState:
    """Step 0 of training these ordinary parameters."""
    return train_state.begin(
      params,
      {},
      optimizer=self.optimizer,
      row_optimizer=None,
      shardings=_shardings(self._without_tables()),
      make_memory=self.make_memory,
    )

  def _fresh_parameters(
    self,
  ) -> tuple[Any, expert_sources.ExpertSource | None]:
    key = threefry.key(self.seed)
    params = initialization.initial_parameters(
      self.model, key, _shardings(self.abstract.params)
    )
    if not self.abstract.tables:
      return params, None
    return params, expert_sources.FreshExperts(
      self.model, key, self.abstract.tables
    )

  def _parameters_of(
    self, path: str
  ) -> tuple[Any, expert_sources.ExpertSource | None]:
    """Ordinary parameters of other weights, and their experts."""
    folder, step = model_folder.split_checkpoint_path(path)
    wanted = self.abstract.params
    is_dense = self._is_dense_twin(folder)
    if is_dense:
      wanted = upcycling.dense_shapes(wanted)
    with checkpointing.Checkpoints(folder) as saved:
      params = saved.restore_parameters({'params': wanted}, step)['params']
      step = saved.latest_step() if step is None else step
      source = self._saved_experts(saved, step, kernels_only=True)
    print(f'Started from {folder}, step {step}.')
    if is_dense:
      params = upcycling.upcycle(
        self.model, params, self.abstract.params, threefry.key(self.seed)
      )
      print('It is dense: every expert starts as a copy of its MLP.')
    return params, source

  def _saved_experts(
    self, checkpoints, step, kernels_only=False
  ) -> expert_sources.SavedExperts | None:
    if not self.abstract.tables:
      return None
    source = expert_sources.SavedExperts(
      checkpoints.finished(step), kernels_only
    )
    source.check(self._tables())
    return source

  def _index(self, source, is_resumed) -> row_index.RowIndex:
    """Where the experts lie in the file of this run, as it begins."""
    if is_resumed:
      return source.index
    return row_index.RowIndex.empty(
      expert_records.record_dtype(*self._tables()),
      jax.tree.leaves(self._tables())[0].shape[0],
    )

  def _is_dense_twin(self, folder: pathlib.Path) -> bool:
    """Whether the folder has no experts and they are to be made of its MLPs."""
    if not model_config.routes_tokens(self.model.config):
      return False
    source, _ = model_folder.load_config(folder)
    if source.sparse_feed_forward is not None:
      return False
    upcycling.check(self.model.config)
    return True


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)
