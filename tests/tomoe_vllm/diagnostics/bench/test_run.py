"""The command tomoe bench."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only is 'speed'; it must be one of op, decode, prefill, memory"),
        (["--shape", "2b"], "'2b' is not one of '135m', '1b', '7b', '7b-layer'"),
        (["--tomoe", "x"], "--tomoe needs the dense model it was made from; add --model"),
        (["--device", "cuda"], "--device cuda: vLLM runs on cpu here; it needs vLLM's CUDA build and an NVIDIA GPU"),
        (["--order", "both"], "'both' is not one of 'auto', 'interleaved', 'sequential'"),
        (["--out", "."], "--out . already exists; use a new folder"),
    ],
)
def test_misuse_is_one_line(run_cli, arguments, message):
    code, out, err = run_cli("bench", *arguments)
    assert (code, out) == (2, "")
    assert message in err
