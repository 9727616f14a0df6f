"""A CLIP tokenizer with a vocabulary of toyworld's words.

Each known word is one token; anything else falls into bytes, so that no text is refused. The
files are vocab.json and merges.txt, as CLIP's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .scenes import COLOURS, KINDS

CONTEXT_LENGTH = 24  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"
EXTRA_WORDS = (
    "a", "an", "the", "next", "to", "of", "and", "with", "photo", "picture", "render", "model",
    "toy", "small", "little", "cute", "front", "side", "back", "overhead", "view",
)  # fmt: skip


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of bytes that byte-level BPE uses, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


def build_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges by which BPE makes one token of each word.

    A word is taken as far as the merges so far lead, then its remaining pieces are joined from
    the left. Later merges rank lower, so they do not disturb the words before.
    """
    merges: list[tuple[str, str]] = []
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(zip(pieces, pieces[1:], strict=False))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                best = pairs[0]
                rank[best] = len(rank)
                merges.append(best)
            joined: list[str] = []
            i = 0
            while i < len(pieces):
                if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                    joined.append(pieces[i] + pieces[i + 1])
                    i += 2
                else:
                    joined.append(pieces[i])
                    i += 1
            pieces = joined
    return merges


def write_tokenizer(folder: str | Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = build_merges(list(dict.fromkeys([*EXTRA_WORDS, *COLOURS, *KINDS])))
    alphabet = byte_alphabet()
    pieces = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=True) + "\n")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers CLIPTokenizer of `folder`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def token_ids(tokenizer: Any, texts: list[str]) -> Any:
    """[len(texts), CONTEXT_LENGTH] i64, padded and truncated, as Stable Diffusion does."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=CONTEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
