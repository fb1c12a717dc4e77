import json

from tomoe_serving.middleware.usage import UsageMiddleware

from tests.helpers.asgi import ask, json_app, stream_app

USAGE = {"prompt_tokens": 1, "completion_tokens": 2}
HEADERS = {"X-ToMoE-Usage": "active-parameters"}


def test_usage_of_a_response_gets_the_field():
    app = UsageMiddleware(json_app({"usage": USAGE, "text": "é"}), active_parameters=7, always=False)
    assert ask(app).json() == {"usage": USAGE, "text": "é"}
    assert ask(app, headers=HEADERS).json() == {"usage": USAGE | {"active_parameters_per_token": 7}, "text": "é"}


def test_usage_of_the_responses_api_gets_the_field():
    app = UsageMiddleware(json_app({"response": {"usage": USAGE}}), active_parameters=7, always=True)
    assert ask(app).json()["response"]["usage"]["active_parameters_per_token"] == 7


def test_usage_of_a_stream_gets_the_field_for_any_split_of_the_bytes():
    events = [b'data: {"choices": [{"text": "usage \\n\\n"}]}\n\n', b'data: {"usage": null}\n\n']
    events += [b'event: x\ndata: {"usage": {"prompt_tokens": 1}}\n\n', b"data: [DONE]\n\n"]
    whole = b"".join(events)
    for cut in (events, [whole], [whole[:70], whole[70:105], whole[105:]], [bytes([byte]) for byte in whole]):
        text = ask(UsageMiddleware(stream_app(cut), active_parameters=7, always=True)).text
        data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        assert json.loads(data[0])["choices"][0]["text"] == "usage \n\n"
        assert json.loads(data[2]) == {"usage": {"prompt_tokens": 1, "active_parameters_per_token": 7}}
        assert data[3] == "[DONE]"
        assert text.count("\n\n") == 4
