import hashlib
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import trl
from data.voices import (
    MARKED,
    SMOLLM,
    VOICES,
    learnt,
    make_row,
    talk_of,
    tiny_tokenizer,
    trained_runs,
    tree_of,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.data.formats.formats import Fault, Row
from align.data.formats.prompts import prompts
from align.data.templates import confined
from align.data.templates.chats import chat_of
from align.data.templates.ends import turn_ends
from align.data.templates.preferences import render_answers
from align.data.templates.render import render
from align.data.templates.templates import chat_tokenizer
from align.recipe.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
AGENT = [
    {"role": "user", "content": "Is it sunny?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny, 20"},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Yes."},
]


def test_thoughts_that_a_template_ignores_are_written_as_text():
    talk = talk_of("q", "a")
    talk[1]["reasoning_content"] = "because"
    spoken = learnt(talk, tiny_tokenizer(SMOLLM))
    assert spoken == ["<think>\nbecause\n</think>\n\na<|im_end|>"]


@pytest.mark.parametrize(("choice", "said"), [("chatml", "{}<|im_end|>"), ("plain", " {}<|im_end|>")])
def test_builtin_templates_write_tools_themselves(choice, said):
    tokenizer = chat_tokenizer(tiny_tokenizer(), choice)
    assert chat_of(tokenizer).native >= {"system", "tools", "calls", "results"}
    call = CALL_TEXT if choice == "chatml" else f"\n{CALL_TEXT}"
    spoken = learnt(AGENT, tokenizer, tools=[TOOL])
    assert spoken == [f"{call}<|im_end|>", said.format("Yes.")]
    assert learnt(talk_of("q", "a", "r", "b", system="S"), tokenizer) == [
        said.format("a"),
        said.format("b"),
    ]


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
STOCK = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
FORGET_EARLIER = {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "glm4moe"} | {
    f"nemotron_3_{size}" for size in ("nano", "super", "ultra", "5_lightning")
}
ENDS = {
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "glm4moe": "<|user|>",
    "phi3": "<|end|>",
}


def stock(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that has the tokens which the template writes."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(template, bos_token="<s>", eos_token="</s>")
    words = set(re.findall(r"<[|｜/_a-z][^<>\s']*[|｜a-z_]>|</s>", template))
    tokenizer.add_tokens(sorted(word for word in words if "tool" not in word and "think" not in word))
    return tokenizer


def test_all_of_them_are_there():
    assert len(STOCK) >= 39


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates(name):
    tokenizer = stock(name)
    first, second = learnt(talk_of("q", "春风", "r", "wind"), tokenizer)
    assert ("春风" in first, "wind" in first, "wind" in second) == (True, False, True)
    assert "think" not in first + second, "an empty thought that the template writes is not learnt"
    call, answer = learnt(AGENT, tokenizer, tools=[TOOL])
    assert ("weather" in call, "北京" in call, "Yes." in answer) == (True, True, True)
    assert not any(word in call + answer for word in ("sunny", "rain", "Is it"))
    (end,) = {tokenizer.convert_ids_to_tokens(id) for id in turn_ends(tokenizer).ids} - {
        "<|call|>",
        "<|observation|>",
        "<|system|>",
    }
    assert second.endswith(end)
    assert end == ENDS.get(name, end)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("way", ["in the content", "beside it"])
def test_thoughts_in_stock_templates_are_learnt_or_named(name, way):
    """Whole, or the row's notes, or its refusal, say what is left out."""
    tokenizer = stock(name)
    thoughts, answers = ("mountain", "valley"), ("first", "second")
    talk = talk_of("q", answers[0], "r", answers[1])
    for turn, thought in zip(talk[1::2], thoughts, strict=True):
        if way == "beside it":
            turn["reasoning_content"] = thought
        else:
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
    tree = render(make_row(talk), tokenizer, "assistant")
    if isinstance(tree, Fault):
        assert name == "deepseekv3"
        assert "leaves out the thoughts of every assistant turn" in tree.reason
        return
    runs = trained_runs(tree, tokenizer)
    told = len(tree.notes)
    assert len(runs) == 2 - told
    for run, thought, answer in zip(runs, thoughts[told:], answers[told:], strict=True):
        assert thought in run
        assert run.rindex(answer) > run.index(thought)
        assert run.count("</think>") < 2
    if told:
        assert name in FORGET_EARLIER or (way == "beside it" and name in ("gemma4_v5", "diffusion_gemma", "gptoss"))
        assert "assistant turn 1 is context, not learnt" in tree.notes[0]
    pair = render_answers([asked_pair(*(talk[i] for i in (1, 3)))], tokenizer)[0]
    assert not isinstance(pair, Fault)
    assert all(thought in tokenizer.decode(branch) for thought, branch in zip(thoughts, pair.segments[1:], strict=True))


def asked_pair(chosen, rejected) -> Row:
    return make_row(talk_of("q"))._replace(answers=(chosen, rejected))


def test_options_become_the_defaults_of_the_template(tmp_path):
    template = "{{ greeting }}{% if loud %}!{% endif %}" + SMOLLM
    tokenizer = chat_tokenizer(tiny_tokenizer(template), None, {"greeting": 'Oh "you"', "loud": True})
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    ask = talk_of("q")
    assert saved.apply_chat_template(ask, tokenize=False).startswith('Oh "you"!<|im_start|>system')
    assert saved.apply_chat_template(ask, tokenize=False, loud=False).startswith('Oh "you"<|im_start|>')
    again = chat_tokenizer(saved, None, {"greeting": "Hi"})
    assert again.apply_chat_template(ask, tokenize=False).startswith("Hi<|im_start|>")
    for options, problem in (
        ({"a b": 1}, "'a b' is no name"),
        ({"loop": object()}, "loop is neither text"),
        ({"messages": []}, "'messages' is given to every template"),
        ({"mesage": 1}, "reads no 'mesage'; did you mean 'message'"),
    ):
        with pytest.raises(UserError, match=problem):
            chat_tokenizer(tiny_tokenizer(SMOLLM), None, options)


@pytest.mark.parametrize("value", ["😀 é", 'a \\n "b" \' {{ 1 }} %} #} \u2028', {"ключ": ["😀", 1.5, None, True]}])
def test_an_option_is_what_the_template_gets(value):
    tokenizer = chat_tokenizer(tiny_tokenizer("{{ greeting }}" + SMOLLM), None, {"greeting": value})
    assert tokenizer.apply_chat_template(talk_of("q"), tokenize=False).startswith(f"{value}<|im_start|>system")


def test_templates_by_name_without_a_default():
    tokenizer = tiny_tokenizer(SMOLLM)
    tokenizer.chat_template = {"rag": SMOLLM, "tool_use": SMOLLM}
    with pytest.raises(UserError, match="has chat templates for rag, tool_use, and none that is its default"):
        chat_tokenizer(tokenizer, None)
    assert chat_tokenizer(tokenizer, "chatml").chat_template.startswith("{")


def test_files_of_templates(tmp_path):
    """A mark of the byte order is no part of the text; and a pipe, which might never end, is not read."""
    file = tmp_path / "a.jinja"
    file.write_text(SMOLLM, "utf-8-sig")
    assert chat_tokenizer(tiny_tokenizer(), str(file)).chat_template == SMOLLM
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(UserError, match="is neither chatml, plain nor a Jinja file: a device or a pipe"):
            chat_tokenizer(tiny_tokenizer(), name)


def test_an_option_turns_thinking_off():
    """As at inference: the empty thought is then a part of the generation prompt."""
    quiet = stock("qwen3")
    chat_tokenizer(quiet, None, {"enable_thinking": False})
    (tree,) = prompts().render([make_row(talk_of("q"))], quiet)
    assert quiet.decode(tree.segments[0]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    (tree,) = prompts().render([make_row(talk_of("q"))], stock("qwen3"))
    assert quiet.decode(tree.segments[0]).endswith("<|im_start|>assistant\n")
    talk = talk_of("q", "<think>\nlong ago\n</think>\n\nfirst", "r", "second")
    assert learnt(talk, quiet) == ["<think>\nlong ago\n</think>\n\nfirst<|im_end|>", "second<|im_end|>"]


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError: "),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", "OverflowError: "),
        ("{{ messages[50].content }}", "no element 50"),
        ("{{ 'a' * messages }}", "TypeError: "),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{% set _ = messages.clear() %}", "is unsafe"),
        ("{{ '\\ud800' }}", "half a character"),
        ("{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "MemoryError"),
    ],
)
def test_whatever_a_template_does_is_one_line(wrong, problem, monkeypatch):
    monkeypatch.setattr(confined, "MEMORY", 2**27)
    with pytest.raises(UserError, match=problem) as raised:
        chat_tokenizer(tiny_tokenizer(wrong), None)
    assert len(raised.value.problems) == 1
    later = SMOLLM + "{% if messages | length > 4 %}" + wrong + "{% endif %}"
    fault = render(make_row(talk_of(*"abcdef")), chat_tokenizer(tiny_tokenizer(later), None), "assistant")
    assert problem in fault.reason


@pytest.mark.parametrize(
    "endless",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ lipsum(10000000) }}"],
)
def test_a_template_without_end_is_stopped(endless, monkeypatch):
    """At the first conversation, or at a later one, where it ends all: the next would take as long."""
    monkeypatch.setattr(confined, "SECONDS", 0.2)
    handler, limit = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"takes more than 0\.2 seconds to write one conversation"):
        chat_tokenizer(tiny_tokenizer(endless), None)
    later = SMOLLM + "{% if messages | length > 4 %}" + endless + "{% endif %}"
    with pytest.raises(UserError, match=r"takes more than 0\.2 seconds to write one conversation"):
        render(make_row(talk_of(*"abcdef")), chat_tokenizer(tiny_tokenizer(later), None), "assistant")
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == (handler, limit)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_what_other_threads_compute_is_not_a_templates_time(monkeypatch):
    """As the batch of a server does, beside the prompts that are written."""
    monkeypatch.setattr(confined, "SECONDS", 0.05)
    over, block = threading.Event(), bytes(2**22)

    def endless() -> None:
        while True:
            pass

    def busy() -> None:
        while not over.is_set():
            hashlib.sha256(block)  # without Python's lock

    others = threading.Thread(target=busy)
    others.start()
    try:
        began = time.process_time()
        with confined.confined():
            while time.process_time() - began < 0.2:
                time.sleep(0.01)
        with pytest.raises(UserError, match="takes more than"), confined.confined():
            endless()
    finally:
        over.set()
        others.join()


@pytest.mark.parametrize(("name", "results"), [("smollm", False), ("gemma", True), ("llama2", True), ("marked", False)])
def test_tools_that_a_template_ignores_are_written_as_text(name, results):
    voice = VOICES[name]
    tokenizer = voice.tokenizer()
    tree = tree_of(make_row(AGENT, tools=[TOOL]), tokenizer)
    assert trained_runs(tree, tokenizer) == [voice.trained(CALL_TEXT), voice.trained("Yes.")]
    text = tokenizer.decode(tree.segments[0])
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "description": "of a city"' in text
    both = "<tool_response>\nsunny, 20\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    assert (both in text) == results
    assert "sunny, 20" in text
    assert "None" not in text


def test_the_choice_of_a_template(tmp_path):
    assert (
        chat_tokenizer(tiny_tokenizer("{{ messages[0].content }}"), None).chat_template == "{{ messages[0].content }}"
    )
    chatml = chat_tokenizer(tiny_tokenizer(eos_token="<|endoftext|>"), None)
    assert chatml.eos_token == "<|im_end|>"
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED)
    saved = chat_tokenizer(tiny_tokenizer(SMOLLM), str(file))
    saved.save_pretrained(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").chat_template == MARKED
    bare = PreTrainedTokenizerFast(tokenizer_object=_words(), eos_token="</s>", bos_token="<s>")
    plain = chat_tokenizer(bare, None)
    talk = talk_of("a", "b")
    assert plain.apply_chat_template(talk, tokenize=False) == "<s>User: a\n\nAssistant: b</s>\n\n"
    assert plain.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True).endswith("\n\nAssistant:")


def _words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.mark.parametrize(
    ("choice", "tokens", "problem"),
    [
        ("chatml", {}, r"chatml needs <\|im_start\|> and <\|im_end\|> in the vocabulary; use plain"),
        ("plain", {}, "the tokenizer has none"),
        ("nowhere.jinja", {}, "'nowhere.jinja' is neither chatml, plain nor a Jinja file: No such file"),
        ("broken.jinja", {}, r"broken\.jinja:2: not a Jinja template"),
        ("fussy.jinja", {}, "cannot write a user and an assistant turn: I refuse"),
    ],
)
def test_templates_that_do_not_fit(tmp_path, monkeypatch, choice, tokens, problem):
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("\n{% for %}")
    Path("fussy.jinja").write_text("{{ raise_exception('I refuse') }}")
    with pytest.raises(UserError, match=problem):
        chat_tokenizer(PreTrainedTokenizerFast(tokenizer_object=_words(), **tokens), choice)


def test_the_time_holds_in_any_thread(monkeypatch):
    """It is the thread's own: one that waits uses none of it."""
    monkeypatch.setattr(confined, "SECONDS", 0.1)
    said = []

    def endless():
        try:
            with confined.confined():
                while True:
                    pass
        except UserError as error:
            said.append(str(error))
        with confined.confined():
            time.sleep(0.3)
        said.append("the next has a time of its own")

    thread = threading.Thread(target=endless)
    thread.start()
    thread.join()
    assert said[0].startswith("the chat template takes more than 0.1 seconds")
    assert said[1:] == ["the next has a time of its own"]
