"""The progress bar of a tuning run, and the values for trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from timm_nrpm.evaluation.history import Evaluation, Step
from timm_nrpm.jobs.progress import Bars


class Bar(Bars):
    """A progress bar, and below it loss, accuracies and lambdas.

    Args:
        steps: Number of steps of the whole run.
        done: Number of steps taken before.
        evaluation: The last evaluation, if there is one.
        shown: Whether to show anything.
    """

    def __init__(self, steps: int, done: int, evaluation: Evaluation | None, shown: bool) -> None:
        count = TextColumn("{task.completed}/{task.total}")
        self.numbers = Text()
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(None),
            count,
            TimeRemainingColumn(),
            shown=shown,
        )
        self.task = self.add_task("Tuning", total=steps, completed=done)
        self.evaluation = evaluation

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.numbers

    def doing(self, what: str) -> None:
        """Show the current activity, such as "Calibrating"."""
        self.update(self.task, description=what, refresh=True)

    def show(self, row: Step) -> None:
        """Show the numbers of a step."""
        shares = {"clean": row.clean, "attacked": row.attacked}
        if self.evaluation is not None:
            shares |= {"clean": self.evaluation.clean, "quick attacks": self.evaluation.quick}
        mean = sum(row.lams) / len(row.lams)
        loss = "not finite" if row.loss is None else f"{row.loss:.3f}"
        parts = [f"loss {loss}", *(f"{name} {share:.0%}" for name, share in shares.items() if share is not None)]
        self.numbers = Text(", ".join([*parts, f"lambda {min(row.lams):.2f} < {mean:.2f} < {max(row.lams):.2f}"]))
        self.update(self.task, completed=row.step)


def tracked(row: Step, layers: Sequence[str]) -> dict[str, float]:
    """The values of a step by name, for trackers such as TensorBoard."""
    values = {"loss": row.loss, "clean": row.clean, "attacked": row.attacked}
    values |= {"norm/lambda": row.norm[0], "norm/rest": row.norm[1], "skipped": float(row.skipped)}
    lams = {f"lambda/{name}": lam for name, lam in zip(layers, row.lams, strict=True)}
    return {**{name: value for name, value in values.items() if value is not None}, **lams}
