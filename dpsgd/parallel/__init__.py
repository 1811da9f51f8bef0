"""Several processes that train one model: data parallelism, whole or sharded."""

from dpsgd.lost_peers import LostPeer
from dpsgd.parallel.base import Parallel
from dpsgd.parallel.replicated import Replicated, ddp, single
from dpsgd.parallel.world import World, joined

__all__ = ["LostPeer", "Parallel", "Replicated", "World", "ddp", "fsdp", "joined", "single"]


def fsdp() -> Parallel:
    """Returns fully sharded data parallelism over torch.distributed's default group.

    Raises:
        ValueError: If there is none.
    """
    from dpsgd.parallel.sharded import Sharded  # FSDP2 takes long to import

    return Sharded(World.current())
