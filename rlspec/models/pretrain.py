"""Make the embedded base model from scratch: ``python -m rlspec.models.pretrain --out FOLDER``.

A Llama 192 wide with 6 layers (2.5 M parameters), trained on :mod:`rlspec.models.corpus`, loss on the answer
tokens, hidden matrices by Muon and the rest by AdamW. Seeds are fixed; on the same machine with the same
torch the result is the same. About a quarter of an hour on 2 cores.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlspec.io.files import give_usual_modes
from rlspec.models.corpus import KINDS, example
from rlspec.models.muon import Muon
from rlspec.models.vocabulary import make_tokenizer

#: Examples per optimizer step, by kind. Kinds of like length share a forward pass, so that little is padding.
GROUPS: tuple[dict[str, int], ...] = (
    {"solve": 32, "translate": 12, "arithmetic": 4},
    {"copy": 24, "alias": 40},
)
IGNORE = -100
ADAMW_RATE = 3e-3


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised model of the embedded architecture, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def collate(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """``(input_ids, labels)``, both (batch, time) int64, padded on the right, prompt tokens without loss."""
    ids = tokenizer.get_vocab()
    rows, marks = [], []
    for prompt, answer in pairs:
        head = ["<s>", *prompt.split(), ">"]
        tail = [*answer.split(), "</s>"]
        rows.append([ids[word] for word in head + tail])
        marks.append(len(head))
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORE)
    for i, (row, mark) in enumerate(zip(rows, marks)):
        tokens[i, : len(row)] = torch.tensor(row)
        labels[i, mark : len(row)] = torch.tensor(row[mark:])
    return tokens, labels


def answer_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy over answer tokens, and whether each row is right at every token (greedy)."""
    # Padding is on the right, so the causal mask alone keeps it out of sight.
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), wanted.reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    right = ((logits.argmax(-1) == wanted) | (wanted == IGNORE)).all(-1)
    return loss, right


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: linear warm-up over 50 steps, constant, linear down to 0 over the last 40 %."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


def accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, n: int
) -> dict[str, float]:
    """Share of ``n`` fresh examples, per kind, answered right at every token under teacher forcing."""
    result = {}
    model.eval()
    with torch.inference_mode():
        for kind in KINDS:
            rng = random.Random(f"held-out/{seed}/{kind}")
            _, right = answer_loss(model, *collate([example(kind, rng) for _ in range(n)], tokenizer))
            result[kind] = right.float().mean().item()
    model.train()
    return result


def pretrain(out: Path, *, steps: int, peak: float, seed: int, held_out: int) -> dict[str, float]:
    """Train and save; returns the final accuracies, on ``held_out`` fresh examples of each kind."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers." not in name]
    muon = Muon(hidden)
    adamw = torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    begin = time.monotonic()
    for step in range(steps):
        rng = random.Random(f"pretrain/{seed}/{step}")
        batches = [
            collate([example(kind, rng) for kind, count in group.items() for _ in range(count)], tokenizer)
            for group in GROUPS
        ]
        total = sum(int((labels != IGNORE).sum()) for _, labels in batches)
        scale = learning_rate(step, steps)
        for parameters in adamw.param_groups:
            parameters["lr"] = ADAMW_RATE * scale
        logged = 0.0
        for tokens, labels in batches:
            loss, _ = answer_loss(model, tokens, labels)
            (loss / total).backward()
            logged += loss.item() / total
        muon.step(peak * scale, weight_decay=0.05)
        adamw.step()
        model.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            quick = accuracies(model, tokenizer, seed, n=min(256, held_out))
            shown = {k: round(v, 3) for k, v in quick.items()}
            click.echo(
                f"step {step:5d}  {time.monotonic() - begin:6.0f} s  loss {logged:.4f}  {json.dumps(shown)}"
            )
    final = accuracies(model, tokenizer, seed, n=held_out)
    # Stored in bfloat16: half the size, and the base is then exactly what a bfloat16 checkpoint can hold.
    stored: Any = model
    stored.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    give_usual_modes(Path(out))
    click.echo(f"saved to {out}: {json.dumps({k: round(v, 4) for k, v in final.items()})}")
    return final


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the checkpoint to."
)
@click.option("--steps", default=1500, show_default=True, help="Optimizer steps of 112 examples.")
@click.option("--learning-rate", "peak", default=2e-2, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights and of the data.")
@click.option(
    "--held-out", default=2048, show_default=True, help="Examples of each kind in the final accuracies."
)
def main(out: Path, steps: int, peak: float, seed: int, held_out: int) -> None:
    if out.exists():
        raise click.ClickException(f"{out} exists already; give a folder that does not")
    pretrain(out, steps=steps, peak=peak, seed=seed, held_out=held_out)


if __name__ == "__main__":
    main()
