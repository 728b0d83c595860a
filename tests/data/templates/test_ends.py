import pytest
from data.voices import SMOLLM, VOICES, learnt, talk_of, tiny_tokenizer

from align.data.templates.ends import TurnEnds, turn_ends
from align.data.templates.templates import chat_tokenizer


@pytest.mark.parametrize("name", VOICES)
def test_the_end_that_is_trained_is_the_end(name):
    """Whatever the tokenizer calls its end of text."""
    voice = VOICES[name]
    for eos in ("<|endoftext|>", "</s>", "<|user|>"):
        tokenizer = tiny_tokenizer(voice.template, **voice.tokens | {"eos_token": voice.tokens.get("eos_token", eos)})
        assert tokenizer.convert_ids_to_tokens(list(turn_ends(tokenizer).ids)) == [voice.end.strip()]
        assert turn_ends(tokenizer).remark == ""


def test_ends_that_are_no_token():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ end }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    ends = turn_ends(tiny_tokenizer(template.replace("end }}", "'\\n###\\n' }}", 1)))
    assert ends == TurnEnds((), ("###",))
    assert "ends a turn with '###', which is no single token" in ends.remark
    ends = turn_ends(tiny_tokenizer(template.replace("{{ end }}", "\n")))
    assert ends == TurnEnds((), ())
    assert "never learns to stop" in ends.remark


def test_the_end_of_the_last_turn_where_it_is_another():
    template = SMOLLM.replace("'<|im_end|>' + '\n'", "('</s>' if loop.last else '<|im_end|>') + '\n'")
    assert template != SMOLLM
    tokenizer = tiny_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(list(turn_ends(tokenizer).ids)) == ["</s>"]


def test_the_end_before_a_system_turn_where_that_is_another():
    """GLM's turns end with the name of the next speaker."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|"
        "{{ loop.nextitem.role if loop.nextitem else 'user' }}|>{% endgeneration %}{% else %}"
        "{% if loop.first or loop.previtem.role != 'assistant' %}<|{{ m.role }}|>{% endif %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    talk = talk_of("q", "a", "r", "b")
    talk.insert(2, {"role": "system", "content": "s"})
    ends = {run.strip()[1:] for run in learnt(talk, tokenizer)}
    assert ends == set(tokenizer.convert_ids_to_tokens(list(turn_ends(tokenizer).ids)))


def test_builtin_templates():
    for choice in ("chatml", "plain"):
        tokenizer = chat_tokenizer(tiny_tokenizer(eos_token="<|endoftext|>"), choice)
        assert turn_ends(tokenizer).ids == (tokenizer.eos_token_id,)
