from pathlib import Path

import pytest
from tomoe_serving.server.memory import free_memory, require_memory


def test_weights_larger_than_memory_are_refused():
    with pytest.raises(ValueError, match=r"needs 4\.0 GiB .* 1\.0 GiB are free"):
        require_memory(Path("model"), 4 << 30, 1 << 30)
    require_memory(Path("model"), 1 << 30, 1 << 30)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "3000", "memory.current": "1000"}, 2000),
        ({"memory/memory.limit_in_bytes": "500", "memory/memory.usage_in_bytes": "100"}, 400),
    ],
)
def test_control_group_limits_memory(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == free


def test_without_a_limit_the_memory_of_the_machine_counts(tmp_path):
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(tmp_path) > 1 << 20
