"""Names by a classifier of tokens, made by hand so that it knows three of them."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from align.data.preparing.privacy import Privacy
from align.recipe.errors import UserError
from align.recipe.preparing.privacy import Privacy as Section
from align.tools.preparing.names import NameModel, is_person, names_of

NAMES = ("Ann", "Lee", "Bo")
OTHERS = ("met", "and", "the", "cat", "of", ".", "-")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """No layers: the embedding of a name points one way, of all else the other, and the head reads that."""
    folder = tmp_path_factory.mktemp("names")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *NAMES, *OTHERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=32, id2label={0: "O", 1: "B-PER"}, label2id={"O": 0, "B-PER": 1}, pad_token_id=0,
    )  # fmt: skip
    made = BertForTokenClassification(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        for name, parameter in made.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.fill_(1)
        words = made.bert.embeddings.word_embeddings.weight
        words[:] = torch.tensor([-1.0, 1, -1, 1])
        words[2 : 2 + len(NAMES)] = torch.tensor([1.0, -1, 1, -1])
        made.classifier.weight[1] = torch.tensor([1.0, -1, 1, -1])
    made.save_pretrained(folder)
    return str(folder)


def test_names_are_masked_and_a_surname_is_the_same_person(model):
    names = names_of(Section(names=model))
    text = ["Ann Lee met the cat of Bo.", "Lee and Bo", "", "the cat"]
    assert Privacy(names=names).mask(text).value == [
        "<NAME_1> met the cat of <NAME_2>.",
        "<NAME_1> and <NAME_2>",
        "",
        "the cat",
    ]


def test_a_text_longer_than_the_model_is_read_in_windows(model):
    text = " ".join(["the cat met"] * 30 + ["Ann Lee"] + ["and the cat"] * 30)
    (found,) = NameModel(model)([text])[0]
    assert text[found.start : found.end] == "Ann Lee"


def test_a_model_without_persons_or_without_a_head_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"prepare\.privacy\.names"):
        NameModel(str(tmp_path))
    assert [is_person(label) for label in ("B-PER", "PERSON", "i-per", "LOC", "B-ORG", "O")] == [True] * 3 + [False] * 3


def test_presidio_is_told_with_the_command_that_installs_it():
    try:
        import presidio_analyzer  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'align\[prepare-presidio\]'"):
            names_of(Section(presidio=["CRYPTO"]))
    else:
        found = Privacy(names=names_of(Section(presidio=["CRYPTO"]))).mask("pay to 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ")
        assert found.value == "pay to <CRYPTO_1>"
