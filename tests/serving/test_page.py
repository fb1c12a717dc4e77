"""The playground in a real Chromium on a live server: chat, colours, slider, heat map, gauges, keyboard, contrast.

The model is tiny and random, its tokens are words: what the page says of an expert is compared with the routes of the
Hugging Face reference.
"""

import json
import re
import urllib.request

import numpy as np
import pytest

from serving.budget import Budget
from tests.helpers.browser import CHROMIUM, CONTRAST, accessible_nodes, chromium
from tests.helpers.dense_models import word_tokenizer
from tests.helpers.expert_server import running
from tests.helpers.routes import reference_routes
from tests.helpers.tiny_models import NUM_EXPERTS, save_tiny_model
from tests.serving.test_deploy import dashboard_metrics

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
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
"""What /v1/tomoe/budget answers, checked against the server's own model: this launcher has no such route."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "tiny"
    model = save_tiny_model(folder, "llama", seed=5)
    tokenizer = word_tokenizer(adds_bos=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def address(model_folder):
    flags = "--max-model-len", "512", "--max-num-seqs", "4", "--num-gpu-blocks-override", "64"
    with running(model_folder[1], *flags, "--served-model-name", "tiny") as address:
        yield address


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(context, address):
    """The open page; afterwards nothing may have been asked of another host, and nothing complained."""
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if "Content Security" in line.text else None)
    page.goto(f"{address}/")
    page.wait_for_selector("#legend li", timeout=WAIT_MS)
    yield page
    page.close()
    assert requests
    assert [url for url in requests if not url.startswith(f"{address}/")] == []
    assert complaints == []


def get(address: str, path: str) -> dict:
    return json.load(urllib.request.urlopen(f"{address}{path}", timeout=60))


def ask(page, text: str, num_tokens: int = 24) -> str:
    """Send a message and wait for the coloured answer; the trace's id."""
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


def greedy_tokens(address: str, text: str, num_tokens: int = 24) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer that :func:`ask` gets: greedy, so it is the same again."""
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": num_tokens,
        "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=120))
    return answer["prompt_token_ids"], answer["choices"][0]["token_ids"]


def shown_experts(page) -> list[int | None]:
    script = "all => all.map(span => span.dataset.expert === undefined ? null : Number(span.dataset.expert))"
    return page.locator(".answer [data-index]").evaluate_all(script)


def move_slider(page, layer: int) -> None:
    page.focus("#layer")
    page.keyboard.press("Home")
    for _ in range(layer):
        page.keyboard.press("ArrowRight")


def test_every_token_has_the_colour_of_the_references_expert(page, address, model_folder):
    ask(page, "w1 w20 w45 w7 w80")
    prompt, tokens = greedy_tokens(address, "w1 w20 w45 w7 w80")
    assert len(tokens) > 8
    assert len(shown_experts(page)) == len(tokens)
    routes = reference_routes(model_folder[0], prompt + tokens)[len(prompt) :]
    seen = []
    for layer in range(routes.shape[1]):
        move_slider(page, layer)
        seen.append(shown_experts(page))
        assert seen[-1][:-1] == routes[:-1, layer].tolist()
        assert seen[-1][-1] is None  # the last token was never fed back
    assert seen[0] != seen[1] != seen[2]
    fills = page.locator(".answer [data-expert]").evaluate_all(
        "all => all.map(s => getComputedStyle(s).backgroundColor)"
    )
    assert len(set(fills)) == len({expert for expert in seen[-1] if expert is not None}) > 1


def test_heat_map_shows_what_the_server_counted(page, address):
    ask(page, "w3 w9")
    page.wait_for_timeout(3500)  # the page asks every two seconds, the server counts at most once a second
    report = get(address, "/v1/tomoe/experts")
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


def test_gauges_measure_and_say_what_is_not_available(page):
    assert page.inner_text("#budget") == "Not available"
    ask(page, "w3 w9")
    for gauge in ("#ttft", "#tpot"):
        assert re.fullmatch(r"\d+(\.\d+)? ?m?s", page.inner_text(gauge).replace("\n", "")), page.inner_text(gauge)
    assert int(page.inner_text("#num-tokens")) == page.locator(".answer [data-index]").count()
    assert page.locator("#sparkline rect").count() == int(page.inner_text("#num-tokens")) - 1


def test_budget_is_shown_where_the_server_has_one(page):
    answer = Budget.model_validate(BUDGET).model_dump()
    page.route("**/v1/tomoe/budget", lambda route: route.fulfill(json=answer))
    page.wait_for_selector("#budget meter", timeout=WAIT_MS)
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


def test_keyboard_alone_is_enough(page):
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


def test_everything_that_can_be_reached_has_a_name(page):
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


def test_page_asks_for_a_key_where_the_server_wants_one(context, address):
    page = context.new_page()
    asked = []

    def guard(route):
        asked.append(route.request.headers.get("authorization"))
        if asked[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "Unauthorized"})

    page.route("**/v1/**", guard)
    page.goto(f"{address}/")
    page.wait_for_selector("#key", state="visible", timeout=WAIT_MS)
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.wait_for_selector("#legend li", timeout=WAIT_MS)
    assert page.locator("#key").is_hidden()
    assert asked[0] is None
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
    page.close()


def test_every_metric_of_the_dashboard_is_on_metrics(page, address):
    ask(page, "w1 w2 w3")
    ask(page, "w4")
    exposed = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
    samples = set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", exposed, re.MULTILINE))
    assert dashboard_metrics() - samples == set()
    own = [line for line in exposed.splitlines() if line.startswith("tomoe_")]
    layers, experts = 3, NUM_EXPERTS
    assert len(own) == layers * experts + 2 * layers + len(get(address, "/v1/tomoe/experts")["step_paths"])


def test_stopped_answer_keeps_what_came(page):
    page.fill("#max-tokens", "400")
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
