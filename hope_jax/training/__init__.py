"""The outer loop: what moves the slow weights, keeps them safe and reports on the way."""

from dataclasses import dataclass

CHANGEABLE = (
    "mesh",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "training.steps",
    "training.evaluate_every",
    "training.save_every",
    "training.log_every",
    "training.keep",
    "training.patience",
    "training.prompt",
    "training.sample_tokens",
    "training.wandb",
    "training.profile",
)
"""Settings that a run may change when it is continued: they leave the steps taken as they were."""


class RunError(RuntimeError):
    """A run had to stop or cannot go on; the message says why, and where it can go on."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, and what to do on the way.

    Attributes:
      steps: Updates of the slow weights. A finished run goes on if this grows; the schedule of the
        learning rate is then the longer run's.
      accumulate: Parts into which a batch is cut to save memory; divides it.
      evaluate_every: Steps between evaluations on the validation split; the last step is followed
        by one as well. 0 for that one only.
      save_every: Steps between checkpoints; the last step is saved as well. 0 for that one only.
      log_every: Steps between lines in the metrics.
      keep: How many of the last checkpoints stay, besides the best by validation
        loss of those that an evaluation came before.
      patience: Steps in a row with a loss or gradient that is not finite, after which to stop.
      sample_tokens: The length of a text that the model writes at every evaluation; 0 for none.
        Where several processes train, none is written.
      prompt: What it begins with; None begins a document.
      folder: Where runs lie; this one lies in the folder of its name there.
      wandb: A Weights & Biases project to report to.
      profile: Steps to trace with jax's profiler, from the sixth of this start on; 0 for none. The
        trace lies in the run's folder, for TensorBoard or xprof.
    """

    steps: int = 1000
    accumulate: int = 1
    evaluate_every: int = 500
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    patience: int = 10
    sample_tokens: int = 100
    prompt: str | None = None
    folder: str = "runs"
    wandb: str | None = None
    profile: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "save_every", "sample_tokens", "profile"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
