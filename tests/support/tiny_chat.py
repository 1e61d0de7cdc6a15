"""A tiny chat model with a tokenizer of its own, and instruction rows. No network."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        answer = draw.choice(["true", "false"])
        words = " ".join(draw.choices(["cat", "dog", "river", "stone", "cloud"], k=draw.randint(2, 9)))
        made.append(
            {"instruction": f"Is number {i} {words}?", "input": "", "output": f"the correct answer is {answer}"}
        )
    return made


def write_jsonl(path: Path, lines: list) -> Path:
    """Writes rows, and lines that are to be as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in rows(50)], trainer)
    # as in SmolLM2, one token both ends an answer and pads a batch
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, around: str) -> PreTrainedTokenizerFast:
    """Lets the tokenizer put tokens around each text, `$A`, such as "<|im_start|> $A <|im_end|>"."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in around.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return tokenizer


def save_chat_model(folder: Path) -> None:
    """A Llama of two layers, 64 wide, with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
