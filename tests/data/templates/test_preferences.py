"""Prompts with answers as trees: every path is what SFT would make of that conversation alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data.voices import SMOLLM, VOICES, make_row, talk_of, tiny_tokenizer, written
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.examples import unusable
from align.data.formats.formats import Fault
from align.data.mixture import prepare
from align.data.store import stored
from align.data.templates.marking import show
from align.data.templates.preferences import labelled, preferences, render_answers
from align.data.templates.render import conversations, prompt_key, render
from align.data.templates.templates import chat_tokenizer
from align.recipe.errors import UserError
from align.recipe.schema import Data, Source

PLAIN = "plain"
ANSWERS = ["写一首诗。春风 🌸🌷", "def f():\n        return 1", "👩‍👩‍👧 and é"]


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


def asked(*answers, prompt=None, targets=(), **more):
    row = make_row(prompt or talk_of("hi", "earlier", "你好 🌸", system="Be brief."), **more)
    return row._replace(answers=tuple(map(say, answers)), targets=targets)


def tokenizer_of(name, **more):
    return chat_tokenizer(tiny_tokenizer(eos_token="</s>"), PLAIN) if name == PLAIN else VOICES[name].tokenizer(**more)


def tree_of(row, tokenizer):
    (tree,) = render_answers([row], tokenizer)
    assert not isinstance(tree, Fault), tree
    return tree


def fault_of(row, tokenizer):
    (fault,) = render_answers([row], tokenizer)
    assert isinstance(fault, Fault)
    assert (fault.file, fault.line) == (row.file, row.line)
    return fault.reason


def assert_as_alone(row, tokenizer):
    """Each path has the tokens and the labels that SFT's last turn has, up to its last label; the stem has none."""
    tree = tree_of(row, tokenizer)
    assert len(tree.segments) == 1 + len(row.answers)
    assert not tree.trained[0].any()
    for answer, (tokens, trained) in zip(row.answers, tree.paths(), strict=True):
        alone = render(row._replace(messages=[*row.messages, answer], answers=(), targets=()), tokenizer, "last")
        end = np.flatnonzero(alone.trained[0])[-1] + 1
        np.testing.assert_array_equal(tokens, alone.segments[0][:end])
        np.testing.assert_array_equal(trained, alone.trained[0][:end])
    return tree


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", VOICES)
def test_each_path_is_the_conversation_alone(name, trim):
    voice = VOICES[name]
    tokenizer = voice.tokenizer(trim=trim)
    row = asked(*ANSWERS, prompt=talk_of("hi", "earlier", "你好 🌸"))
    tree = assert_as_alone(row, tokenizer)
    assert all(marks.all() for marks in tree.trained[1:]), "branches begin where the answers part"
    for answer, (tokens, _) in zip(ANSWERS, tree.paths(), strict=True):
        text = tokenizer.decode(tokens)
        assert text.endswith(voice.trained(answer))
        assert written([*row.messages, say(answer)], tokenizer).startswith(text)


def test_a_base_that_knows_text_alone():
    tokenizer = tokenizer_of(PLAIN)
    tree = assert_as_alone(asked("Yes.", "No.", prompt=talk_of("q")), tokenizer)
    assert [tokenizer.decode(part) for part in tree.segments] == ["User: q\n\nAssistant:", " Yes.</s>", " No.</s>"]


@st.composite
def cases(draw):
    # Words that begin with a newline could share a token with the header before them, so none do.
    texts = st.text(st.sampled_from("aZ 9.\n:{}<|>春🌸é\u200d👩"), min_size=1, max_size=12).filter(
        lambda text: text.strip() and text[0] not in "\n "
    )
    turns = 2 * draw(st.integers(0, 2)) + 1
    answers = draw(st.lists(texts, min_size=1, max_size=4, unique_by=str.strip))
    prompt = talk_of(*(draw(texts) for _ in range(turns)), system=draw(st.none() | texts))
    return draw(st.sampled_from([*VOICES, PLAIN])), asked(*answers, prompt=prompt)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_answers_in_any_template(case):
    name, row = case
    tree = assert_as_alone(row, tokenizer_of(name))
    assert len(tree.segments[0]) > 0
    assert all(len(branch) > 0 for branch in tree.segments[1:])


def test_answers_that_begin_alike_part_after_the_prompt():
    tokenizer = tiny_tokenizer(SMOLLM)
    tree = tree_of(asked("春风 a", "春风 b", prompt=talk_of("q")), tokenizer)
    assert tokenizer.decode(tree.segments[0]).endswith("<|im_start|>assistant\n")
    assert [tokenizer.decode(part) for part in tree.segments[1:]] == ["春风 a<|im_end|>", "春风 b<|im_end|>"]


def test_tokens_of_the_prompt_that_an_answer_changes_are_in_the_branches_untrained():
    header = "{{ '<|im_start|>assistant\\nPa' }}"
    template = SMOLLM.replace("{{ '<|im_start|>assistant\n' }}", header).replace(
        "{{'<|im_start|>' + message['role'] + '\n' +",
        "{{'<|im_start|>' + message['role'] + ('\nPa' if message['role'] == 'assistant' else '\n') +",
    )
    tokenizer = tiny_tokenizer(template)
    tree = assert_as_alone(asked("Fr", "de", prompt=talk_of("q")), tokenizer)
    assert tokenizer.decode(tree.segments[0]).endswith("<|im_start|>assistant\n")
    runs = [
        [tokenizer.decode(token) for token in branch[marks == trained]]
        for branch, marks in zip(tree.segments[1:], tree.trained[1:], strict=True)
        for trained in (False, True)
    ]
    assert runs == [["Pa"], ["Fr", "<|im_end|>"], ["P"], ["ad", "e", "<|im_end|>"]]


def test_targets_and_order_are_kept():
    tokenizer = tiny_tokenizer(SMOLLM)
    assert tree_of(asked("a", "b", targets=(0.5, 0.0)), tokenizer).targets == (0.5, 0.0)
    assert tree_of(asked("a", "b"), tokenizer).targets == ()
    one = tree_of(asked("a", targets=(0.0,)), tokenizer)
    assert (len(one.segments), one.targets) == (2, (0.0,))


def test_rows_of_a_batch_do_not_touch_each_other():
    tokenizer = tiny_tokenizer(SMOLLM)
    rows = [asked("a", "b"), asked("a", "a \n"), asked("x", "y", "z", prompt=talk_of("q"))]
    first, second, third = render_answers(rows, VOICES["gemma"].tokenizer())
    assert second.reason == "two answers are the same as the chat template writes them"
    assert [len(first.segments), len(third.segments)] == [3, 4]
    together = render_answers(rows, tokenizer)
    for row, tree in zip(rows, together, strict=True):
        alone = tree_of(row, tokenizer)
        assert [part.tolist() for part in tree.segments] == [part.tolist() for part in alone.segments]
    assert render_answers([], tokenizer) == []


def test_tools_and_calls_are_written():
    tokenizer = tiny_tokenizer(SMOLLM)
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "zebra"}}}
    tool = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {}}}
    row = make_row(talk_of("q"), tools=[tool])._replace(answers=(say("", tool_calls=[call]), say("No.")))
    tree = assert_as_alone(row, tokenizer)
    assert '"description": "d"' in tokenizer.decode(tree.segments[0])
    assert '"word": "zebra"' in tokenizer.decode(tree.segments[1])


def test_what_the_template_does_to_a_prompt_or_an_answer_is_a_fault():
    peeking = SMOLLM.replace("{% for message", "{{ (messages | last)['content'][:1] }}{% for message", 1)
    assert "changes or leaves out an assistant turn" in fault_of(asked("a", "b"), tiny_tokenizer(peeking))
    measuring = SMOLLM.replace("{% for message", "{{ (messages | last)['content'] | length > 9 }}{% for message", 1)
    reason = "the chat template writes the prompt in another way before another answer"
    assert fault_of(asked("a", "a longer answer"), tiny_tokenizer(measuring)) == reason
    refused = asked("a", "b", prompt=[talk_of("q")[0], *talk_of("q")])
    assert "roles must alternate user/assistant" in fault_of(refused, VOICES["gemma"].tokenizer())


def test_show_names_the_branches():
    tokenizer = tiny_tokenizer(SMOLLM)
    prompt = talk_of("q", system="S")
    head = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant"

    def shown(*answers, targets=()):
        tree = tree_of(asked(*answers, prompt=prompt, targets=targets), tokenizer)
        text = show(tree, tokenizer, colour=False).plain
        coloured = show(tree, tokenizer, colour=True)
        green = [coloured.plain[s.start : s.end] for s in coloured.spans if s.style == "green"]
        assert green == [f"{answer}<|im_end|>" for answer in answers]
        assert text.startswith(f"{head}\n── ")
        return text.removeprefix(f"{head}\n")

    assert shown("春 wind", "b") == "── chosen ──\n⟦春 wind<|im_end|>⟧\n── rejected ──\n⟦b<|im_end|>⟧"
    assert shown("a", "b", targets=(0.5, 0.0)).startswith("── chosen, by a margin of 0.5 ──\n")
    assert shown("a", targets=(1.0,)) == "── desirable ──\n⟦a<|im_end|>⟧"
    assert shown("a", targets=(0.0,)) == "── undesirable ──\n⟦a<|im_end|>⟧"
    assert [line for line in shown("a", "b", "c").splitlines() if "──" in line] == [
        f"── answer {i} of 3 ──" for i in (1, 2, 3)
    ]


def test_the_prompt_key_is_that_of_the_conversation():
    row = asked("a", "b", prompt=talk_of("q", system="S"))
    assert prompt_key(row) == prompt_key(make_row(talk_of("q ", "other", system="S")))
    assert prompt_key(row) == prompt_key(asked("c", "d", prompt=talk_of("q", "x", "more", system="S")))
    assert prompt_key(row) != prompt_key(asked("a", "b", prompt=talk_of("r", system="S")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def _prepare(folder, *paths, reading=None, **fields):
    data = Data(train=[Source(path=path) for path in paths], **{"max_length": 200} | fields)
    return prepare(data, tiny_tokenizer(SMOLLM), reading or preferences(), 3, folder / "cache")


def test_stored_trees_are_the_rendered_ones(folder):
    _save(folder / "pairs.jsonl", [_pair("q", "a", "b"), _pair("r", "c", "d", margin=0.5), _pair("s", "x", "x")])
    _save(folder / "ranked.jsonl", [{"prompt": "q", "answers": ["a", "b", "c"]}])
    _save(folder / "labelled.jsonl", [{"prompt": "q", "completion": "a", "label": 0}])
    tokenizer = tiny_tokenizer(SMOLLM)
    expected = {
        "pairs.jsonl": [("q", "ab", ()), ("r", "cd", (0.5, 0.0))],
        "ranked.jsonl": [("q", "abc", ())],
        "labelled.jsonl": [("q", "a", (0.0,))],
    }
    for path, rows in expected.items():
        reading = labelled() if path == "labelled.jsonl" else preferences()
        store = stored(Source(path=path), tokenizer, reading, folder / "cache")
        assert len(store.line) == len(rows)
        for i, (prompt, answers, targets) in enumerate(rows):
            whole, tree = tree_of(asked(*answers, prompt=talk_of(prompt), targets=targets), tokenizer), store.tree(i)
            assert tree.targets == whole.targets
            assert [part.tolist() for part in tree.segments] == [part.tolist() for part in whole.segments]
            assert [part.tolist() for part in tree.trained] == [part.tolist() for part in whole.trained]
    (fault,) = stored(Source(path="pairs.jsonl"), tokenizer, preferences(), folder / "cache").faults
    assert (fault.line, fault.reason) == (3, "rejected: expected another answer than chosen, found the same")


def test_the_summary_counts_pairs_or_answers(folder):
    _save(folder / "pairs.jsonl", [_pair(f"q{i}", "a", "b") for i in range(10)])
    _save(folder / "ranked.jsonl", [{"prompt": "q", "answers": ["a", "b", "c"]}])
    _save(folder / "labelled.jsonl", [{"prompt": "q", "completion": f"a{i}", "label": i % 4 != 0} for i in range(8)])
    made = _prepare(folder, "pairs.jsonl", eval={"fraction": 0.1})
    assert made.summary[0] == "pairs.jsonl: pairs (columns `chosen`, `rejected`)"
    assert made.summary[-2].startswith("train: 9 pairs, ")
    assert made.summary[-1].startswith("eval: 1 pair, ")
    made = _prepare(folder, "pairs.jsonl", "ranked.jsonl")
    assert made.summary[-2].startswith("train: 11 rows with 23 answers, ")
    assert made.summary[-1].startswith("eval: 0 rows, ")
    made = _prepare(folder, "labelled.jsonl", reading=labelled())
    assert made.summary[-4].startswith("train: 8 rows, ")
    assert made.summary[-2] == "train: 6 desirable, 2 undesirable"
    assert "dpo.undesirable_weight from 2.25 to 3, the other weight 1" in made.summary[-1]
    assert _prepare(folder, "labelled.jsonl", reading=labelled(1, 2.5)).summary[-1] == made.summary[-2]
    assert "answers is 0.75 times that of" in _prepare(folder, "labelled.jsonl", reading=labelled(0.5, 2)).summary[-1]


def test_no_prompt_of_a_pair_stands_on_both_sides(folder):
    _save(folder / "pairs.jsonl", [_pair(f"q{i % 10}", f"a{i}", f"b{i}") for i in range(40)])
    made = _prepare(folder, "pairs.jsonl", eval={"fraction": 0.25})
    stems = [{side.tree(i).segments[0].tobytes() for i in range(len(side))} for side in (made.train, made.eval)]
    assert (len(made.train), len(made.eval)) == (32, 8)
    assert not stems[0] & stems[1]


def test_exact_duplicates_of_pairs(folder):
    rows = [_pair("q", "a", "b"), _pair("q", "b", "a"), _pair("q", "a", "b", margin=1), _pair("q", "a", "b")]
    _save(folder / "pairs.jsonl", rows)
    made = _prepare(folder, "pairs.jsonl", duplicates="drop")
    assert [made.train.where(i) for i in range(len(made.train))] == [f"pairs.jsonl:{n}" for n in (1, 2, 3)]
    assert [(e["line"], e["action"]) for e in made.ledger.entries] == [(4, "dropped")]


def test_overlong_pairs(folder):
    rows = [
        _pair("q", "a", "b"),
        _pair("q", "9" * 200, "b"),
        _pair("q", "9" * 300 + "a", "9" * 300 + "b"),
        _pair("9" * 300, "a", "b"),
    ]
    _save(folder / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=r"3 rows longer than data.max_length = 150"):
        _prepare(folder, "pairs.jsonl", max_length=150)
    made = _prepare(folder, "pairs.jsonl", max_length=150, overlong="drop")
    assert len(made.train) == 1
    made = _prepare(folder, "pairs.jsonl", max_length=150, overlong="truncate")
    assert [(e["line"], e["action"]) for e in made.ledger.entries] == [
        (2, "truncated"),
        (3, "dropped"),
        (4, "dropped"),
    ]
    reasons = [entry["reason"] for entry in made.ledger.entries]
    assert "its answers are the same in their first" in reasons[1]
    assert "leaves no room for an answer in 150" in reasons[2]
    cut = made.train.tree(1)
    assert made.train.longest.tolist()[1] == 150 == len(cut.segments[0]) + len(cut.segments[1])
    assert made.train.lengths[1] == sum(map(len, cut.segments))
    assert made.train.labels[1] == cut.label_count == sum(int(marks.sum()) for marks in cut.trained)
    assert made.train.paths.tolist() == [2, 2]
    assert made.train.room[1] == cut.packed_length
    assert unusable(cut, 150) is None


def test_sft_on_a_file_of_pairs_learns_the_best_answer(folder):
    rows = [{"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}]
    _save(folder / "pairs.jsonl", rows)
    made = _prepare(folder, "pairs.jsonl", reading=conversations("assistant"))
    assert made.summary[0] == (
        "pairs.jsonl: pairs (columns `chosen`, `rejected`; the best answer is learnt;"
        " it could be sharegpt too: column `conversations` with from/value)"
    )
    tree = made.train.tree(0)
    tokenizer = tiny_tokenizer(SMOLLM)
    assert tokenizer.decode(tree.segments[0][tree.trained[0]]) == "a<|im_end|>"
