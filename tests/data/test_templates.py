import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from voices import (
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

from align.data.chat import chat_of
from align.data.templates import chat_tokenizer
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
PICTURES = {"idefics3", "smolvlm", "llava_next"}  # their content is a list of pictures and texts
STOCK = sorted(
    path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training") and path.stem not in PICTURES
)


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates(name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(template, bos_token="<s>", eos_token="</s>")
    words = set(re.findall(r"<[|｜/_a-z][^<>\s']*[|｜a-z_]>|</s>", template))
    tokenizer.add_tokens(sorted(word for word in words if "tool" not in word and "think" not in word))
    first, second = learnt(talk_of("q", "春风", "r", "wind"), tokenizer)
    assert ("春风" in first, "wind" in first, "wind" in second) == (True, False, True)
    call, answer = learnt(AGENT, tokenizer, tools=[TOOL])
    assert ("weather" in call, "北京" in call, "Yes." in answer) == (True, True, True)
    assert not any(word in call + answer for word in ("sunny", "rain", "Is it"))


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
