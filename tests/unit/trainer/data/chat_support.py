"""Tokenizers whose tokens are bytes and marks, so that texts and targets can be read, and chat templates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.data.formats import open_format
from trainer.data.preview import text_spans
from trainer.data.sample import RowError, Sample
from trainer.data.spec import FrozenSource, PreparationSpec

MARKS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<think>", "</think>")

# ChatML that knows neither tools nor reasoning.
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Calls with their arguments as a mapping, and a system text of its own.
CALLING = """{% if messages[0].role != 'system' %}<|im_start|>system
Be kind.{% for t in tools or [] %} {{ t | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The same with the arguments concatenated, which must be text.
CALLING_TEXT = CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments")

# Reasoning is written in the turns after the last question only.
THINKING = """{% set last = namespace(i=-1) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set last.i = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > last.i %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}\
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The generation prompt opens reasoning, which an answer without it does not have.
OPENED = PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")

# A turn ends where the mark of the next one begins.
ROLE_ENDS = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

# No token ends a turn.
WITHOUT_END = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

# Contents must be lists of parts.
PARTS = PLAIN.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")

# The template says itself what is generated: not the first letter of an answer.
BLOCKS = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content[0] }}{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + PLAIN


@functools.cache
def byte_tokenizer(eos: str = "<|im_end|>", around: str | None = None, template: str | None = None) -> Any:
    """``around``: what the tokenizer puts around a text, such as ``<s> $A``."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([], trainer)
    if around:
        marks = [(mark, made.token_to_id(mark)) for mark in MARKS[:2] if mark in around]
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def prefixing_tokenizer() -> Any:
    """As Llama 2's: the normaliser puts a space before each text, and a word holds the space before it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    merges = []
    for word in ("▁Who", "▁Mira", "Mira", "Answer:", "▁Question:"):
        made = word[0]
        for letter in word:
            vocab.setdefault(letter, len(vocab))
        for letter in word[1:]:
            merges += [(made, letter)] if (made, letter) not in merges else []
            made += letter
            vocab.setdefault(made, len(vocab))
    tokens = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def encoded(
    row: dict[str, Any], template: str | None = None, *, by: Any = None, format: str = "messages", **settings: Any
) -> list[Sample] | RowError:
    """Encodes a row. ``settings``: fields of PreparationSpec or of FrozenSource."""
    of_spec = {name: settings.pop(name) for name in ("stops", "date", "special_tokens", "task") if name in settings}
    source = FrozenSource("x", format, (), **settings)
    spec = PreparationSpec((source,), "t", 4096, chat_template=template, **of_spec)
    (found,) = open_format(source, by or byte_tokenizer(), spec).encode([row])
    return [found] if isinstance(found, Sample) else found


def texts(samples: list[Sample] | RowError, by: Any = None) -> list[str]:
    """Returns each sample's text with its targets between ⟦ and ⟧."""
    assert not isinstance(samples, RowError), samples.reason
    return [marked(by or byte_tokenizer(), sample) for sample in samples]


def marked(tokenizer: Any, sample: Sample) -> str:
    spans = text_spans(tokenizer, sample.tokens, sample.target)
    return "".join(f"⟦{text}⟧" if target else text for text, target in spans)


def targets(samples: list[Sample] | RowError, by: Any = None) -> list[str]:
    """Returns the trained texts, in order."""
    assert not isinstance(samples, RowError), samples.reason
    spans = [text_spans(by or byte_tokenizer(), sample.tokens, sample.target) for sample in samples]
    return [text for one in spans for text, target in one if target]


def chat(*turns: Sequence[Any], **columns: Any) -> dict[str, Any]:
    """A row of turns, each as (role, content) or (role, content, further keys)."""
    messages = [{"role": role, "content": content, **(rest[0] if rest else {})} for role, content, *rest in turns]
    return {"messages": messages, **columns}
