"""``python -m tests.helpers.pretended_gpu train ...``: the command ``tomoe`` on the pretended GPU, also under torchrun.

With PRETENDED_GPU_REPORT=FOLDER each process writes what its device had: FOLDER/<rank>.json with ``peak_bytes``.
"""

import json
import os
from pathlib import Path

import torch

from tests.helpers.pretended_gpu import pretended_gpu
from tomoe_vllm import cli


def main() -> None:
    with pretended_gpu() as device:
        try:
            cli.main()
        finally:
            folder = os.environ.get("PRETENDED_GPU_REPORT")
            if folder:
                report = {"peak_bytes": torch.gpu.max_memory_allocated(device)}
                (Path(folder) / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
