import pytest
from tomoe_serving.server.settings import hash_key, load_settings, nearest

KEY_HASH = hash_key("secret")


def test_flags_go_over_environment_over_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("port: 1\nqueue_size: 2\ndrain-timeout: 3\n")
    environment = {"TOMOE_QUEUE_SIZE": "20", "TOMOE_DRAIN_TIMEOUT": "30"}
    settings = load_settings(["model", "--config", str(file), "--drain-timeout", "300"], environment)
    assert (settings.port, settings.queue_size, settings.drain_timeout) == (1, 20, 300)


def test_toml_is_read_too(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('checkpoint = "model"\nallowed_origins = ["https://a"]\n')
    settings = load_settings([], {"TOMOE_CONFIG": str(file)})
    assert (str(settings.checkpoint), settings.allowed_origins) == ("model", ["https://a"])


def test_defaults_are_closed():
    settings = load_settings(["model"], {})
    assert settings.host == "127.0.0.1"
    assert settings.allowed_origins == settings.api_keys == []
    assert not settings.log_prompts


def test_what_follows_the_dashes_is_for_vllm():
    assert load_settings(["model", "--port", "9", "--", "--dtype", "half", "-O0"], {}).engine_args == [
        "--dtype", "half", "-O0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "folder is missing"),
        (["model", "--prot", "1"], {}, "did you mean --port?"),
        (["model", "--max-model-len", "1"], {}, "flags for vLLM go after --"),
        (["model"], {"TOMOE_QUEUE_SISE": "1"}, "did you mean TOMOE_QUEUE_SIZE?"),
        (["model", "--port", "70000"], {}, "less than or equal to 65535, got '70000'"),
        (["model", "--tpot-slo-ms", "0"], {}, "greater than 0"),
        (["model", "--tls-cert", "x"], {}, "both --tls-cert and --tls-key"),
        (["model", "--", "--port", "1"], {}, "before the --"),
        (["model", "--", "--api_key=x"], {}, "before the --"),
        (["model", "other"], {}, "other"),
        (["model", "--config"], {}, "needs a file"),
        (["model", "--config", "/nowhere.yaml"], {}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(arguments, environment, said):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_settings(arguments, environment)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "unknown setting prot (did you mean port?)"),
        ("- a", "names and values"),
        ("a: [", "not valid"),
        ("api_keys: secret", "must be hashes"),
        (f"api_keys: [{KEY_HASH}, other]", "must be hashes"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_settings(["model", "--config", str(file)], {})
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_keys_are_kept_as_hashes_only(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"api_keys: ['{KEY_HASH}']")
    from_file = load_settings(["model", "--config", str(file)], {})
    from_environment = load_settings(["model"], {"TOMOE_API_KEYS": "secret, other"})
    from_flags = load_settings(["model", "--api-keys", "secret", "--api-keys", "other"], {})
    assert from_file.api_keys == [KEY_HASH]
    assert from_environment.api_keys == from_flags.api_keys == [KEY_HASH, hash_key("other")]
    assert "secret" not in repr(from_environment)


def test_kubernetes_service_links_are_no_settings():
    links = {"TOMOE_SERVICE_HOST": "1", "TOMOE_PORT": "tcp://1:2", "TOMOE_PORT_80_TCP_ADDR": "1"}
    assert load_settings(["model"], links).port == 8000


def test_help_ends_with_success(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], {})
    assert not caught.value.code
    assert "--tpot-slo-ms" in capsys.readouterr().out


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zzz", ["port"]) == ""


def test_expert_statistics_can_be_switched_off():
    assert load_settings(["model"], {}).expert_statistics
    assert not load_settings(["model", "--no-expert-statistics"], {}).expert_statistics
