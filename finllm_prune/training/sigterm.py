"""SIGTERM (a spot instance that goes, SLURM's end of time): save first, then end.

transformers' ``enable_jit_checkpoint`` does not do: it saves without telling callbacks, so that the Pruner's file is missing,
at a step of each rank's own, and the run then goes on to the next phase.
"""

import logging
import signal
import threading
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

ENDED = 128 + signal.SIGTERM


class Sigterm(TrainerCallback):
    """Saves a checkpoint at the end of the step in which the signal came to any rank, and leaves with exit code 143.

    It must come after the callbacks that write into a checkpoint.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._asked = self._stops = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one hear signals
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked:
            self.accelerator.set_trigger()
        if self._asked if args.world_size == 1 else self.accelerator.check_trigger():
            self._stops = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stops:
            self.accelerator.wait_for_everyone()
            if state.is_world_process_zero:
                logger.warning(
                    "SIGTERM: the checkpoint of step %d is complete; go on with --resume.", state.global_step
                )
            raise SystemExit(ENDED)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True
