"""The embedded model's tokenizer: one token per number, card, symbol and word of the compact task form."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
NUMBERS = tuple(str(i) for i in range(37))
LETTERS = ("A", "J", "Q", "K", "X", "Y", "Z")
SYMBOLS = ("(", ")", "+", "-", "*", "/", "=", ">")
WORDS = ("rule", "target", "cards", "number", "formula", "solve", "copy")
VERIFIER_WORDS = ("unfinished", "wrong", "value", "numbers", "illegal")
VOCABULARY = SPECIAL + NUMBERS + LETTERS + SYMBOLS + WORDS + VERIFIER_WORDS

#: A user turn ends with ">", an answer with "</s>"; the first turn follows "<s>".
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ ' ' + m['content'] + ' >' }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; it carries the chat template and ``rlspec_style="compact"``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        rlspec_style="compact",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
