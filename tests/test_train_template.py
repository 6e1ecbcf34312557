"""Chat templates of the kinds that models ship: what is rendered, what ends an answer, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from train_toys import byte_tokenizer, toy_model

from rlspec.cli.main import main
from rlspec.errors import CheckpointError
from rlspec.train.encode import decode_answer, encode_answer, encode_example, encode_prompt, stop_ids
from rlspec.train.generate import generate
from rlspec.train.template import Closing, closing, render

QUESTION = [{"role": "user", "content": "cards 3 4 5 6"}]
STRINGS = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}assistant: "
PARTS = (
    "{% for m in messages %}{{m.role}}: {% for c in m.content %}{% if c.type == 'text' %}{{c.text}}"
    "{% endif %}{% endfor %}{{'\n'}}{% endfor %}assistant: "
)
# Raises for a plain string, as a template that indexes the parts does.
INDEXED = "{% for m in messages %}{{m.role}}: {{m.content[0].text + '\n'}}{% endfor %}assistant: "


def turns(turn: str, start: str, end: str = "") -> str:
    """A template of turns, with what opens the answer and what closes a conversation."""
    return (
        f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{start}"
        f"{{% else %}}{end}{{% endif %}}"
    )


CHATML = turns("<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n", "<|im_start|>assistant\n")
ENDS = {
    "qwen-instruct": ("<|im_end|>", ["<|im_start|>", "<|endoftext|>"], CHATML, "<|im_end|>"),
    "qwen-base": ("<|endoftext|>", ["<|im_start|>", "<|im_end|>"], CHATML, "<|im_end|>"),
    "gemma": (
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        turns("<start_of_turn>{{m.role}}\n{{m.content|trim}}<end_of_turn>\n", "<start_of_turn>assistant\n"),
        "<end_of_turn>",
    ),
    "phi-3": (
        "<|endoftext|>",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        turns("<|{{m.role}}|>\n{{m.content}}<|end|>\n", "<|assistant|>\n", "{{eos_token}}"),
        "<|end|>",
    ),
    "llama-2": (
        "</s>",
        [],
        turns(
            "{% if m.role == 'user' %}[INST] {{m.content}} [/INST]{% else %} {{m.content + ' ' + eos_token}}"
            "{% endif %}",
            " ",
        ),
        " </s>",
    ),
}


@pytest.mark.parametrize("template", [STRINGS, PARTS, INDEXED])
def test_a_rendered_prompt_holds_the_question(template: str) -> None:
    tokenizer = byte_tokenizer("<e>", template=template)
    assert tokenizer.decode(encode_prompt(tokenizer, QUESTION)) == "user: cards 3 4 5 6\nassistant: "


@pytest.mark.parametrize("name", ENDS)
def test_prompts_are_the_ids_that_transformers_gives(name: str) -> None:
    eos, others, template, _ = ENDS[name]
    tokenizer = byte_tokenizer(eos, *others, template=template)
    messages = [*QUESTION, {"role": "assistant", "content": "7"}, {"role": "user", "content": "no"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, messages) == theirs


@pytest.mark.parametrize("name", ENDS)
def test_an_example_is_what_the_template_renders_up_to_the_turns_end(name: str) -> None:
    eos, others, template, end = ENDS[name]
    tokenizer = byte_tokenizer(eos, *others, template=template)
    ids, carries_loss = encode_example(tokenizer, QUESTION, "4")
    whole = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": "4"}], return_dict=False
    )
    assert whole[: len(ids)] == ids
    taught = [token for token, counts in zip(ids, carries_loss) if counts]
    assert tokenizer.decode(taught) == "4" + end
    assert decode_answer(tokenizer, taught) == "4"


def test_sampling_stops_where_the_template_ends_a_turn() -> None:
    eos, others, template, end = ENDS["gemma"]
    tokenizer = byte_tokenizer(eos, *others, template=template)
    model = toy_model(vocab_size=len(tokenizer), eos_token_id=None)
    ended = tokenizer.convert_tokens_to_ids(end)
    assert stop_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, ended])
    # A model that says nothing else: its first token is its last.
    certain = torch.nn.functional.one_hot(torch.tensor(ended), len(tokenizer)) * 9.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 0 + certain)
    answers = generate(model, tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=5, temperature=0).tokens
    assert answers == [[ended], [ended]]


def test_an_earlier_answer_is_in_the_prompt_where_the_template_wants_parts_of_it() -> None:
    template = turns(
        "{% if m.role == 'user' %}{{m.content if m.content is string else m.content[0].text}}>"
        "{% else %}{% for c in m.content %}{{c.text}}{% endfor %}<e>{% endif %}",
        "",
    )
    tokenizer = byte_tokenizer("<e>", template=template)
    messages = [*QUESTION, {"role": "assistant", "content": "7"}, {"role": "user", "content": "no"}]
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == "cards 3 4 5 6>7<e>no>"
    assert closing(tokenizer) == Closing("<e>", tokenizer.eos_token_id)


def test_a_template_may_leave_out_an_earlier_answer_but_not_a_question() -> None:
    forgets = byte_tokenizer(
        "<e>",
        template="{% for m in messages %}{% if m.role == 'user' %}{{m.content}}>{% endif %}{% endfor %}",
    )
    messages = [*QUESTION, {"role": "assistant", "content": "7"}, {"role": "user", "content": "no"}]
    assert forgets.decode(encode_prompt(forgets, messages)) == "cards 3 4 5 6>no>"
    forgets.chat_template = "{{ messages[-1].content }}>"
    with pytest.raises(CheckpointError, match="without the question's text"):
        encode_prompt(forgets, messages)


def test_an_end_that_is_a_plain_added_token_is_cut_from_the_text() -> None:
    tokenizer = byte_tokenizer("<e>", template=turns("{{m.content}}<end>", ""))
    tokenizer.add_tokens(["<end>", "\n"])
    answer = encode_answer(tokenizer, "4")
    assert tokenizer.convert_ids_to_tokens(answer) == ["4", "<end>"]
    assert decode_answer(tokenizer, answer) == "4"


@pytest.mark.parametrize("template", [None, STRINGS])
def test_without_an_end_in_the_template_the_end_token_closes(template: str | None) -> None:
    tokenizer = byte_tokenizer("<e>", template=template)
    assert closing(tokenizer) is None
    assert encode_answer(tokenizer, "4")[-1] == tokenizer.eos_token_id


def test_a_new_template_on_the_same_tokenizer_is_noticed() -> None:
    tokenizer = byte_tokenizer("<e>", "<end>", template=turns("{{m.content}}<end>", ""))
    first = closing(tokenizer)
    tokenizer.chat_template = turns("{{m.content}}{{eos_token}}", "")
    second = closing(tokenizer)
    assert first is not None and second is not None and (first.text, second.text) == ("<end>", "<e>")


BAD = {
    "raises": ("{{ raise_exception('no chat here') }}", "no chat here"),
    "does not parse": ("{% for m in messages %}", "Unexpected end of template"),
    "leaves the question out": ("assistant: ", "without the question's text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_template_of_no_use_is_one_line(kind: str) -> None:
    template, why = BAD[kind]
    with pytest.raises(CheckpointError, match=why) as caught:
        render(byte_tokenizer("<e>", template=template), QUESTION, add_generation_prompt=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["track", "eval"])
def test_commands_refuse_a_bad_template_and_leave_no_folder(command: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "run"
    tokenizer = byte_tokenizer("<e>", template=BAD["leaves the question out"][0])
    toy_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = [command, "--model", str(folder), "--deals", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, *(["--out", str(out)] if command == "track" else [])])
    assert result.exit_code == 2 and not out.exists()
    assert result.stderr.count("\n") == 1 and str(folder) in result.stderr
