"""The steps of a worker's model runner.

vLLM has no hook for "a step has been launched", so ``execute_model`` of the runner is wrapped. Every real step passes
it, with CUDA graphs too. Both model runners of the supported releases have it:

====== ================================================================== =====================================
runner signature                                                          batch of the launched step
====== ================================================================== =====================================
first  ``execute_model(scheduler_output, intermediate_tensors)``           ``runner.input_batch``
second ``execute_model(scheduler_output, intermediate_tensors, dummy_run,  ``runner.execute_model_state
       ...)``; warm-up passes ``dummy_run=True``                           .input_batch``
====== ================================================================== =====================================
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchedStep:
    """A step that the runner has launched; on a GPU it may still run.

    ``scheduler_output``: vLLM's; ``request_ids``: of the requests, in the order of their rows in the step;
    ``num_tokens``: rows that hold tokens; ``num_padded_tokens``: rows that the layers see.
    """

    scheduler_output: Any
    request_ids: list[str]
    num_tokens: int
    num_padded_tokens: int


class StepObserver:
    """Calls ``on_step`` after each real step of ``runner``, between :meth:`attach` and :meth:`detach`.

    Raises ``ValueError`` if the runner's ``execute_model`` does not have the signature of a supported release.
    """

    def __init__(self, runner: Any, on_step: Callable[[LaunchedStep], None]) -> None:
        self._runner, self._on_step = runner, on_step
        self._execute = runner.execute_model
        self._signature = inspect.signature(self._execute)
        if "scheduler_output" not in self._signature.parameters:
            raise ValueError(
                f"execute_model of this vLLM's model runner is {self._signature}; it must take scheduler_output"
            )

    def attach(self) -> None:
        """Wrap the runner's ``execute_model``."""
        self._runner.execute_model = self._execute_model

    def detach(self) -> None:
        """Restore the runner's own ``execute_model``."""
        self._runner.execute_model = self._execute

    def _execute_model(self, *args: Any, **kwargs: Any) -> Any:
        output = self._execute(*args, **kwargs)
        arguments = self._signature.bind(*args, **kwargs).arguments
        if not arguments.get("dummy_run", False):
            self._on_step(self._launched(arguments["scheduler_output"]))
        return output

    def _launched(self, scheduler_output: Any) -> LaunchedStep:
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if not num_tokens:
            return LaunchedStep(scheduler_output=scheduler_output, request_ids=[], num_tokens=0, num_padded_tokens=0)
        state = self._runner.execute_model_state
        batch = getattr(state, "input_batch", None) or self._runner.input_batch
        num_padded = getattr(batch, "num_tokens_after_padding", None)
        if num_padded is None:
            hidden_states = getattr(state, "hidden_states", None)
            num_padded = num_tokens if hidden_states is None else hidden_states.shape[0]
        else:  # the second runner, which may run fewer tokens than are scheduled (adaptive verification of drafts)
            num_tokens = batch.num_tokens
        return LaunchedStep(
            scheduler_output=scheduler_output,
            request_ids=batch.req_ids,
            num_tokens=num_tokens,
            num_padded_tokens=num_padded,
        )
