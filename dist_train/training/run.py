"""One start of a run, from the environment that a launcher sets to a run that is finished or stopped."""

from __future__ import annotations

from dist_train.checks import check_kind
from dist_train.config import Config
from dist_train.distributed.group import Group, Ranks
from dist_train.distributed.lock import RunLock
from dist_train.distributed.watchdog import JOIN, Watchdog
from dist_train.tracking.progress import set_up_logging
from dist_train.training.checkpoint import put_back
from dist_train.training.determinism import make_deterministic
from dist_train.training.health import StopRequests
from dist_train.training.memory import explain_out_of_memory
from dist_train.training.preflight import check_same_data, preflight
from dist_train.training.random_state import seed_random
from dist_train.training.run_folder import Run
from dist_train.training.trainer import Trainer


def train(config: Config) -> Run:
    """Train on all ranks of the environment (one, without a launcher); the same call again resumes.

    Raises:
        UserError: something in the configuration, the shards or the run folder is wrong; see the message.
        TrainingError: training cannot continue; the last checkpoint is intact.
    """
    check_kind("config", config, Config, "read a file with load_config(PATH)")
    config = make_deterministic(config)
    ranks = Ranks.from_env()
    if ranks.device.type == "cpu":
        ranks.pin()
    ranks.compute_on_cores()
    watchdog = Watchdog(config.faults, config.folder, ranks.rank, ranks.world_size)
    seed_random(config.seed)  # the same on all ranks, which build the same network
    ready = preflight(config, ranks)
    with StopRequests() as requests, RunLock(config.folder) as lock:
        if ranks.rank == 0:
            lock.acquire(say=print)
            put_back(config.folder / "checkpoints")
        # After the lock: the report of an earlier start, which it removes, may be one of the training that holds it.
        with watchdog:
            set_up_logging(ranks.rank, config.folder)
            watchdog.phase(JOIN)
            group = Group(ranks, config.faults.group_minutes, watchdog.phase)
            watchdog.exchange_heartbeats(group.store)
            # Wait for rank 0 to hold the lock: the group may exist already, made by an earlier run of these processes.
            group.broadcast(None)
            if ranks.rank:
                lock.join()
            check_same_data(group, ready)
            with explain_out_of_memory(config, group):
                trainer = Trainer(config, ready, group, requests, watchdog)
            return trainer.run()
