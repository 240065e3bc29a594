"""The judge client against a real local HTTP server that answers, delays, drops connections, and sends errors and nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
from judge_server import KEY, Said, Server, completion, serving

from spilt import judges
from spilt.artifacts.manifest import identity
from spilt.errors import UserError
from spilt.judges import endpoint
from spilt.judges.base import reply_of
from spilt.judges.endpoint import Endpoint
from spilt.terminal import without_secrets

pytest.importorskip("openai", reason="pip install 'spilt[judge]'")

GOOD = Said(completion("Fine.\nRating: 3"))
# what the server does when it is asked this the n-th time
SCRIPT = {
    "answers": [GOOD],
    "later": [Said(completion("late\nRating: 2"), delay=0.3)],
    "drops once": [Said(None), GOOD],
    "half a reply once": [Said(completion("Rating: 1"), part=True), GOOD],
    "429 twice": [Said({"error": {"message": f"slow down {KEY}"}}, 429)] * 2 + [GOOD],
    "500 once": [Said(b"<html>oops</html>", 500), GOOD],
    "malformed once": [Said(b'{"choices": [{'), GOOD],
    "not JSON": [Said(b"Rating: 4")],
    "a list": [Said([1, 2])],
    "no choices": [Said({"choices": []})],
    "null": [Said(completion(None))],
    "brackets": [Said(b"[" * 100_000)],
    "always 429": [Said({"error": {"message": KEY}}, 429)],
    "always 500": [Said({}, 500)],
    "always 400": [Said({"error": {"message": f"bad {KEY}"}}, 400)],
    "always drops": [Said(None)],
    "too late": [Said(completion("Rating: 1"), delay=5)],
    "cut short": [Said(completion("I think Rating: 4", finish="length"))],
    "filtered": [Said(completion("", finish="content_filter"))],
    "the key": [Said(completion(f"your key is {KEY}\nRating: 4"))],
    "odd usage": [Said(completion("Rating: 2", read=-5, written="many"))],
    "odd text": [Said(completion("\x1b[2J\u202e{braces} {0} %s \\\nRating: 2\n"))],
}
MISSING = {
    "not JSON": "malformed reply", "a list": "malformed reply", "no choices": "malformed reply", "brackets": "malformed reply",
    "null": "empty reply", "always 429": "HTTP 429", "always 500": "HTTP 500", "always 400": "HTTP 400", "always drops": "no connection",
    "too late": "timed out", "cut short": "reply cut short: raise the rubric's max_tokens", "filtered": "content filter",
}  # fmt: skip
AGAIN = {"malformed reply", "HTTP 429", "HTTP 500", "HTTP 400", "no connection", "timed out"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    def say(text: str, before: int) -> Said:
        return SCRIPT[text][min(before, len(SCRIPT[text]) - 1)]

    with serving(say) as made:
        yield made


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def judge(server: Server, kept: Path | None, **how: float) -> Endpoint:
    return Endpoint("stand-in", server.url, KEY, kept, **{"retries": 2, "seconds": 1.0, "pause": 0.01, **how})  # type: ignore[arg-type]


def test_every_item_ends_scored_or_missing_and_a_rerun_is_free(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    first = judge(server, tmp_path)
    prompts = [asked(text) for text in SCRIPT]
    replies = first.replies(prompts, {"temperature": 0})
    found = dict(zip(SCRIPT, replies, strict=True))
    assert {text: reply.why for text, reply in found.items() if reply.text is None} == MISSING
    assert found["later"].text == "late\nRating: 2" and found["429 twice"].text == found["answers"].text == "Fine.\nRating: 3"
    assert {text for text, reply in found.items() if reply.again} == {text for text, why in MISSING.items() if why in AGAIN}
    assert first.tally.missing.total() == len(MISSING) and first.tally.asked == len(SCRIPT)
    assert all(body["temperature"] == 0 and body["model"] == "stand-in" for body in server.seen)
    assert found["odd usage"][2:4] == (0, 0) and first.tally.read == 11 * sum(reply.read == 11 for reply in replies) > 0

    # nothing that was answered is asked again; what failed is
    before = dict(server.asked)
    again = judge(server, tmp_path, retries=0)
    second = again.replies(prompts, {"temperature": 0})
    assert [reply.text for reply in second] == [reply.text for reply in replies]
    assert {text for text in SCRIPT if server.asked[text] > before[text]} == {text for text, reply in found.items() if reply.again}
    assert again.tally.known == sum(not reply.again for reply in replies)

    # another model, other parameters: other questions
    judge(server, tmp_path).replies([asked("answers")], {"temperature": 1})
    assert server.asked["answers"] == before["answers"] + 1

    # the key: on the wire alone
    said = capfd.readouterr()
    told = "".join(f"{reply.text} {reply.why}" for reply in replies) + str(first.tally) + said.out + said.err + caplog.text
    stored = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert server.keys == {f"Bearer {KEY}"} and KEY not in told and KEY not in stored and "your key is ***" in stored


def test_what_is_kept_is_the_reply_as_it_came_and_damage_is_asked_again(server: Server, tmp_path: Path) -> None:
    one = judge(server, tmp_path)
    assert one.judge([asked("answers")] * 3 + [asked("odd text")]) == ["Fine.\nRating: 3"] * 3 + [
        SCRIPT["odd text"][0].body["choices"][0]["message"]["content"]
    ]
    assert one.tally.asked == 2  # equal prompts once
    (file,) = [path for path in tmp_path.rglob("*.json") if "Fine" in path.read_text()]
    record = json.loads(file.read_text())
    assert json.loads(record["reply"]) == GOOD.body and record["messages"] == asked("answers") and record["model"] == "stand-in"
    for content in ("", "{", "[]", '{"reply": 3}', '{"reply": "{"}'):
        file.write_text(content)
        other = judge(server, tmp_path)
        assert other.judge([asked("answers")]) == ["Fine.\nRating: 3"] and other.tally.asked == 1


def test_two_addresses_with_one_models_name_share_no_replies(tmp_path: Path) -> None:
    with (
        serving(lambda text, before: Said(completion("Rating: 1"))) as one,
        serving(lambda text, before: Said(completion("Rating: 3"))) as two,
    ):
        for _ in range(2):  # the second time nobody is asked
            assert [judge(server, tmp_path).judge([asked("same")]) for server in (one, two)] == [["Rating: 1"], ["Rating: 3"]]
        assert sum(one.asked.values()) == sum(two.asked.values()) == 1
        # a password, and a key in the path, are of the address and stand nowhere
        secret = Endpoint("stand-in", one.url.replace("http://", f"http://me:{KEY}@").replace("/v1", f"/{KEY}/v1"), KEY, tmp_path)
        secret.judge([asked("secret")])
        assert KEY not in secret.name and KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_replies_of_before_addresses_were_kept_are_told_and_used_where_that_is_said(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an older version kept them: under a key of model, messages and parameters, from whatever endpoint."""
    about = {"model": "stand-in", "messages": asked("answers"), "parameters": {}}
    key = identity(about)
    old = tmp_path / key[:2] / f"{key}.json"
    old.parent.mkdir()
    old.write_text(json.dumps(about | {"reply": json.dumps(completion("Rating: 0"))}))
    content, before = old.read_bytes(), server.asked["answers"]
    assert judge(server, tmp_path).judge([asked("answers")]) == ["Fine.\nRating: 3"] and server.asked["answers"] == before + 1
    assert "1 replies" in caplog.text and "without the address" in caplog.text and "SPILT_JUDGE_UNPLACED=1" in caplog.text
    caplog.clear()
    judge(server, tmp_path).judge([asked("answers")])  # has one of its own now
    assert not caplog.text and old.read_bytes() == content
    with serving(lambda text, before: GOOD) as other:
        for name, value in ((endpoint.MODEL, "stand-in"), (endpoint.KEY, KEY), (endpoint.URL, other.url), ("SPILT_JUDGE_UNPLACED", "1")):
            monkeypatch.setenv(name, value)
        assert judges.judge_of(judges.ENDPOINT, tmp_path, tmp_path).judge([asked("answers")]) == ["Rating: 0"]
        monkeypatch.delenv("SPILT_JUDGE_UNPLACED")
        assert judges.judge_of(judges.ENDPOINT, tmp_path, tmp_path).judge([asked("answers")]) == ["Rating: 0"]  # it has been placed
        assert not other.asked


def test_so_many_at_once_and_no_more() -> None:
    with serving(lambda text, before: Said(completion("Rating: 1"), delay=0.05)) as server:
        made = judge(server, None, at_once=4)
        assert made.judge([asked(f"{i}") for i in range(16)]) == ["Rating: 1"] * 16
        assert 2 <= server.most <= 4


def test_a_key_that_is_refused_ends_it_at_once(tmp_path: Path) -> None:
    with serving(lambda text, before: Said({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401)) as server:
        with pytest.raises(UserError, match="refuses: HTTP 401.*OPENAI_API_KEY") as caught:
            judge(server, tmp_path, at_once=2).judge([asked(f"{i}") for i in range(200)])
        assert KEY not in str(caught.value) and caught.value.__cause__ is None and sum(server.asked.values()) < 20


def test_an_endpoint_that_is_down_is_not_asked_for_ever() -> None:
    made = Endpoint("m", "http://127.0.0.1:9/v1", KEY, None, retries=0, seconds=1.0, at_once=2)
    replies = made.replies([asked(f"{i}") for i in range(100)])
    assert {reply.text for reply in replies} == {None} and all(reply.again for reply in replies)
    assert made.tally.missing["no connection"] < 40 and made.tally.missing.total() == 100


def test_the_environment_says_where_and_how_much(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (endpoint.MODEL, endpoint.KEY, endpoint.URL, endpoint.PRICES):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="SPILT_JUDGE_MODEL is not set; export"):
        judges.name_of(judges.ENDPOINT, tmp_path)
    for name, value in ((endpoint.MODEL, "stand-in"), (endpoint.KEY, KEY), (endpoint.URL, server.url), (endpoint.PRICES, "2,10")):
        monkeypatch.setenv(name, value)
    made = judges.judge_of(judges.ENDPOINT, tmp_path, None)
    assert made.name == judges.name_of(judges.ENDPOINT, tmp_path) == f"stand-in at {server.url.split('/')[2]}" and KEY not in made.name
    assert made.judge([asked("answers")]) == ["Fine.\nRating: 3"]
    assert made.tally.cost == pytest.approx((11 * 2 + 3 * 10) / 1e6) and "0.0001 USD" in str(made.tally)
    assert KEY not in without_secrets(f"a stray {KEY} in a log")
    monkeypatch.delenv(endpoint.URL)
    assert judges.name_of(judges.ENDPOINT, tmp_path) == "stand-in"  # OpenAI's own, as before
    monkeypatch.setenv(endpoint.URL, server.url)
    monkeypatch.setenv(endpoint.PRICES, "cheap")
    with pytest.raises(UserError, match="such as 0.15,0.6"):
        judges.judge_of(judges.ENDPOINT, tmp_path, None)
    monkeypatch.setenv(endpoint.PRICES, "")
    monkeypatch.setenv(endpoint.URL, f"no address {KEY}\n")
    with pytest.raises(UserError, match="OPENAI_BASE_URL is no address") as caught:
        judges.judge_of(judges.ENDPOINT, tmp_path, None).judge([asked("answers")])
    assert KEY not in str(caught.value)


def test_a_local_model_judges_by_its_greedy_reply(tmp_path: Path) -> None:
    base = families.make_base(tmp_path / "base")
    word = str(base.path / "models" / base.model)
    with pytest.raises(UserError, match="--judge 'nowhere/at all': no such folder"):
        judges.name_of("nowhere/at all", base.path)
    with pytest.raises(UserError, match="--judge endpoint asks"):
        judges.name_of("nobody", base.path)
    made = judges.judge_of(word, base.path, tmp_path / "kept")
    prompts = [asked(text) for text in ("rate this", "and this, which is longer")] + [[{"role": "system", "content": "s"}, *asked("x")]]
    replies = made.replies(prompts, {"max_tokens": 6})
    model, tokenizer = families.build("qwen2"), families.tokenizer()
    from spilt.data.chat import Chat

    chat = Chat.of(tokenizer)
    ids = chat.prompt_ids("rate this")
    import torch

    wanted = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=families.PAD)[0, len(ids) :].tolist()
    ended = wanted[-1] == families.EOS
    assert replies[0].why == ("" if ended else "reply cut short: raise the rubric's max_tokens") and replies[0].written == len(wanted)
    assert len(replies) == 3 and made.tally.asked == 3
    again = judges.judge_of(word, base.path, tmp_path / "kept")
    assert again.replies(prompts, {"max_tokens": 6}) == replies and again.tally.known == 3 and again.host is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "raw", ["", "{}", "3", '"x"', '{"choices": {"0": 1}}', '{"choices": [[]]}', '{"choices": [{"message": "no"}]}', "nul"]
)
def test_what_is_no_completion_is_malformed(raw: str) -> None:
    assert reply_of(raw).why == "malformed reply" and reply_of(raw).again
