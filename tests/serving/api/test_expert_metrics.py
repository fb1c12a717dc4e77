from prometheus_client.parser import text_string_to_metric_families
from tomoe_serving.api.expert_metrics import exposition
from tomoe_serving.api.expert_reports import merge_counts

from tests.serving.api.test_expert_reports import TWO_STAGES, counts


def test_metrics_are_valid_and_have_help():
    families = {f.name: f for f in text_string_to_metric_families(exposition(merge_counts(TWO_STAGES)).decode())}
    assert set(families) == {
        "tomoe_expert_tokens", "tomoe_expert_load_imbalance", "tomoe_neuron_union_ratio", "tomoe_step_path",
    }  # fmt: skip
    assert all(len(family.documentation) > 40 for family in families.values())
    tokens = {(s.labels["layer"], s.labels["expert"]): s.value for s in families["tomoe_expert_tokens"].samples}
    assert tokens["1", "0"] == 8
    assert tokens["0", "3"] == 2
    assert families["tomoe_expert_tokens"].samples[0].name == "tomoe_expert_tokens_total"
    paths = {s.labels["path"]: s.value for s in families["tomoe_step_path"].samples}
    assert paths == {"shared_packed": 1, "shared_streamed": 2}


def test_ratios_are_omitted_before_the_first_token():
    text = exposition(merge_counts([counts(0, 0, [[0, 0, 0, 0]], [0.0])])).decode()
    assert "tomoe_expert_load_imbalance{" not in text
    assert 'tomoe_expert_tokens_total{expert="0",layer="0"} 0.0' in text
