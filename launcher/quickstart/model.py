"""A small generated Llama and its tokenizer: the base model of the quickstart and of many tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
TOKENS_PER_ROW = 64
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama. Widths are multiples of 64, the block of a 4-bit weight."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vocabulary: int = 512
    positions: int = 512


def make_model(folder: Path, shape: LlamaShape, texts: Sequence[str], seed: int) -> Path:
    """Writes an untrained Llama in float32 and a tokenizer trained on ``texts``; returns ``folder``.

    The files are written next to ``folder`` and then moved, so an interrupted call leaves nothing that looks like a
    model: a ``config.json`` in ``folder`` means that the model is complete.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(texts, shape.vocabulary)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return save(folder, model, tokenizer)


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Returns a byte-level BPE tokenizer with a chat template. It puts a BOS before a text and encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, BOS, EOS, UNK], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **names)


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Writes model and tokenizer to a temporary folder, then replaces ``folder`` with it; returns ``folder``."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def pretrain(
    folder: Path,
    texts: Sequence[str],
    *,
    steps: int,
    seed: int,
    lr: float = 3e-3,
    rows: int = 32,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Trains all weights of the model in ``folder`` on ``texts``, in this process; returns the last step's loss.

    ``on_step(step, loss)`` is called after each step, counted from 1.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Matrices of this size gain nothing from a second thread. On a core that another process uses, threads that wait
    # for each other made a step twenty times slower.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.05)
    loss = float("nan")
    samples = tokenizer(list(texts))["input_ids"]  # each text from BOS to EOS, all in one row
    stream = torch.tensor([token for sample in samples for token in (*sample, tokenizer.eos_token_id)])
    for step, batch_RT in enumerate(_batches(stream, steps, rows, seed), 1):
        out = model(input_ids=batch_RT, labels=batch_RT, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = out.loss.item()
        on_step(step, loss)
    save(folder, model, tokenizer)
    return loss


def _batches(stream: torch.Tensor, steps: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields ``steps`` batches [rows, TOKENS_PER_ROW] from random positions of ``stream``."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - TOKENS_PER_ROW, (rows, 1), generator=generator)
        yield stream[starts + torch.arange(TOKENS_PER_ROW)]
