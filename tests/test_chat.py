"""Chat templates of every sort, and the token ids of the released code. Tiny tokenizers are built here; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from refusal import message
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spilt.data import Chat, dataset_format, read_pairs
from spilt.data.batches import pad, position_mask

REPO = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "goldens"

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start>", "<end>", "<eot>"]
TURNS = (
    "{% for message in messages %}{{ '<start>' + message['role'] + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS = TURNS.replace("{{ '<start>'", "{% if message['role'] != 'system' %}{{ '<start>'").replace("'<end>\n' }}", "'<end>\n' }}{% endif %}")
BOS = "{{ bos_token }}"


def tokenizer(template: str | None = TURNS, adds_bos: bool = True, adds_eos: bool = False, **names) -> PreTrainedTokenizerFast:
    """Byte-level, so any text has tokens: ids 0-5 special, then one per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "Ġ!"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "!")]))  # one merge, so that a token can reach across a border
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds_bos or adds_eos:
        single = f"{'<bos> ' if adds_bos else ''}$A{' <eos>' if adds_eos else ''}"
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", **names)
    made.chat_template = template
    return made


def shown(tok, ids) -> str:
    return tok.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("template", [BOS + TURNS, TURNS])
def test_one_bos_no_eos_whatever_template_and_tokenizer_add(template, adds_bos, adds_eos):
    tok = tokenizer(template, adds_bos, adds_eos)
    chat = Chat.of(tok)
    bos = "<bos>" if adds_bos or template.startswith(BOS) else ""
    prompt = f"{bos}<start>user\nWhy?<end>\n<start>model\n"
    assert shown(tok, chat.prompt_ids("Why?")) == prompt
    assert chat.prompt_text("Why?") == prompt.removeprefix("<bos>")
    assert chat.prefix_length == len("_user\n") + bool(bos)
    assert chat.suffix == "<end>\n" and shown(tok, chat.suffix_ids) == "<end>\n"
    sequence = chat.encode("Why?", " Yes")
    assert shown(tok, sequence.input_ids) == prompt + " Yes<end>\n"
    assert sequence[1:3] == (len(chat.prompt_ids("Why?")), 2)
    caa = chat.encode_caa("Why?", " Yes")
    assert shown(tok, caa.input_ids) == prompt + "  Yes" and caa.prompt_length == sequence.prompt_length and caa.suffix_length == 0
    assert list(sequence.input_ids[: sequence.prompt_length]) == chat.prompt_ids("Why?")
    # the template's own ids, whether they come as a list (transformers 4) or in a BatchEncoding (5)
    ids = tok.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=True)
    ids = list(ids if isinstance(ids, list) else ids["input_ids"])
    assert chat.prompt_ids("Why?") == (ids if bos == "" or template.startswith(BOS) else [2, *ids])


@pytest.mark.parametrize("template", [BOS + TURNS, REFUSES + TURNS, DROPS])
def test_system_prompt_as_a_turn_or_folded_into_the_question(template):
    tok = tokenizer(template, adds_bos=False)
    chat = Chat.of(tok, system_prompt="Be brief.")
    text = chat.prompt_text("Why?")
    if template == BOS + TURNS:
        assert text == "<start>system\nBe brief.<end>\n<start>user\nWhy?<end>\n<start>model\n"
    else:
        assert text == "<start>user\nBe brief.\n\nWhy?<end>\n<start>model\n"
    # the prefix ends where two questions differ, so it holds the system prompt
    assert shown(tok, chat.prompt_ids("Why?")[: chat.prefix_length]).endswith(
        "\nBe brief.<end>\n<start>user\n" if "<bos>" in text or template == BOS + TURNS else "Be brief.\n\n"
    )
    assert chat.suffix == "<end>\n"
    assert Chat.of(tok, system_prompt="").prompt_text("Why?") == Chat.of(tok).prompt_text("Why?")


@pytest.mark.parametrize(("template", "use"), [(None, True), (TURNS, False)])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_raw_text_without_a_template(template, use, adds_bos):
    tok = tokenizer(template, adds_bos, adds_eos=True)
    chat = Chat.of(tok, use_chat_template=use)
    assert (chat.use_template, chat.prefix_length, chat.suffix, chat.suffix_ids) == (False, int(adds_bos), "", ())
    assert shown(tok, chat.prompt_ids("Why?")) == ("<bos>" if adds_bos else "") + "Why?"
    assert chat.prompt_text("Why?") == "Why?"
    sequence = chat.encode("Why?", " Yes")
    assert shown(tok, sequence.input_ids[sequence.prompt_length :]) == " Yes" and sequence.suffix_length == 0
    assert Chat.of(tok, use, "Be brief.").prompt_text("Why?") == "Be brief.\n\nWhy?"
    if adds_bos:
        assert chat.prompt_ids("") == [2]
        assert chat.prompt_ids("<bos>Why?") == chat.prompt_ids("Why?")
    else:
        assert "gives no token" in message(chat.prompt_ids, "")


def test_truncation_takes_the_suffix_first_and_refuses_to_leave_no_answer():
    chat = Chat.of(tokenizer())
    whole = chat.encode("Why?", " Yes")
    n, start = len(whole.input_ids), whole.prompt_length
    assert [chat.encode("Why?", " Yes", n + more).suffix_length for more in (1, 0, -1, -2, -3)] == [2, 2, 1, 0, 0]
    for length in range(start + 1, n + 1):
        cut = chat.encode("Why?", " Yes", length)
        assert cut.input_ids == whole.input_ids[:length] and cut.prompt_length == start
    said = message(chat.encode, "Why?", " Yes", start, row=7)
    assert all(part in said for part in ("row 7", "'Why?'", f"prompt of {start} tokens", f"output_length {start}")), said
    assert "row" not in message(chat.encode, "Why?", " Yes", 3)


def test_an_answer_that_vanishes_in_the_prompts_last_token_is_refused():
    tok = tokenizer(None)
    chat = Chat.of(tok)
    assert "adds no token to its prompt" in message(chat.encode, "a ", "!")
    assert chat.encode("a ", "!!").prompt_length == 3  # the prompt's own count, as released, although the border moved


@pytest.mark.parametrize("template", ["<eot><start>" + TURNS, TURNS])
def test_a_tokenizer_that_puts_two_tokens_in_front(template):  # as ChatGLM does; it has no BOS
    tok = tokenizer(template, adds_bos=False)
    front = processors.TemplateProcessing(single="<eot> <start> $A", special_tokens=[("<eot>", 5), ("<start>", 3)])
    tok.backend_tokenizer.post_processor = front
    tok.bos_token = None
    assert shown(tok, Chat.of(tok).prompt_ids("Why?")) == "<eot><start><start>user\nWhy?<end>\n<start>model\n"
    assert Chat.of(tok, use_chat_template=False).prefix_length == 2


def test_token_type_ids_are_left():
    tok = tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    assert "token_type_ids" in tok("a")
    assert Chat.of(tok).encode("Why?", " Yes") == Chat.of(tokenizer()).encode("Why?", " Yes")


def test_what_apply_chat_template_returns_as_tokens_does_not_matter():
    inner = tokenizer()
    answers_seen = set()
    for tokens in (lambda ids: ids, lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)}):

        class Fake(SimpleNamespace):
            def __call__(self, text, add_special_tokens):
                return inner(text, add_special_tokens=add_special_tokens)

            def apply_chat_template(self, turns, tokenize=True, add_generation_prompt=False, _tokens=tokens):
                text = inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
                return _tokens(inner(text, add_special_tokens=False)["input_ids"]) if tokenize else text

        fake = Fake(chat_template=TURNS, bos_token="<bos>", bos_token_id=2, decode=inner.decode)
        answers_seen.add(Chat.of(fake).encode("Why?", " Yes"))
    assert answers_seen == {Chat.of(inner).encode("Why?", " Yes")}


def test_templates_that_refuse_everything_and_tokenizers_that_know_nothing():
    said = message(Chat.of, tokenizer("{{ raise_exception('closed') }}"))
    assert "refuses turns of user: closed" in said and "use_chat_template" in said
    assert "refuses turns of user" in message(Chat.of, tokenizer("{{ raise_exception('closed') }}"), system_prompt="Be brief.")
    unknown = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    blank = PreTrainedTokenizerFast(tokenizer_object=unknown, unk_token="<unk>")
    blank.chat_template = "{{ messages[0]['content'] }}"
    assert "every letter is the same token" in message(Chat.of, blank)


def test_letters_that_are_one_token_are_passed_over():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "c": 1, "user": 2, "end": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tok.chat_template = "user {{ messages[0]['content'] }} end"
    chat = Chat.of(tok)  # a and b are both <unk>; a and c differ
    assert (chat.prefix_length, chat.suffix_ids) == (1, (3,))


def test_golden_tokens_of_both_datasets():
    numbers = GOLDEN / "tiny-gemma2-numbers"
    tok = AutoTokenizer.from_pretrained(GOLDEN / "tiny-gemma2")
    chat = Chat.of(tok)
    stored = json.loads((numbers / "tokens.json").read_text())
    assert (chat.prefix_length, chat.suffix, len(chat.suffix_ids)) == tuple(
        stored["meta"][key] for key in ("prefix_length", "suffix_str", "suffix_length")
    )
    files = {"psychopathy": "data-psychopathy/{}.jsonl", "powerseeking": "data-powerseeking/{}.csv"}
    for dataset, file in files.items():
        entry = dataset_format(REPO, dataset, "valid")._replace(path=GOLDEN / file.format("test"))
        pairs = read_pairs(entry)
        rows = stored["data"][dataset]
        assert len(pairs) == len(rows) == 8
        for pair, row in zip(pairs, rows, strict=True):
            assert pair[:3] == tuple(row["raw"][key] for key in ("question", "matching", "not_matching"))
            assert chat.prompt_text(pair.question) == row["question_templated"]
            for name, answer in (("matching", pair.matching), ("not_matching", pair.not_matching)):
                sequence = chat.encode(pair.question, answer)
                assert list(sequence.input_ids) == row[name]["input_ids"]
                assert sequence.prompt_length == row["prompt_length"] and sequence.suffix_length == 2
                batch = pad([sequence], 0)
                assert batch.input_ids.masked_fill(~batch.answer_mask, -100).tolist() == [row[name]["labels"]]
                assert (
                    position_mask([sequence], "skip_prefix", chat.prefix_length)[0].nonzero()[:, 0].tolist()
                    == row[name]["intervention_locations"]
                )
        together = stored["data"][f"{dataset}_collated_batch_of_8"]
        for name, field in (("winning", "matching"), ("losing", "not_matching")):
            sequences = [chat.encode(pair.question, getattr(pair, field)) for pair in pairs]
            batch = pad(sequences, stored["meta"]["pad_token_id"])
            width = batch.input_ids.shape[1]

            def cut(key: str, name: str = name, width: int = width, together: dict = together) -> torch.Tensor:
                """The released batch is padded further, to the longer of both answers and one more."""
                return torch.tensor(together[f"orig_add_{name}_{key}"])[:, :width]

            assert torch.equal(batch.input_ids, cut("input_ids"))
            assert torch.equal(batch.attention_mask, cut("attention_mask").bool())
            assert torch.equal(batch.input_ids.masked_fill(~batch.answer_mask, -100), cut("labels"))
            lengths = batch.attention_mask.sum(1)
            for i, mask in enumerate(position_mask(sequences, "skip_prefix", chat.prefix_length)):
                places = [p for p in together[f"orig_add_{name}_intervention_locations"][i][0] if p < lengths[i]]
                assert mask.nonzero()[:, 0].tolist() == places
        caa = json.loads((numbers / "caa_tokens.json").read_text())[dataset]
        pairs = read_pairs(entry._replace(path=GOLDEN / file.format("train")))
        assert len(caa) == len(pairs) == 24
        for pair, row in zip(pairs, caa, strict=True):
            for key, answer in (("pos", pair.matching), ("neg", pair.not_matching)):
                sequence = chat.encode_caa(pair.question, answer)
                assert list(sequence.input_ids) == row[f"{key}_tokens"] and sequence.prompt_length == row["ques_tokens_len"]
                assert len(sequence.input_ids) - sequence.prompt_length == row[f"{key}_answer_len"]


def test_golden_prompts_of_generation():
    chat = Chat.of(AutoTokenizer.from_pretrained(GOLDEN / "tiny-gemma2"))
    stored = json.loads((GOLDEN / "tiny-gemma2-numbers/generations.json").read_text())
    assert {key.split("/")[0] for key in stored} == {"psychopathy", "powerseeking"}
    for rows in stored.values():
        for row in rows:
            assert chat.prompt_ids(row["input"]) == row["prompt_ids"]
