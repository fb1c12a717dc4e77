"""The playground in Chromium: key, chat, colours, slider, heat map, gauges, keyboard and contrast.

The model is tiny and random, and its tokens are words. The experts that the page shows are compared with the routes of
the Hugging Face reference.
"""

import re
from collections import Counter

import numpy as np
import pytest
from tomoe_serving.api.compute_budget import Budget

from tests.deploy.test_manifests import dashboard_metrics
from tests.helpers.browser import CHROMIUM, CONTRAST, accessible_nodes, chromium
from tests.helpers.routes import reference_routes
from tests.helpers.tiny_models import NUM_EXPERTS
from tests.serving.conftest import KEY
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]

WAIT_MS = 120_000
BUDGET = {
    "model": "tiny",
    "cost": {
        "active_parameters": 94_000_000, "total_parameters": 134_500_000, "active_ratio": 0.7, "flops_per_token": 188e6,
        "read_parameters_per_token": {"shared": 94_000_000, "masked": 134_500_000}, "weight_bytes_per_token": 376e6,
        "kv_bytes_per_token": {"dense": 46_080, "padded": 40_320},
    },
    "step_time": None,
    "capacity": {
        "max_sequences": 16, "max_step_tokens": 2048, "queue_size": 256, "kv_tokens": 20_000, "tpot_slo_ms": None,
        "tokens_per_s": 180.4,
    },
    "in_use": {
        "running": 3, "waiting": 1, "refused": {}, "kv_usage": 0.25, "kv_reserved_tokens": 500,
        "observed_tpot_ms": 41.5, "is_draining": False,
    },
}  # fmt: skip
"""Response of /v1/tomoe/budget for a larger model; the counts of the tiny one are too small for units."""


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(context, server):
    """The open page with the key entered. Fails afterwards on requests to other hosts and on errors in the console."""
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security" in line.text else None)
    page.goto(f"{server.url}/")
    enter_key(page, KEY)
    page.wait_for_selector("#legend li", timeout=WAIT_MS)
    yield page
    page.close()
    assert requests
    assert [url for url in requests if not url.startswith(f"{server.url}/")] == []
    assert errors == []


def enter_key(page, key: str) -> None:
    page.fill("#key", key)
    page.press("#key", "Enter")


def get(server, path: str) -> dict:
    with server.client() as client:
        return client.get(path).raise_for_status().json()


def ask(page, text: str, num_tokens: int = 24) -> str:
    """Send a message and wait for the coloured answer; returns the trace's id."""
    page.fill("#max-tokens", str(num_tokens))
    page.fill("#temperature", "0")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
    page.wait_for_selector(".message:last-child details:not([hidden])", timeout=WAIT_MS)
    tokens = page.locator(".message:last-child .answer [data-index]").count()
    page.wait_for_function(
        "n => document.querySelectorAll('.message:last-child .answer [data-expert]').length >= n - 1",
        arg=tokens,
        timeout=WAIT_MS,
    )
    return sent.value.post_data_json["vllm_xargs"]["tomoe_trace"]


def greedy_tokens(server, text: str, num_tokens: int = 24) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer that :func:`ask` gets; greedy decoding repeats it."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": num_tokens}
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body | {"return_token_ids": True}).raise_for_status().json()
    return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


def shown_experts(page) -> list[int | None]:
    script = "all => all.map(span => span.dataset.expert === undefined ? null : Number(span.dataset.expert))"
    return page.locator(".answer [data-index]").evaluate_all(script)


def move_slider(page, layer: int) -> None:
    page.focus("#layer")
    page.keyboard.press("Home")
    for _ in range(layer):
        page.keyboard.press("ArrowRight")


def test_every_token_has_the_colour_of_the_reference_expert(page, server, served_model):
    ask(page, "w1 w20 w45 w7 w80")
    prompt, tokens = greedy_tokens(server, "w1 w20 w45 w7 w80")
    assert len(tokens) > 8
    assert len(shown_experts(page)) == len(tokens)
    model = MODEL_CLASSES["llama"].from_pretrained(served_model)
    routes = reference_routes(model, prompt + tokens)[len(prompt) :]
    seen = []
    for layer in range(routes.shape[1]):
        move_slider(page, layer)
        seen.append(shown_experts(page))
        assert seen[-1][:-1] == routes[:-1, layer].tolist()
        assert seen[-1][-1] is None  # the last token is never fed back
    assert seen[0] != seen[1] != seen[2]
    fills = page.locator(".answer [data-expert]").evaluate_all(
        "all => all.map(s => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(fills)) == len({expert for expert in seen[-1] if expert is not None}) > 1


def test_heat_map_shows_the_counts_of_the_server(page, server):
    ask(page, "w3 w9")
    page.wait_for_timeout(3500)  # the page refreshes every 2 s, the server at most once a second
    report = get(server, "/v1/tomoe/experts")
    cells = page.locator(".heat tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].slice(1).map(c => c.innerText))"
    )
    shares = np.array([[float(text.split()[0]) for text in row] for row in cells]) / 100
    tokens = np.array(report["tokens"])
    assert shares.shape == (NUM_EXPERTS, tokens.shape[0])
    np.testing.assert_allclose(shares, (tokens / tokens.sum(axis=1, keepdims=True)).T, atol=6e-4)
    layer = int(page.input_value("#layer"))
    assert f"{report['load_imbalance'][layer]:.2f} × the mean" in page.inner_text("#heat")
    page.locator(".heat tbody tr:first-child td").nth(2).click()
    assert page.input_value("#layer") == "2"


def test_gauges_show_the_latency(page):
    ask(page, "w3 w9")
    for gauge in ("#ttft", "#tpot"):
        assert re.fullmatch(r"\d+(\.\d+)? ?m?s", page.inner_text(gauge).replace("\n", "")), page.inner_text(gauge)
    assert int(page.inner_text("#num-tokens")) == page.locator(".answer [data-index]").count()
    assert page.locator("#sparkline rect").count() == int(page.inner_text("#num-tokens")) - 1


def test_budget_is_that_of_the_server(page, server):
    page.wait_for_selector("#budget meter", timeout=WAIT_MS)
    budget = server.budget()
    share = budget["cost"]["active_parameters"] / budget["cost"]["total_parameters"]
    text = page.inner_text("#budget")
    assert f"({share:.0%})".replace("%", " %") in text
    assert f"0 of {budget['capacity']['max_sequences']}, 0" in text
    assert page.locator("#budget meter").first.evaluate("meter => meter.value") == pytest.approx(share, abs=1e-3)


def test_missing_budget_is_shown_as_not_available(page):
    page.route("**/v1/tomoe/budget", lambda route: route.fulfill(status=404, json={"error": "Not Found"}))
    page.wait_for_selector("#budget :text-is('Not available')", timeout=WAIT_MS)


def test_budget_of_a_larger_model_has_units(page):
    answer = Budget.model_validate(BUDGET).model_dump()
    page.route("**/v1/tomoe/budget", lambda route: route.fulfill(json=answer))
    page.wait_for_selector("#budget :text('94M')", timeout=WAIT_MS)
    text = page.inner_text("#budget")
    for expected in (
        "94M of 135M (70 %)",
        "188M FLOP",
        "376 MB",
        "40.3 kB to 46.1 kB",
        "180 tokens/s",
        "3 of 16, 1",
        "41.5 ms",
    ):
        assert expected in text
    assert page.locator("#budget meter").first.evaluate("meter => meter.value") == pytest.approx(0.699, abs=1e-3)


def test_page_works_with_the_keyboard_alone(page):
    page.focus("#prompt")
    page.keyboard.type("w5 w6 w7")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("w8")
    assert page.input_value("#prompt") == "w5 w6 w7\nw8"
    page.keyboard.press("Enter")
    page.wait_for_selector("details:not([hidden])", timeout=WAIT_MS)
    page.wait_for_selector(".answer [data-expert]", timeout=WAIT_MS)
    page.focus("#layer")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if reached[-1] == "answer":
            break
    assert reached[-1] == "answer", reached
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    said = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        said.append(page.inner_text("#token-info"))
    assert all(re.fullmatch(r"Token \d+, “.*”: layer \d+, expert \d+", text) for text in said), said
    assert len(set(said)) == 3
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("td:has-text('never fed back')", timeout=WAIT_MS)
    rows = page.locator(".tokens tbody tr").evaluate_all("rows => rows.map(r => [...r.cells].map(c => c.innerText))")
    assert [row[2] for row in rows[:-1]] == [str(expert) for expert in shown_experts(page)[:-1]]
    assert rows[-1][2] == "none: never fed back to the model"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ask(page, "w1 w2 w3")
    page.locator(".answer [data-index]").first.hover()
    page.locator("summary").click()
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 60
    assert [text for text in texts if text["ratio"] < text["least"]] == []
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", lightness)[0]) < 100) == (scheme == "dark")


def test_contrast_check_catches_grey_on_grey(page):
    page.evaluate("document.getElementById('model').style.setProperty('color', '#8a8a8a')")
    assert [text["text"] for text in page.evaluate(CONTRAST) if text["ratio"] < text["least"]] == [
        page.inner_text("#model")
    ]


def test_every_focusable_node_has_a_name(page):
    ask(page, "w1 w2 w3")
    nodes = accessible_nodes(page)
    focusable = [node for node in nodes if node["focusable"] == "True" and node["role"] != "RootWebArea"]
    assert len(focusable) > 8
    assert [node for node in focusable if not node["name"]] == []
    roles = {node["role"] for node in nodes}
    assert {"main", "banner", "heading", "slider", "textbox", "spinbutton", "log", "status", "table"} <= roles
    assert next(node["name"] for node in nodes if node["role"] == "heading") == "ToMoE playground"
    ids = page.locator("[id]").evaluate_all("all => all.map(node => node.id)")
    assert len(ids) == len(set(ids))
    structure = page.evaluate("[document.documentElement.lang, document.title, document.querySelectorAll('h1').length]")
    assert structure == ["en", "ToMoE playground", 1]
    assert page.locator("#transcript").get_attribute("role") == "log"
    assert page.locator(".answer").get_attribute("aria-busy") == "false"
    assert page.inner_text("#status").startswith("Answer complete. ")


def test_page_asks_for_a_required_key(context, server):
    page = context.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request))  # playwright marks what it calls: no builtin
    page.goto(f"{server.url}/")
    with page.expect_response(lambda response: response.status == 401):
        enter_key(page, "wrong")
    assert page.locator("#key").is_visible()
    enter_key(page, KEY)
    page.wait_for_selector("#legend li", timeout=WAIT_MS)
    assert page.locator("#key").is_hidden()
    keys = [request.headers.get("authorization") for request in requests if "/v1/" in request.url]
    assert keys[:3] == [None, "Bearer wrong", f"Bearer {KEY}"]
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
    page.close()


def test_every_metric_of_the_dashboard_is_on_metrics(page, server):
    ask(page, "w1 w2 w3")
    ask(page, "w4")
    with server.client() as client:
        exposed = client.get("/metrics").raise_for_status().text
    samples = Counter(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", exposed, re.MULTILINE))
    assert dashboard_metrics() - set(samples) == set()
    layers = 3
    expected = {
        "tomoe_expert_tokens_total": layers * NUM_EXPERTS,
        "tomoe_expert_load_imbalance": layers,
        "tomoe_neuron_union_ratio": layers,
        "tomoe_step_path_total": len(get(server, "/v1/tomoe/experts")["step_paths"]),
    }
    assert {name: samples[name] for name in expected} == expected


def test_stopped_answer_keeps_its_tokens(page):
    page.fill("#max-tokens", "200")
    page.fill("#prompt", "w11 w12")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer [data-index]", timeout=WAIT_MS)
    if page.locator("#stop").is_visible():
        page.click("#stop")
    page.wait_for_selector("details:not([hidden])", timeout=WAIT_MS)
    assert page.locator("#send").is_enabled()
    page.click("#clear")
    assert page.locator(".message").count() == 0
    assert page.locator("#welcome").is_visible()
