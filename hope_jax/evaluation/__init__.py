"""What can be asked of a trained model: one frozen dataclass for each task, listed in `TASKS`."""

from hope_jax.evaluation.harness import Harness
from hope_jax.evaluation.intents import Intents
from hope_jax.evaluation.longcontext import LongContext
from hope_jax.evaluation.memory import Memory
from hope_jax.evaluation.needles import Needles
from hope_jax.evaluation.perplexity import Perplexity
from hope_jax.evaluation.read import Read
from hope_jax.evaluation.sample import Sample
from hope_jax.evaluation.subject import Task
from hope_jax.evaluation.translation import Translation

TASKS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "sample": Sample,
    "read": Read,
    "memory": Memory,
    "longcontext": LongContext,
    "needles": Needles,
    "intents": Intents,
    "harness": Harness,
    "translation": Translation,
}
"""Name on the command line -> task."""
