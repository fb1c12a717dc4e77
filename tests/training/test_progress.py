"""The progress line, on standard error."""

from tomoe_training.progress import TrainProgress

TERMS = {"loss": 1.25, "task": 1.0, "r_p": 0.0, "r_u": 0.1, "r_l": 0.15, "active_ratio": 0.5, "union": 0.9}


def _run(steps, capsys, is_on=True):
    with TrainProgress(steps, 0, is_on=is_on) as progress:
        for step in range(1, steps + 1):
            progress.update(step, TERMS, 123.4)
    return capsys.readouterr()


def test_long_run_prints_about_twenty_lines(capsys):
    captured = _run(1000, capsys)
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[-1].startswith("step 1000/1000: loss 1.250 = task 1.000")
    assert "active 0.500, union 0.90; 123 tokens/s" in lines[-1]


def test_other_ranks_print_nothing(capsys):
    assert _run(10, capsys, is_on=False).err == ""


def test_steps_without_terms_print_nothing(capsys):
    """The loss of a step is read from the device every ``log_every`` steps only."""
    with TrainProgress(100, 0, is_on=True) as progress:
        for step in range(1, 101):
            progress.advance(step)
            if step % 30 == 0 or step == 100:
                progress.update(step, TERMS, 1.0)
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/100" for step in (30, 60, 90, 100)]
