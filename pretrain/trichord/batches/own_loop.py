"""What a training loop of the user's own could get wrong with the loader, found where it can be seen."""

import torch.distributed as dist
from torch.utils.data import get_worker_info

from trichord.core.errors import ConfigError
from trichord.core.log import get_logger

_log = get_logger(__name__)
NO_LENGTH = (
    "a Loader has no length: it goes on for ever, and ends at the step where its user does; iterate over it itself, "
    "not over a torch DataLoader around it: it reads in workers of its own (batches.num_workers)"
)


def refuse_workers() -> None:
    """Raise ConfigError inside a worker of a DataLoader: each worker would hand out every sample."""
    worker = get_worker_info()
    if worker is not None:
        raise ConfigError(
            f"a Loader is iterated over in worker {worker.id} of the {worker.num_workers} of a torch DataLoader, each "
            "of which would hand out every sample; iterate over it in the process that trains: it reads in workers of "
            "its own (batches.num_workers)"
        )


def warn_of_other_ranks(world_size: int) -> None:
    """Where the processes that train are not as many as the loader shares rows out to. It may be meant: ranks of one
    tensor-parallel group, say, want the same rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == world_size:
        return
    if dist.get_rank() == 0:
        _log.warning(
            "rows are shared out to %d process%s, and the process group has %d: those that name the same rank get the "
            "same samples; give each Loader its rank and world_size (accelerator.process_index and num_processes)",
            *(world_size, "" if world_size == 1 else "es", dist.get_world_size()),
        )
