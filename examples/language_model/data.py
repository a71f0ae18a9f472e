"""The demo's text: the Python standard library's own source, as bytes, with a train / held-out split by file."""

import string
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT_EVERY = 8
MAX_BYTES = 5_000_000

BYTE_KINDS: dict[str, bytes] = {
    "lower case": string.ascii_lowercase.encode(),
    "upper case": string.ascii_uppercase.encode(),
    "digit": string.digits.encode(),
    "underscore": b"_",
    "bracket": b"()[]{}",
    "quote": b"\"'`",
    "punctuation": bytes(set(string.punctuation.encode()) - set(b"_()[]{}\"'`")),
    "space or tab": b" \t",
    "line break": b"\n\r",
    "other": bytes(set(range(256)) - set(string.printable.encode()) | set(b"\v\f")),
}


class Corpus(NamedTuple):
    """Text as uint8 tensors of shape ``(bytes,)``."""

    train: Tensor
    held_out: Tensor


def source_files() -> list[Path]:
    """Returns the files of the standard library's top-level modules, sorted by name; no site-packages, no test folders."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"no Python source files in {folder}: the demo trains on the standard library's text")
    return files


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Returns the training files and the held-out files, which are every eighth file."""
    return [f for i, f in enumerate(files) if i % HELD_OUT_EVERY], files[::HELD_OUT_EVERY]


def load_corpus(max_bytes: int = MAX_BYTES) -> Corpus:
    """Returns both parts of the text, of at most ``max_bytes`` together, each cut in proportion to its share of files."""
    train, held_out = split_files(source_files())
    cut = max_bytes // HELD_OUT_EVERY
    return Corpus(_read(train, max_bytes - cut), _read(held_out, cut))


def _read(files: list[Path], max_bytes: int) -> Tensor:
    text = b"".join(f.read_bytes() for f in files)[:max_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random_windows(text: Tensor, count: int, length: int) -> Tensor:
    """Returns int64 windows ``(count, length)`` of ``text`` at random offsets."""
    return _windows(text, torch.randint(len(text) - length + 1, (count,)), length)


def even_windows(text: Tensor, count: int, length: int) -> Tensor:
    """Returns int64 windows ``(count, length)`` of ``text`` at evenly spaced offsets, the same at every call."""
    return _windows(text, torch.linspace(0, len(text) - length, count, dtype=torch.float64).long(), length)


def _windows(text: Tensor, offsets: Tensor, length: int) -> Tensor:
    return text[offsets.unsqueeze(1) + torch.arange(length)].long()


def unigram_entropy(text: Tensor) -> float:
    """Returns the entropy of the byte frequencies in nats per byte, the least loss of a model without context."""
    p = torch.bincount(text.flatten().long(), minlength=256).double() / text.numel()
    return torch.special.entr(p).sum().item()


def byte_kinds(data: Tensor) -> Tensor:
    """Returns the index into :data:`BYTE_KINDS` of each byte of ``data``, int64 of the same shape."""
    table = torch.empty(256, dtype=torch.long)
    for index, members in enumerate(BYTE_KINDS.values()):
        table[list(members)] = index
    return table[data.long()]
