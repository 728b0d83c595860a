"""Which learner a run has: it depends on how its weights lie over the processes."""

from __future__ import annotations

from torch import nn

from align.models.trunk import Trunk
from align.training.learner import Learner
from align.training.session import Session
from align.training.shard_learner import ShardLearner
from align.training.zero import stage_of
from align.training.zero_learner import ZeroLearner


def learner_of(session: Session, trunk: Trunk, module: nn.Module, rates: dict[str, float]) -> Learner:
    """For what trains in `module`; `rates`: as the loop has them."""
    if stage_of(session.accelerator):  # before shards: under ZeRO-3 a trunk is sharded too
        return ZeroLearner(session, trunk, module, rates)
    return (ShardLearner if trunk.sharded else Learner)(session, trunk, module, rates)
