"""The machine code of the micro-kernels, for other CPUs too."""

import json
import math
import platform
import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.processes import python

REPOSITORY = Path(__file__).resolve().parents[2]
LARGEST = {
    "AVX512": {"dot_tile<4, 6>", "dot_tile<1, 12>", "transposed_tile<4, 6>", "down_tile<6, 4, true, false>"},
    "AVX2": {"dot_tile<3, 4>", "dot_tile<1, 8>", "transposed_tile<2, 6>", "down_tile<1, 12, false, false>"},
}
TOO_LARGE = {"AVX2": "down_tile<3, 4,"}
"""12 sums, 4 vectors of weights and a factor: one more than there are registers, but the fastest for 3 tokens."""

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump") or not shutil.which("g++"),
    reason="needs x86, g++ and objdump",
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", LARGEST)
def test_sums_of_a_micro_kernel_stay_in_registers(isa):
    result = python(REPOSITORY / "benchmarks" / "tile_code.py", "--isa", isa)
    assert result.returncode == 0, result.stderr
    tiles = json.loads(result.stdout.splitlines()[-1])["tiles"]
    assert LARGEST[isa] <= {loop["tile"] for loop in tiles}
    for loop in tiles:
        sizes = [int(size) for size in re.findall(r"\d+", loop["tile"])]
        assert loop["multiply_adds"] == math.prod(sizes), loop
        assert loop["on_stack"] == 0 or loop["tile"].startswith(TOO_LARGE.get(isa, " ")), loop


@pytest.mark.process
def test_an_instruction_set_without_micro_kernels_is_refused():
    result = python(REPOSITORY / "benchmarks" / "tile_code.py", "--isa", "SSE2")
    assert result.returncode == 2
    assert "invalid choice: 'SSE2'" in result.stderr
