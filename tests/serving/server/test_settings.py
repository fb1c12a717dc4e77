"""Settings of ``tomoe serve``: precedence, one-line errors, API keys, and the command line that gives them."""

import os

import pytest
import tomoe_serving.server.settings
import typer
from tomoe_serving.server.settings import ServerSettings, hash_key, load_settings

KEY_HASH = hash_key("secret")


@pytest.fixture
def serve(run_cli, monkeypatch):
    """``serve(arguments, environment)``: the settings of ``tomoe serve`` or, for misuse, its line on stderr."""

    def run(arguments, environment) -> ServerSettings | str:
        for name in os.environ:
            if name.startswith("TOMOE_"):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        found = []

        def load(*sources):
            found.append(load_settings(*sources))
            raise typer.Exit

        monkeypatch.setattr(tomoe_serving.server.settings, "load_settings", load)
        code, out, err = run_cli("serve", *arguments)
        assert (code, out, err.count("\n")) == ((0, "", 0) if found else (2, "", 1)), err
        return found[0] if found else err

    return run


def test_flags_override_the_environment_and_that_the_file(serve, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("port: 1\nqueue_size: 2\ndrain-timeout: 3\n")
    environment = {"TOMOE_QUEUE_SIZE": "20", "TOMOE_DRAIN_TIMEOUT": "30"}
    settings = serve(["model", "--config", str(file), "--drain-timeout", "300"], environment)
    assert (settings.port, settings.queue_size, settings.drain_timeout) == (1, 20, 300)


def test_toml_is_read_too(serve, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('checkpoint = "model"\nallowed_origins = ["https://a"]\n')
    settings = serve([], {"TOMOE_CONFIG": str(file)})
    assert (str(settings.checkpoint), settings.allowed_origins) == ("model", ["https://a"])


def test_defaults_are_closed(serve):
    settings = serve(["model"], {})
    assert settings.host == "127.0.0.1"
    assert settings.allowed_origins == settings.api_keys == []
    assert not settings.log_prompts


def test_words_after_the_dashes_are_for_vllm(serve):
    assert serve(["model", "--port", "9", "--", "--dtype", "half", "-O0"], {}).engine_args == [
        "--dtype", "half", "-O0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [("--engine-args", "--dtype half -O0"), ("--engine-args=--dtype half", "--engine-args=-O0")]
)
def test_the_flag_for_vllm_is_split_at_spaces(serve, arguments):
    assert serve(["model", *arguments], {}).engine_args == ["--dtype", "half", "-O0"]
    assert "before the --" in serve(["model", "--engine-args", "--port 1"], {})


def test_bare_dashes_keep_the_flags_of_the_environment(serve):
    environment = {"TOMOE_ENGINE_ARGS": "--dtype half"}
    assert serve(["model", "--"], environment).engine_args == ["--dtype", "half"]
    assert serve(["model", "--", "-O0"], environment).engine_args == ["-O0"]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "checkpoint is missing: Folder of"),
        (["model", "--prot", "1"], {}, "--port"),
        (["model", "--max-model-len", "1"], {}, "flags for vLLM go after --"),
        (["model"], {"TOMOE_QUEUE_SISE": "1"}, "did you mean 'TOMOE_QUEUE_SIZE'?"),
        (["model", "--port", "70000"], {}, "port is 70000; it must be at most 65535"),
        (["model", "--tpot-slo-ms", "0"], {}, "greater than 0"),
        (["model", "--tls-cert", "x"], {}, "both --tls-cert and --tls-key"),
        (["model", "--", "--port", "1"], {}, "before the --"),
        (["model", "--", "--api_key=x"], {}, "before the --"),
        (["model", "other"], {}, "other"),
        (["model", "--set", "prot=1"], {}, "unknown setting 'prot'; did you mean 'port'?"),
        (["model"], {"TOMOE_PORT": "abc"}, "port is 'abc'; it must be a valid integer"),
        (["model", "--set", "api_keys={secret: 1}"], {}, "api_keys must be a valid list"),
        (["model", "--config"], {}, "'--config' requires an argument"),
        (["model", "--config", "/nowhere.yaml"], {}, "no such configuration file: /nowhere.yaml"),
    ],
)
def test_misuse_is_one_line(arguments, environment, said, serve):
    assert said in serve(arguments, environment)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "unknown setting 'prot'; did you mean 'port'?"),
        ("- a", "names and values"),
        ("a: [", "not valid YAML"),
        ("api_keys: secret", "must be hashes"),
        ("api_keys: 5", "must be hashes"),
        (f"api_keys: {KEY_HASH},other", "must be hashes"),
        (f"api_keys: [{KEY_HASH}, other]", "must be hashes"),
    ],
)
def test_a_wrong_file_is_one_line(text, said, serve, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = serve(["model", "--config", str(file)], {})
    assert said in message
    assert "secret" not in message


def test_keys_are_kept_as_hashes_only(serve, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"api_keys: ['{KEY_HASH}']")
    from_file = serve(["model", "--config", str(file)], {})
    from_environment = serve(["model"], {"TOMOE_API_KEYS": "secret, other"})
    from_flags = serve(["model", "--api-keys", "secret", "--api-keys", "other"], {})
    assert from_file.api_keys == [KEY_HASH]
    assert from_environment.api_keys == from_flags.api_keys == [KEY_HASH, hash_key("other")]
    assert "secret" not in repr(from_environment)


def test_kubernetes_service_links_are_no_settings():
    links = {"TOMOE_SERVICE_HOST": "1", "TOMOE_PORT": "tcp://1:2", "TOMOE_PORT_80_TCP_ADDR": "1"}
    assert load_settings({"checkpoint": "model"}, environment=links).port == 8000


def test_help_lists_every_setting(run_cli):
    code, out, _ = run_cli("serve", "--help")
    assert code == 0
    for name in ServerSettings.model_fields:
        assert name == "checkpoint" or f"--{name.replace('_', '-')}" in out
    assert [name for name, field in ServerSettings.model_fields.items() if not field.description] == []


def test_expert_statistics_can_be_switched_off(serve):
    assert serve(["model"], {}).expert_statistics
    assert not serve(["model", "--no-expert-statistics"], {}).expert_statistics


def test_assignments_override_flags(serve):
    assert serve(["model", "--port", "1", "--set", "port=2"], {}).port == 2
