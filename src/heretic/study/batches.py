"""How a search has its trials scored: a batch is begun, and its scores are waited for, so that several can be at work at once."""

from collections.abc import Callable, Sequence
from functools import partial

from ..editing.ablation import Ablation
from ..errors import TeamError
from ..evaluator import Score

# What a batch that crashed is told by.
ONE_BY_ONE = "Trials are scored one by one, as scoring them together failed"

Limit = Callable[[float], float]
Scores = Sequence[Score | Exception]
ScoreTrials = Callable[[list[Ablation], Limit], Scores]
Wait = Callable[[], Scores]


class Scoring:
    """Scores batches in this process, each when its scores are waited for."""

    n_processes = 1

    def __init__(self, score_trials: ScoreTrials) -> None:
        self.score_trials = score_trials
        self.on_crash: Callable[[Exception], None] = lambda error: None  # given why the trials of a batch are scored one by one

    @property
    def n_at_work(self) -> int:
        """How many batches are begun before the first one's scores are waited for: one waits, so that no process has to."""
        return 1 if self.n_processes == 1 else self.n_processes + 1

    def begin(self, ablations: list[Ablation], limit: Limit) -> Wait:
        """Begin to score a batch, as `Evaluator.score_trials` does; what waits for its scores and returns them."""
        return partial(self.score_trials, ablations, limit)

    def finish(self, ablations: list[Ablation], limit: Limit, wait: Wait) -> Scores:
        """Scores of a batch that was begun. Where scoring it crashes, each is scored alone, so that only those that crash again fail."""
        try:
            return wait()
        except TeamError:
            raise
        except Exception as error:
            if len(ablations) == 1:
                return [error]
            self.on_crash(error)
        return [self.finish([ablation], limit, self.begin([ablation], limit))[0] for ablation in ablations]
