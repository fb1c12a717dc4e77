"""The progress line of a training run, on standard error."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """Progress bar with losses, active ratio, tokens per second and remaining time; plain lines without a terminal."""

    def __init__(self, steps: int, first_step: int, is_on: bool):
        self.steps, self.is_on = steps, is_on
        self._printed: int | None = None
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=self.console,
            disable=not is_on or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=steps, completed=first_step, terms="")

    def __enter__(self) -> "TrainProgress":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        """Show that a step is done. Its loss may still be on its way through the device."""
        self.bar.update(self.task, completed=step)

    def update(self, step: int, terms: dict[str, float], tokens_per_s: float) -> None:
        """Show the terms of a training step, which were just read."""
        self.show(
            step,
            f"loss {terms['loss']:.3f} = task {terms['task']:.3f}, R_P {terms['r_p']:.3f}, R_U {terms['r_u']:.3f}, "
            f"R_L {terms['r_l']:.3f}; active {terms['active_ratio']:.3f}, union {terms['union']:.2f}; "
            f"{tokens_per_s:.0f} tokens/s",
        )

    def show(self, step: int, text: str) -> None:
        """Show a step with the given text. Without a terminal, about twenty lines are printed per run."""
        self.bar.update(self.task, completed=step, terms=text)
        every = max(1, self.steps // 20)
        is_due = self._printed is None or step // every > self._printed // every or step == self.steps
        if self.is_on and not self.console.is_terminal and is_due:
            self._printed = step
            self.console.print(f"step {step}/{self.steps}: {text}", highlight=False, soft_wrap=True)
