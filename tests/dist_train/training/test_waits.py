"""What a step of the trainer makes the host wait for, counted on a CPU that plays a GPU."""

from dist_train import train
from dist_train.config_file import make_config
from dist_train.distributed.group import Group
from dist_train.loss import operator
from dist_train.training.engine import Engine
from dist_train.training.trainer import Trainer
from tests.common import SMALL_MODEL
from tests.dist_train.training.plays_cuda import Reads, play_cuda


def waits(digits, folder, stages):
    """By stage, of every step of two micro batches: the waits, the gradients of the loss, and in which order it goes on."""
    accelerator, steps, gradients, order = play_cuda(), [], [], []
    step, backward = Trainer.step, operator._ExitLoss.backward
    vote, go_on, update = Group.vote, Engine.next_micro_batch, Engine.update

    def counted(trainer, batch):
        accelerator.waits.clear()
        with Reads(accelerator.waits):
            stop = step(trainer, batch)
        steps.append(dict(accelerator.waits))
        return stop

    def noted(ctx, loss, *others):
        # Outside of the count: as a NumPy array it is read without an operation.
        gradients.append(float(loss.numpy()))
        return backward(ctx, loss, *others)

    def voted(group, *flags):
        order.append("vote")
        return vote(group, *flags)

    def passed(engine):
        order.append("pass")
        return go_on(engine)

    def updated(engine, *when):
        order.append("update")
        return update(engine, *when)

    Trainer.step, operator._ExitLoss.backward = counted, staticmethod(noted)
    Group.vote, Engine.next_micro_batch, Engine.update = voted, passed, updated
    found = []
    for stage in stages:
        config = make_config(
            {
                "name": f"zero{stage}",
                "runs": str(folder),
                "data": {"shards": str(digits)},
                "model": SMALL_MODEL,
                "optim": {"max_grad_norm": 1, "ema_decay": 0.9},
                "train": {"global_batch": 64, "micro_batch": 16, "max_steps": 4, "epochs": 1, "zero_stage": stage},
                "tracking": {"uri": "off", "log_every": 100},
            }
        )
        assert train(config).progress.step == 4
        # Without the last step, which logs.
        found.append((steps[:3], gradients[:6], order[:9]))
        for noted_down in (steps, gradients, order):
            noted_down.clear()
    return found


def test_a_step_reads_one_value_from_the_device_and_the_gradient_of_the_loss_is_written_once(ranks, digits, tmp_path):
    # The operator looks at the gradient's factor on a CPU alone; on a GPU a kernel does, see scale_gradients_gpu.
    stages = (0, 1, 2)
    for found in ranks(waits, 2, digits, tmp_path, stages):
        for stage, (steps, gradients, order) in zip(stages, found, strict=True):
            norm = f"value read in {'zero' if stage else 'engine'}.py"
            assert steps == [{norm: 1, "value read in operator.py": 2}] * 3
            # A factor of 1 leaves the gradient that the forward pass has made as it is.
            assert gradients == [1.0] * 6
            # The ranks agree while the device is busy, before the update waits for it.
            assert order == ["pass", "vote", "update"] * 3
