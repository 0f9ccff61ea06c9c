"""Tasks of EleutherAI's lm-evaluation-harness, asked of a run."""

from dataclasses import dataclass

from hope_jax.evaluation.answers import digest
from hope_jax.evaluation.page import write_page
from hope_jax.evaluation.subject import Results, Subject, TaskError


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Asks what the lm-evaluation-harness asks, by its names (needs the extra `harness`).

    The paper's zero-shot suite is tasks=wikitext,lambada_openai,piqa,hellaswag,winogrande,arc_easy,
    arc_challenge,social_iqa,boolq; the harness downloads their data. What the same model was asked
    before is not asked again: an interrupted evaluation goes on where it was.

    Attributes:
      tasks: Names with commas between them.
      include: A folder of task files of one's own.
      shots: Examples in a prompt; the task's own number without.
      limit: Questions of each task; all of them without.
      batch: Sequences that are read side by side.
    """

    tasks: str = ""
    include: str | None = None
    shots: int | None = None
    limit: int | None = None
    batch: int = 8

    def __post_init__(self):
        for name, least in (("shots", 0), ("limit", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def run(self, subject: Subject) -> Results:
        """Asks; returns each task's metrics, as TASK/METRIC."""
        names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        if not names:
            raise TaskError("tasks must name at least 1 task of the harness, got none")
        try:
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager

            from hope_jax.evaluation.harness_model import HarnessModel
        except ModuleNotFoundError as error:
            raise TaskError(
                f"task harness needs {error.name}: pip install 'hope_jax[harness]'"
            ) from error
        manager = TaskManager(include_path=self.include)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise TaskError(f"tasks must be known to the harness, got {', '.join(unknown)}")
        found = simple_evaluate(
            model=HarnessModel(subject, self.batch),
            tasks=names,
            task_manager=manager,
            num_fewshot=self.shots,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=False,
            use_cache=str(subject.folder / f"harness-{digest(subject.model, {})}"),
        )
        results: Results = {}
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                name = metric.removesuffix(",none")
                if isinstance(value, int | float) and "stderr" not in metric:
                    results[f"{task}/{name}"] = value
        about = f"Tasks of the lm-evaluation-harness: {', '.join(names)}."
        return results | {"page": str(write_page(subject.folder, "harness", about, [], results))}
