"""The command tomoe bench."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only is 'speed'; it must be one of op, decode, prefill, memory"),
        (["--shape", "2b"], "'2b' is not one of '135m', '1b', '7b-layer'"),
        (["--tomoe", "x"], "--tomoe needs the dense model it was made from; add --model"),
        (["--out", "."], "--out . already exists; use a new folder"),
    ],
)
def test_misuse_is_one_line(run_cli, arguments, message):
    code, out, err = run_cli("bench", *arguments)
    assert (code, out) == (2, "")
    assert message in err
