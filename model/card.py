"""The model card of an exported folder: what is known of the model, in words that are true of every export."""

from model.checkpoint import Checkpoint, describe

_CARD = """\
---
library_name: transformers
tags:
- medical-events
- federated-learning
---

# A generative model of medical events

A decoder of the class `Qwen2ForCausalLM` over the tokens of a fedcomet codebook. They are not text but medical events:
codes, values, ages and intervals of time. It continues a patient's timeline.

Not a medical device. What it was tested on is not known to this file; ask whoever gave it to you.

## What is known of it

| | |
|---|---|
{facts}

## Files

{files}

## Use

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/folder")
model.generate(tokens, max_new_tokens=100)  # tokens: int64 [patients, positions], ids of the codebook
```

What this class does not do, and fedcomet does:

- keep to the codebook's grammar: a token may follow here that no timeline has;
- keep time: an interval token stands for the time in the codebook, and nothing ends at a horizon;
- know that no event came between the last known one and the moment of the question;
- give risks: those are estimates over many trajectories.

`fedcomet model import THIS_FOLDER OUT` makes fedcomet's model of it again.
"""
_ALWAYS = (
    ("model.safetensors", "the weights, float32"),
    ("config.json, generation_config.json", "shape and sampling, as transformers reads them"),
    ("fedcomet.json", "dropout and provenance, with the digest of the weights that they belong to"),
)
_WORDS = (
    ("codebook.json", "the codebook: what tokens mean, how long intervals are, what values bins stand for"),
    ("tokens.json", "a list with what each token id reads as"),
)


def card(checkpoint: Checkpoint, *, with_codebook: bool) -> str:
    """The README.md of an export, in Markdown."""
    files = _ALWAYS + (_WORDS if with_codebook else ())
    lines = [f"- `{names.replace(', ', '`, `')}`: {text}" for names, text in files]
    if not with_codebook:
        lines.append("- the codebook is not here; without it the token ids mean nothing")
    rows = [f"| {name} | {_cell(text)} |" for name, text in describe(checkpoint).items()]
    return _CARD.format(facts="\n".join(rows), files="\n".join(lines))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
