"""Steps whose loss or gradient is not finite: counted, logged, and the end of a run with too many."""

from __future__ import annotations

from basic.training.batches import BatchSampler
from basic.training.records.log import NullLog, RunLog
from basic.training.records.meter import StepMetrics
from basic.training.settings import TrainConfig
from basic.training.step import TrainStep


class NonfiniteSteps:
    """Count and log the steps whose loss or gradient is not finite, and end the run if there are too many.

    `TrainStep` has not applied these steps: weights and optimizer state are unchanged.
    """

    def __init__(
        self, config: TrainConfig, sampler: BatchSampler, count: int, log: RunLog | NullLog, take_step: TrainStep
    ):
        self.max_count = config.max_nonfinite_steps if config.on_nonfinite == "skip" else 0
        self.sampler, self.count, self.log, self.take_step = sampler, count, log, take_step

    def handle(self, steps: list[StepMetrics]) -> None:
        for step in steps:
            self.count += 1
            starts = self.sampler.row_starts(step.step - 1).tolist()  # the sampler counts steps from 0
            numbers = {"loss": repr(step.loss), "gradient_norm": repr(step.gradient_norm)}
            record = {"kind": "nonfinite", "step": step.step, "learning_rate": step.learning_rate, **numbers}
            self.log.write({**record, "row_starts": starts})
            positions = ", ".join(map(str, starts[:8])) + (", ..." if len(starts) > 8 else "")
            message = (
                f"step {step.step} gave the loss {step.loss} and the gradient norm {step.gradient_norm} at the "
                f"learning rate {step.learning_rate:.3g}, on the sequences that start at tokens {positions} of the "
                "training data"
            )
            if unusual := self.take_step.take_unusual():
                message += f"; in fp8, {first_of(unusual)}"
            if self.count > self.max_count:
                raise FloatingPointError(
                    f"{message}; neither the weights nor the checkpoints contain this step; try a lower "
                    "max_learning_rate or a longer warm-up, look at these sequences, or skip such steps: "
                    f"on_nonfinite = skip, max_nonfinite_steps above {self.max_count}"
                )
            self.log.print_message(f"warning: {message}; skipped, number {self.count} of at most {self.max_count}")


def first_of(messages: list[str]) -> str:
    """The first four of some messages, and how many more there are."""
    return "; ".join(messages[:4]) + (f"; and {len(messages) - 4} more" if len(messages) > 4 else "")
