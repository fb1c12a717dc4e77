"""The page that people attach to bug reports."""

import pytest

from tomoe_vllm.diagnostics.full.page import LIMIT, number, ratio, render, table

ENVIRONMENT = {
    "tomoe_vllm": "0.1.0", "python": "3.12.3", "torch": "2.11.0+cu128", "triton": "triton 3.6.0",
    "vllm": "vllm 0.32.0", "transformers": "transformers 5.17.0", "cuda": "12.8", "driver": "570.86",
    "gpus": ["NVIDIA H200"], "compiler": None,
}  # fmt: skip
RATES = {
    "gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 139 << 30, "l2_bytes": 50 << 20,
    "copy_bytes_per_s": 4.01e12, "bfloat16_gemm_flops": 7.2e14, "empty_kernel_us": 1.91, "small_kernel_us": 2.32,
}  # fmt: skip


def facts(results, **fields):
    return {
        "command": "tomoe doctor --full", "environment": ENVIRONMENT, "is_interpreted": False, "limit_s": 480.0,
        "started": "2026-11-28T12:00:00+00:00", "seconds": 431.2, "is_complete": True, "summary": "9 checks, 1 failed",
        "results": results,
    } | fields  # fmt: skip


def result(part, name, values=None, status="passed", reason=None):
    return {"part": part, "name": name, "status": status, "reason": reason, "values": values or {}}


def kernel(path, num_tokens, ms, **fields):
    values = {
        "path": path, "num_tokens": num_tokens, "routing": "random", "dtype": "bfloat16", "limit": 1.5e-2,
        "overall": 4e-3, "worst_row": 7e-3, "error": None, "ms": ms, "dense_ms": 0.1, "roofline_ms": 0.04,
        "layer": "LLaMA-2 7B",
    } | fields  # fmt: skip
    return result("kernels", f"{path}, {num_tokens} tokens", values)


def test_the_head_says_what_ran_where_and_whether_it_failed():
    page = render(facts([result("kernels", "rates of the device", RATES)]))
    head = page.partition("##")[0]
    assert head.startswith("# tomoe doctor --full\n\n**9 checks, 1 failed.** NVIDIA H200, driver 570.86; torch 2.11.0")
    assert "431 s of at most 480 s." in head
    assert "has not ended" not in page
    assert "| kernels | 1 | 0 | 0 |" in head
    assert "4.01 TB/s" in page
    assert "720 TFLOP/s" in page
    assert "1.91 us" in page


def test_an_unfinished_or_interpreted_run_says_so():
    page = render(facts([], is_complete=False, is_interpreted=True))
    assert "The run has not ended" in page
    assert "interpreter, at tiny sizes and without times" in page


def test_failures_with_one_reason_are_one_line():
    broken = [result("kernels", f"route, {n} tokens", status="failed", reason="no such\nmodule") for n in (1, 2, 3)]
    skipped = [result("engine", "vLLM, fused", status="not run", reason="out of time")]
    page = render(facts([*broken, *skipped]))
    assert "## Failed\n\n- 3 checks, route, 1 tokens ... route, 3 tokens: no such module\n" in page
    assert "## Not run\n\n- vLLM, fused: out of time\n" in page


def test_times_are_beside_those_of_the_dense_mlp():
    results = [
        kernel("dense", 1, 0.1),
        kernel("gather", 1, 0.05),
        kernel("grouped", 1024, 0.08),
        kernel("route", 1, 0.003),
    ]
    page = render(facts(results))
    assert "| 1 | 0.100 | 0.0500 (2.00 x) | 80% | 0.100 (1.00 x) | 40% |  |  |" in page
    assert "| 1,024 | 0.100 |  |  |  |  | 0.0800 (1.25 x) | 50% |" in page
    assert "| 1 | 3.00 |  |  |" in page, "microseconds of route"
    assert "| LLaMA-2 7B, bfloat16, grouped | 1 | 7.0e-03 | 1.5e-02 |" in page


def test_engines_are_beside_the_dense_engine():
    def engine(layout, name, **values):
        return result("engine", f"vLLM, {layout}: {name}", values | {"layout": layout})

    def decode(layout, ms, path):
        return engine(layout, "decode", rows=[{"batch": 16, "step_ms": ms, "path": path}])

    start = {"start_s": 31.0, "compilation_mode": "3", "cuda_graphs": "FULL", "runner": "vllm.v1.worker.gpu"}
    results = [
        engine("dense", "starts", **start), decode("dense", 2.0, None), decode("shared", 1.6, "shared_gather"),
        engine("shared", "decode agrees with HF", tokens=80, median_difference=1e-2, median_of_hf_bfloat16=9e-3,
               median_limit=2.7e-2, same_choice_as_float32="78 of 80"),
        engine("shared", "kernels of a step", rows=[{"batch": 16, "kernels": 350.0, "gpu_ms": 1.5}]),
        engine("fused", "starts"),
    ]  # fmt: skip
    page = render(facts(results))
    assert "| 16 | 2.00 | 1.60 (1.25 x), shared_gather |" in page
    assert "| shared, decode, median | 80 | 1.0e-02 | 9.0e-03 | 2.7e-02 |" in page
    assert "| shared, batch 16 | 350 | 1.50 |" in page


def test_losses_are_beside_those_of_the_cpu():
    values = {
        "cpu": {"losses": [2.5, 2.25], "perplexity": 400.0}, "device": {"losses": [2.5, 2.251], "perplexity": 401.0},
        "device_type": "cuda", "relative_difference": 2.5e-3,
    }  # fmt: skip
    page = render(facts([result("training", "training steps", values)]))
    assert "| step 2 | 2.25000 | 2.25100 |" in page
    assert "| perplexity of the export | 400.000 | 401.000 |" in page


def test_a_page_fits_into_a_comment():
    many = [result("engine", f"vLLM {i}", status="failed", reason=f"{i} " * 900) for i in range(60)]
    page = render(facts(many))
    assert len(page) < LIMIT + 100
    assert page.endswith("report.json has all results.)\n")


def test_a_page_without_results_is_short():
    assert len(render(facts([])).splitlines()) < 40


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0123456, "0.0123"),
        (12.0, "12.0"),
        (350.0, "350"),
        (12345.6, "12,346"),
        (0.0, "0.00"),
        ("nan", "nan"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_ratio_needs_both_times():
    assert ratio(2.0, 1.0) == "1.00 (2.00 x)"
    assert ratio(None, 1.0) == "1.00"
    assert ratio(2.0, None) == ""


def test_cells_cannot_break_a_table():
    assert table(["a", "b"], [["x|y", 1]]).splitlines()[-1] == "| x\\|y | 1 |"
