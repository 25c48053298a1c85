"""Stable sample ids: 64-bit hashes of content, and what is drawn from them."""

import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.core.errors import UsageError

_WORDS = 1 << 16  # 64-bit words hashed at a time: 0.5 MB stay in the cache
_ALL = 1 << 64  # words are of 64 bits
# Multipliers of the splitmix64 generator (Steele, Lea and Flood 2014) as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def mix(words: Tensor) -> Tensor:
    """Scramble 64-bit words: the finaliser of splitmix64, a bijection in which every input bit moves half of the output bits.

    Args:
        words: int64, any shape.

    Returns:
        int64, same shape.

    Example:
        >>> mix(torch.tensor([0, 1, 2])).unique().numel()
        3
    """
    words = words + _STEP
    for shift, multiplier in _MULTIPLIERS:
        words = (words ^ _shifted(words, shift)) * multiplier
    return words ^ _shifted(words, 31)


def mixed(word: int) -> int:
    """As `mix`, of one number, whose bits below 2^64 count.

    Example:
        >>> mixed(7) % 2**64 == int(mix(torch.tensor([7]))[0]) % 2**64
        True
    """
    word = (word + _STEP) % _ALL
    for shift, multiplier in _MULTIPLIERS:
        word = (word ^ word >> shift) * multiplier % _ALL
    return word ^ word >> 31


def digest(*parts: Any) -> str:
    """A hash of texts, bytes and tensors (their values and shapes) as 16 hexadecimal digits.

    Example:
        >>> digest("a", torch.ones(2)) == digest("a", torch.ones(2)), len(digest(b"a"))
        (True, 16)
    """
    hasher = blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            hasher.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        part = part if isinstance(part, bytes) else str(part).encode()
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()


def text_ids(texts: Iterable[str | bytes | tuple[str, ...]]) -> Tensor:
    """One id for each text, path or tuple of texts, from its content; further copies of a text get ids of their own.

    Args:
        texts: N texts.

    Returns:
        Unique ids `[N]` int64.

    Example:
        >>> a, b = text_ids(["one", "two"]), text_ids(["zero", "two", "two"])
        >>> bool(a[1] == b[1]), b.unique().numel()
        (True, 3)
    """
    hashes = [int.from_bytes(blake2b(_bytes(t), digest_size=8).digest(), "little", signed=True) for t in texts]
    return distinct(torch.tensor(hashes, dtype=torch.int64))


def content_ids(x: Tensor | Mapping[str, Any] | tuple[Any, ...]) -> Tensor:
    """One id for each row of a tensor (or of a mapping or tuple of tensors), from its bytes.

    Args:
        x: Tensors `[N, ...]` of any dtype.

    Returns:
        Unique ids `[N]` int64: the same row has the same id in any order and in any subset; further copies get their own.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
        >>> ids, back = content_ids(x), content_ids(x.flip(0)[1:])
        >>> bool(ids[1] == back[0]), ids.unique().numel()
        (True, 3)
    """
    return distinct(_hash(x))


def distinct(hashes: Tensor) -> Tensor:
    """Unique ids from hashes: the first of equal ones keeps its value, the k-th copy gets a value derived from it and k.

    Args:
        hashes: `[N]` int64.

    Returns:
        `[N]` int64.
    """
    ordered, order = hashes.sort(stable=True)
    if not len(hashes) or not bool((ordered[1:] == ordered[:-1]).any()):
        return hashes
    position = torch.arange(len(hashes))
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    copy = position - torch.where(first, position, 0).cummax(0).values
    ids = torch.empty_like(hashes)
    ids[order] = torch.where(copy > 0, mix(mix(ordered) + copy), ordered)
    return ids


def check_ids(ids: Tensor, length: int, where: str) -> Tensor:
    """The ids as a `[N]` int64 tensor on the CPU, when they are whole numbers, one for each sample, and unique.

    Raises:
        UsageError: They are not.
    """
    ids = torch.as_tensor(ids).detach().cpu()
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.shape != (length,):
        found, expected = f"{ids.dtype} of shape {tuple(ids.shape)}", f"whole numbers of shape ({length},)"
        raise UsageError("the ids do not fit the samples", where=where, found=found, expected=expected)
    ids = ids.to(torch.int64)
    values, counts = ids.unique(return_counts=True)
    if len(values) < length:
        repeated = values[counts > 1]
        found = f"{len(repeated)} ids are used more than once, such as {int(repeated[0])}"
        raise UsageError(
            "the ids are not unique",
            where=where,
            found=found,
            fix="give every sample an id of its own, or leave ids out",
        )
    return ids


def seeds(ids: Tensor, view: int, seed: int = 0) -> Tensor:
    """The random seed of each sample in one view: a function of (seed, id, view) alone.

    Args:
        ids: `[B]` int64.
        view: Augmentation seed.
        seed: Seed of the source.

    Returns:
        `[B]` int64.
    """
    return mix(mix(mix(ids) + view) + seed)


def fractions(ids: Tensor, seed: int = 0) -> Tensor:
    """A uniform number in [0, 1) for each id, the same for the same (id, seed).

    Example:
        >>> u = fractions(torch.arange(10_000))
        >>> abs(float(u.mean()) - 0.5) < 0.01
        True
    """
    return _shifted(seeds(ids, view=-1, seed=seed), 11).double() / (1 << 53)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that follow from keys alone, on any device.

    Args:
        keys: `[B]` int64.
        count: Numbers for each.

    Returns:
        `[B, count]` float64.
    """
    words = mix(keys[:, None] + torch.arange(count, device=keys.device))
    return _shifted(words, 11).double() / (1 << 53)


def normals(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers that follow from keys alone, on any device.

    Args:
        keys: `[B]` int64.
        count: Numbers for each.

    Returns:
        `[B, count]` float64.

    Example:
        >>> x = normals(torch.arange(2000), 3)
        >>> bool(x.mean().abs() < 0.05), bool((x.std() - 1).abs() < 0.05)
        (True, True)
    """
    first, second = uniforms(keys, 2 * ((count + 1) // 2)).chunk(2, dim=1)  # Box and Muller make two of two
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def numbers(ids: Tensor) -> list[int]:
    """As whole numbers; zeros for fake tensors, which have no values."""
    return ids.tolist() if type(ids) is Tensor else [0] * len(ids)


def _shifted(words: Tensor, by: int) -> Tensor:
    # torch shifts signed numbers arithmetically; the mask makes it the logical shift.
    return (words >> by) & ((1 << (64 - by)) - 1)


def _bytes(text: str | bytes | tuple[str, ...]) -> bytes:
    if isinstance(text, bytes):
        return text
    return (text if isinstance(text, str) else "\x1f".join(text)).encode("utf-8", "surrogatepass")


def _hash(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        parts = [_hash(v) for v in (x.values() if isinstance(x, Mapping) else x)]
        return mix(torch.stack([mix(p + k) for k, p in enumerate(parts)]).sum(0))
    if not len(x):
        return torch.zeros(0, dtype=torch.int64)
    size = x[0].numel() * x.element_size()
    rows = max(1, _WORDS * 8 // max(1, size))
    return torch.cat([_hash_rows(part.detach().cpu().reshape(len(part), -1), size) for part in x.split(rows)])


def _hash_rows(rows: Tensor, size: int) -> Tensor:
    flat = rows.contiguous().view(-1).view(torch.uint8).view(len(rows), size)
    words = pad(flat, (0, -size % 8)).view(torch.int64)  # [n, size / 8 rounded up]
    return mix(mix(words + _STEP * torch.arange(words.shape[1])).sum(1) + size)
