import numpy as np
import pytest
from data.voices import (
    FORGETFUL,
    MARKED,
    SMOLLM,
    VOICES,
    learnt,
    make_row,
    talk_of,
    tiny_tokenizer,
    trained_runs,
    tree_of,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from align.data.formats.formats import Fault
from align.data.templates.chats import chat_of
from align.data.templates.marking import show
from align.data.templates.render import prompt_key, render, render_rows
from align.data.templates.templates import chat_tokenizer


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", VOICES)
def test_every_assistant_turn_is_learnt_and_nothing_else(name, trim):
    voice = VOICES[name]
    tokenizer = voice.tokenizer(trim=trim)
    answers = ["写一首诗。春风 🌸🌷", "def f():\n        return 1", "👩‍👩‍👧 and é"]
    talk = talk_of("hi", answers[0], "你好 🌸", answers[1], "more", answers[2], system="Be brief.")
    assert learnt(talk, tokenizer) == [voice.trained(answer) for answer in answers]
    assert learnt(talk, tokenizer, "last") == [voice.trained(answers[-1])]


@st.composite
def talks(draw):
    # Words that begin with a newline could share a token with the header before them, so none do.
    texts = st.text(st.sampled_from("aZ 9.\n:{}<|>春🌸é\u200d👩"), min_size=1, max_size=12).filter(
        lambda text: text.strip() and text[0] not in "\n "
    )
    turns = 2 * draw(st.integers(1, 4))
    return talk_of(*(draw(texts) for _ in range(turns)), system=draw(st.none() | texts))


@pytest.mark.parametrize("name", VOICES)
@settings(max_examples=60, deadline=None)
@given(talk=talks(), trim=st.booleans())
def test_any_conversation_in_any_template(name, talk, trim):
    voice = VOICES[name]
    answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
    spoken = learnt(talk, voice.tokenizer(trim=trim))
    assert "".join(spoken) == "".join(map(voice.trained, answers))


@settings(max_examples=60, deadline=None)
@given(talk=talks())
def test_spans_are_what_follows_the_generation_prompt(talk):
    """The oracle: the conversation up to each turn, with and without it, each a prefix of the whole."""
    tokenizer = tiny_tokenizer(SMOLLM)
    wanted = range(sum(turn["role"] == "assistant" for turn in talk))
    text, spans = chat_of(tokenizer).turns(talk, None, set(wanted))
    assert text == written(talk, tokenizer)
    places = [i for i, turn in enumerate(talk) if turn["role"] == "assistant"]
    for i, (begin, own, end, lost) in zip(places, spans, strict=True):
        assert (own, lost) == (begin, "")
        assert text[:begin] == tokenizer.apply_chat_template(talk[:i], tokenize=False, add_generation_prompt=True)
        assert text[:end] == tokenizer.apply_chat_template(talk[: i + 1], tokenize=False).rstrip()


def test_tokens_are_those_of_the_template():
    tokenizer = VOICES["gemma"].tokenizer()
    talk = talk_of("hi", "春风 🌸", "more", "  padded  ")
    ids = tree_of(make_row(talk), tokenizer).segments[0].tolist()
    whole = tokenizer.apply_chat_template(talk)["input_ids"]
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n", "what follows the last end of turn is left off"
    assert tree_of(make_row(talk), tokenizer).segments[0].dtype == np.int32


@pytest.mark.parametrize("pad", ["<|im_end|>", "<s>", "<|endoftext|>"])
def test_the_mask_does_not_know_the_pad_token(pad):
    tokenizer = tiny_tokenizer(SMOLLM, pad_token=pad)
    tree = tree_of(make_row(talk_of("q", "yes", "r", "no so", system="S")), tokenizer)
    golden = {
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n": False,
        "yes<|im_end|>": True,
        "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n": False,
        "no so<|im_end|>": True,
    }
    expected = [trained for text, trained in golden.items() for _ in tokenizer(text)["input_ids"]]
    assert tree.trained[0].tolist() == expected


def test_the_default_system_prompt_stays():
    tokenizer = tiny_tokenizer(SMOLLM)
    text = tokenizer.decode(tree_of(make_row(talk_of("hi", "ho")), tokenizer).segments[0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert "SmolLM" not in tokenizer.decode(tree_of(make_row(talk_of("hi", "ho", system="S")), tokenizer).segments[0])


def test_a_template_that_forgets_thoughts():
    tokenizer = tiny_tokenizer(FORGETFUL)
    talk = talk_of("q", "<think>\nlong ago\n</think>\n\nfirst", "r", "<think>\nnow\n</think>\n\nsecond")
    assert learnt(talk, tokenizer) == ["<think>\nnow\n</think>\n\nsecond<|im_end|>"]
    assert tree_of(make_row(talk), tokenizer).notes == (
        "assistant turn 1 is context, not learnt: the chat template leaves out its thoughts",
    )
    lost = render(
        make_row([*talk, {"role": "user", "content": "s"}, {**talk[1], "train": False}]), tokenizer, "assistant"
    )
    assert lost.reason.startswith(
        "the chat template leaves out the thoughts of every assistant turn that is to be learnt"
    )
    plain = make_row(talk_of("q", "first", "r", "second"))
    runs = trained_runs(tree_of(plain, tokenizer), tokenizer)
    assert runs == ["first<|im_end|>", "second<|im_end|>"], "the template's own empty thought is context"
    (tree,) = render_rows([plain], tokenizer, "assistant", empty_thoughts=True)
    assert trained_runs(tree, tokenizer) == ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]


THOUGHT_READER = FORGETFUL.replace("message.content", "message.content.split('</think>')[-1]", 1).replace(
    "{%- set thoughts = '' %}", "{%- set thoughts = message.reasoning_content or '' %}"
)


@pytest.mark.parametrize("template", [FORGETFUL, THOUGHT_READER], ids=["in the content", "beside it"])
@pytest.mark.parametrize("said", ["Wait. {} Yes.", "{}Wait. {} Yes."])
def test_words_before_a_thought_are_not_lost_in_silence(template, said):
    """Templates cut a content at its last thought."""
    said = said.replace("{}", "<think>\nnow\n</think>\n\n")
    fault = render(make_row(talk_of("q", said)), tiny_tokenizer(template), "assistant")
    assert isinstance(fault, Fault)
    assert "leaves out the " in fault.reason
    assert "words of every assistant turn" in fault.reason
    (kept,) = learnt(talk_of("q", said), tiny_tokenizer(SMOLLM))
    assert kept == f"{said}<|im_end|>"


def test_a_template_that_ends_the_last_turn_otherwise():
    template = SMOLLM.replace("+ '<|im_end|>' + '\n'", "+ ('</s>' if loop.last else '<|im_end|>\n')")
    assert template != SMOLLM
    spoken = learnt(talk_of("q", "a", "r", "b"), tiny_tokenizer(template))
    assert spoken == ["a", "b</s>"]


def test_marks_that_stop_before_the_end_of_turn_are_stretched():
    short = MARKED.replace("+ '<|endoftext|>\n' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|endoftext|>\n' }}")
    assert short != MARKED
    tokenizer = tiny_tokenizer(short, eos_token="<|endoftext|>")
    assert learnt(talk_of("q", "a", "r", "b"), tokenizer) == ["a<|endoftext|>", "b<|endoftext|>"]


def test_context_turns_are_not_learnt():
    talk = talk_of("q", "first", "r", "second", "s", "third")
    talk[1]["train"] = False
    tokenizer = tiny_tokenizer(SMOLLM)
    assert learnt(talk, tokenizer) == ["second<|im_end|>", "third<|im_end|>"]
    everything = "".join(learnt(talk, tokenizer, "all"))
    assert "first" not in everything
    assert "You are a helpful" in everything
    assert everything.endswith("third<|im_end|>")
    talk[5]["train"] = False
    reason = render(make_row(talk), tokenizer, "last").reason
    assert reason == "no trained token: the last assistant turn is context only"


def test_all_but_the_first_token_with_loss_on_all():
    tree = tree_of(make_row(talk_of("q", "a")), tiny_tokenizer(SMOLLM), "all")
    assert tree.trained[0].tolist() == [False] + [True] * (len(tree.segments[0]) - 1)


@pytest.mark.parametrize("name", VOICES)
def test_an_empty_turn_is_a_fault(name):
    fault = render(make_row(talk_of("q", "a", "r", " \n")), VOICES[name].tokenizer(), "assistant")
    assert fault == Fault("rows.jsonl", 7, "no trained token in assistant turn 2: it is empty")


def test_what_the_template_refuses_is_a_fault_with_its_words():
    rows = [make_row(talk_of("q", "a")), make_row(talk_of("q", "a")[:1] + talk_of("q", "a"))]
    good, bad = render_rows(rows, VOICES["gemma"].tokenizer(), "assistant")
    assert good.label_count > 0
    assert "roles must alternate user/assistant" in bad.reason


def test_what_the_template_leaves_out_is_a_fault():
    recent = SMOLLM.replace("in messages", "in messages[-2:]")
    fault = render(make_row(talk_of("first", "a", "second", "b")), tiny_tokenizer(recent), "assistant")
    assert fault.reason == "the chat template leaves out turn 1 (user)"
    shouting = SMOLLM.replace("message['content']", "message['content'] | upper")
    fault = render(make_row(talk_of("Q", "a", "R", "b")), tiny_tokenizer(shouting), "assistant")
    assert fault.reason.startswith("the chat template leaves out the words of every assistant turn")
    counting = SMOLLM.replace("message['content'] +", "message['content'] ~ message['content'] | length ~")
    counted = render(make_row(talk_of("q", "a", "r", "b")), tiny_tokenizer(counting), "assistant")
    assert "changes or leaves out an assistant turn" in counted.reason
    cutting = SMOLLM.replace("message['content']", "message['content'][:4]")
    fault = render(make_row(talk_of("q", "answer", "r", "b")), tiny_tokenizer(cutting), "assistant")
    assert fault.reason == "the chat template leaves out turn 2 (assistant)"


def test_a_text_row_is_learnt_whole():
    tokenizer = tiny_tokenizer(eos_token="</s>")
    tree = tree_of(make_row(text="春风 wind"), tokenizer)
    assert tokenizer.decode(tree.segments[0]) == "春风 wind</s>"
    assert tree.trained[0].tolist() == [False] + [True] * (len(tree.segments[0]) - 1)
    with_bos = tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    ids = tree_of(make_row(text="wind</s>"), with_bos).segments[0].tolist()
    assert with_bos.decode(ids) == "<s>wind</s></s>"
    assert ids.count(with_bos.eos_token_id) == 1, "the end that stands in the text is text"


def test_a_sentencepiece_style_tokenizer():
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special[:3], show_progress=False)
    backend.train_from_iterator(["the answer is yes"] * 3, trainer)
    backend.add_tokens(special[3:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    chat_tokenizer(tokenizer, "plain")
    spoken = learnt(talk_of("hi", "the answer", "is", "yes"), tokenizer)
    assert [run.strip() for run in spoken] == ["the answer</s>", "yes</s>"]


def test_show_marks_the_trained_tokens():
    tokenizer = tiny_tokenizer(SMOLLM)
    tree = tree_of(make_row(talk_of("q", "春 wind", system="S")), tokenizer)
    asked = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert show(tree, tokenizer, colour=False).plain == f"{asked}⟦春 wind<|im_end|>⟧"
    coloured = show(tree, tokenizer, colour=True)
    assert [coloured.plain[span.start : span.end] for span in coloured.spans] == ["春 wind<|im_end|>"]


def test_the_prompt_key_is_all_before_the_first_answer():
    key = prompt_key(make_row(talk_of("a  b\n", "x", "more", "y")))
    assert key == prompt_key(make_row(talk_of("a b", "z")))
    others = [talk_of("a c", "x"), talk_of("a b", "x", system="S"), talk_of("", "a b")]
    assert key not in {prompt_key(make_row(talk)) for talk in others}
    assert key != prompt_key(make_row(talk_of("a b", "x"), tools=[{"type": "function"}]))
    opens = [[{"role": "assistant", "content": words}] for words in ("hello", "bye")]
    assert prompt_key(make_row(opens[0])) != prompt_key(make_row(opens[1]))
    assert prompt_key(make_row(text="a\n b")) == prompt_key(make_row(text="a b")) != prompt_key(make_row(text="a"))
