"""Tokenized traces: masks under real chat templates, what is dropped and counted, reading back, the order of rows."""

import json

import pytest
from conftest import CHAT_TEMPLATE, build_tokenizer

from fastreason.config import DataConfig, parse_config
from fastreason.data.traces import LONG_PROMPT, LONG_ROW, TraceOrder, Traces, check_traces, num_examples, write_traces
from fastreason.data.turns import TurnWriter
from fastreason.errors import ConfigError, DataError

# What SmolLM2-Instruct and Qwen2.5 write: ChatML, with a system message of its own where there is none.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What DeepSeek-R1's distilled models write: the turn begins with <think> when asked, and loses it when it is history.
THINK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}"
    "{% else %}<|im_start|>assistant:{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def writer(tokenizer, template=CHATML, **data):
    tokenizer.chat_template = template
    return TurnWriter(tokenizer, DataConfig(**data))


def trained_text(tokenizer, tokens):
    """The trained pieces of what follows a prompt, as texts."""
    pieces, last = [], False
    for token, trained in zip(tokens.response, tokens.trained or [True] * len(tokens.response), strict=True):
        if trained:
            pieces = pieces if last else [*pieces, []]
            pieces[-1].append(token)
        last = trained
    return [tokenizer.decode(piece) for piece in pieces]


def test_chatml_ends_a_response_with_its_end_of_turn(tokenizer):
    made = writer(tokenizer)
    prompt, response = made.prompt("1 + 1?"), made.response("It is 2.")
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(response) == "It is 2.<|im_end|>"
    assert made.response("It is 2.<|im_end|>") == response, "an end that is there already is not doubled"
    assert made.as_rendered("1 + 1?", "It is 2.")


def test_a_template_without_an_end_token_and_a_raw_prompt_end_with_eos(tokenizer):
    assert tokenizer.decode(writer(tokenizer, CHAT_TEMPLATE).response("2")) == "2<eos>"
    raw = writer(tokenizer, None, chat_template=False, user_template="Q: {problem} A:")
    assert tokenizer.decode(raw.prompt("1?")) == "Q: 1? A:" and tokenizer.decode(raw.response(" 2")) == " 2<eos>"


def test_a_template_that_rewrites_responses_is_noticed_and_generation_is_trained(tokenizer):
    made = writer(tokenizer, THINK)
    assert tokenizer.decode(made.prompt("1?")).endswith("assistant:<think>\n")
    assert tokenizer.decode(made.response("hm</think>2")) == "hm</think>2<|im_end|>"
    assert not made.as_rendered("1?", "hm</think>2")


@pytest.mark.parametrize(
    ("opened", "response", "trained"),
    [
        ("<think>\n", "<think>\nhm</think>2", "hm</think>2"),
        ("<think>\n", "\n<think>hm</think>2", "hm</think>2"),
        ("<think>\n", "<think>\n\nhm</think>2", "\nhm</think>2"),
        ("<think>", "<think>\nhm</think>2", "\nhm</think>2"),
        ("<think>\n", "hm<think>", "hm<think>"),
        ("", "<think>\nhm</think>2", "<think>\nhm</think>2"),
    ],
)
def test_what_the_prompt_has_opened_a_response_does_not_open_again(tokenizer, opened, response, trained):
    asked = "{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"
    made = writer(tokenizer, CHATML.partition("{% if add_generation_prompt %}")[0] + asked)
    assert tokenizer.decode(made.response(response)) == trained + "<|im_end|>"
    whole = tokenizer.decode(made.prompt("1?") + made.response(response))
    assert whole.endswith("assistant\n" + opened + trained + "<|im_end|>")
    # ChatML writes what it is given: that is the same where the response is given as it came.
    assert made.as_rendered("1?", response) == (opened + trained == response)
    raw = writer(tokenizer, None, chat_template=False, user_template="{problem} " + opened)
    assert tokenizer.decode(raw.response(response)) == trained + "<eos>"


def test_every_assistant_turn_of_a_conversation_is_trained_and_nothing_else(tokenizer):
    made = writer(tokenizer)
    turns = [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("tool", "x"), ("assistant", "two"), ("user", "bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    tokens = made.conversation(messages)
    assert trained_text(tokenizer, tokens) == ["one<|im_end|>", "two<|im_end|>"]
    whole = tokenizer.apply_chat_template(messages[:5], tokenize=False).removesuffix("\n")
    assert tokenizer.decode(tokens.prompt + tokens.response) == whole
    assert tokens.prompt + tokens.response == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # Without an end token, EOS ends the last turn alone: the others go on.
    eos = writer(tokenizer, CHAT_TEMPLATE).conversation(messages)
    assert trained_text(tokenizer, eos) == ["one", "two<eos>"]


def test_a_conversation_that_cannot_be_told_apart_is_refused(tokenizer):
    thought = [("user", "1?"), ("assistant", "hm</think>one"), ("user", "2?"), ("assistant", "hm</think>two")]
    messages = [{"role": r, "content": c} for r, c in thought]
    # What DeepSeek-R1's templates cannot do even for one turn: splitting the conversation would not help.
    for number in (2, 4):
        with pytest.raises(
            DataError, match=r"ends in '.*assistant:<think>\\n', and .*offline\.response_column"
        ) as error:
            writer(tokenizer, THINK).conversation(messages[:number])
        assert "split" not in str(error.value)
    # Qwen3's drops the thoughts of all turns but the last.
    last = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    with pytest.raises(DataError, match="writes a turn differently"):
        writer(tokenizer, last).conversation(messages)
    assert trained_text(tokenizer, writer(tokenizer, last).conversation(messages[:2])) == ["hm</think>one<|im_end|>"]
    with pytest.raises(DataError, match="needs an assistant turn"):
        writer(tokenizer).conversation([{"role": "user", "content": "1?"}])


def config_of(tmp_path, rows, **sections):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"model": {"path": "a/b"}, "train": {"steps": 1, "prompts_per_step": 2}}
    raw |= {"offline": {"objective": "sft", "path": str(path), **sections.pop("offline", {})}}
    return parse_config(raw | sections)


def test_what_is_too_long_is_dropped_and_counted_and_the_rest_reads_back(tmp_path, tokenizer):
    tokenizer.chat_template = None
    rows = [{"problem": "p" * (1 + i % 7), "response": "r" * (i + 1), "w": i / 2, "id": f"row {i}"} for i in range(600)]
    config = config_of(
        tmp_path, rows, data={"chat_template": False, "max_prompt_tokens": 6}, offline={"weight_column": "w"}
    )
    report = write_traces(config, tokenizer, tmp_path / "traces", 305, pairs=False)
    short = [r for r in rows if len(r["problem"]) <= 6]
    kept = [r for r in short if len(r["problem"]) + len(r["response"]) + 1 <= 305]
    assert report.dropped == {LONG_PROMPT: 600 - len(short), LONG_ROW: len(short) - len(kept)}
    assert (report.rows, report.kept) == (600, len(kept)) and len(kept) > 256, "more than one batch of rows"
    assert report.rows == report.kept + sum(report.dropped.values())
    traces = Traces(tmp_path / "traces")
    assert len(traces) == len(kept)
    for index, row in enumerate(kept):
        trace = traces[index]
        assert (trace.id, trace.weight, trace.trained) == (row["id"], row["w"], None)
        assert tokenizer.decode(trace.prompt) == row["problem"]
        assert [tokenizer.decode(r) for r in trace.responses] == [row["response"] + "<eos>"]
    assert report.tokens == sum(len(r["problem"]) + len(r["response"]) + 1 for r in kept)
    assert report.end_token_id == Traces(tmp_path / "traces").report.end_token_id == tokenizer.eos_token_id
    assert report.longest == 305 and json.loads((tmp_path / "traces" / "report.json").read_text())["kept"] == len(kept)
    assert sorted(p.name for p in (tmp_path / "traces").iterdir()) == ["report.json", "traces.arrow"]


def test_pairs_and_conversations_read_back(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    pair = config_of(tmp_path, [{"problem": "p", "chosen": "good", "rejected": "bad"}], offline={"objective": "redi"})
    report = write_traces(pair, tokenizer, tmp_path / "a", None, pairs=True)
    assert report.end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    assert [tokenizer.decode(r) for r in Traces(tmp_path / "a")[0].responses] == ["good<|im_end|>", "bad<|im_end|>"]
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    chat = config_of(tmp_path, [{"m": messages}], offline={"messages_column": "m"})
    write_traces(chat, tokenizer, tmp_path / "b", None, pairs=False)
    trace = Traces(tmp_path / "b")[0]
    assert trace.trained == [True] * len(trace.responses[0]) and tokenizer.decode(trace.responses[0]) == "one<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "offline", "parts"),
    [
        ([], {}, ["holds no row"]),
        ([{"problem": "p", "answer": "1"}], {}, ["offline.response_column='response'", "line 1", "problem, answer"]),
        ([{"problem": "p", "response": " "}], {}, ["offline.response_column", "line 1", "not empty"]),
        ([{"problem": "p", "response": "r"}], {"weight_column": "w"}, ["offline.weight_column='w'", "None"]),
        ([{"m": "no"}], {"messages_column": "m"}, ["offline.messages_column='m'", "{role, content}"]),
        ([{"problem": "p", "chosen": "c"}], {"objective": "dpo"}, ["offline.rejected_column='rejected'"]),
    ],
)
def test_bad_files_are_refused_before_anything_loads(tmp_path, rows, offline, parts):
    config = config_of(tmp_path, rows, offline=offline)
    with pytest.raises(DataError) as error:
        check_traces(config, pairs=config.offline.objective == "dpo")
    assert not [part for part in parts if part not in str(error.value)], error.value


def test_a_missing_file_and_rows_that_are_all_too_long_are_told(tmp_path, tokenizer):
    config = config_of(tmp_path, [{"problem": "p", "response": "r" * 50}], data={"chat_template": False})
    with pytest.raises(DataError, match=r"none of 1 rows is short enough; the shortest has 52 tokens.*allowed are 20"):
        write_traces(config, tokenizer, tmp_path / "traces", 20, pairs=False)
    assert not list((tmp_path / "traces").iterdir())
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"offline\.path=.*does not exist.*fastreason data"):
        check_traces(config, pairs=False)
    with pytest.raises(DataError, match="cannot be read"):
        Traces(tmp_path / "traces")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        TurnWriter(tokenizer, DataConfig())


def test_the_order_is_a_function_of_the_step_and_every_epoch_has_every_row():
    order = TraceOrder(10, 4, seed=3, total=num_examples(10, 2.5))
    batches = [order.batch(step) for step in range(7)]
    assert [len(b) for b in batches] == [4, 4, 4, 4, 4, 4, 1]
    flat = [row for batch in batches for row in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and len(set(flat[20:])) == 5
    assert flat[:10] != flat[10:20] != list(range(10))
    again = TraceOrder(10, 4, seed=3)
    assert [again.batch(step)[:1] for step in (6, 2, 5)] == [batches[6], batches[2][:1], batches[5][:1]]
    assert TraceOrder(10, 4, seed=4).batch(0) != batches[0]
