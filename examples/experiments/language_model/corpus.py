"""The text: the help topics of Python's standard library, split into three parts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Corpus(NamedTuple):
    """Text of the first topics, of those after them and of the last ones.

    The three are indices of characters, which `vocabulary` has in order.
    """

    vocabulary: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_topics() -> dict[str, str]:
    """Return the help topics, which differ from one version of Python to another.

    Raises:
      ModuleNotFoundError: this Python comes without the topics.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the text is pydoc_data.topics of the standard library, which this Python "
            "comes without; some distributions have it in a package of its own.",
            name=error.name,
        ) from error
    return without_repetition(topics)


def without_repetition(topics: Mapping[str, str]) -> dict[str, str]:
    """Sort topics, and leave out paragraphs that an earlier one has.

    One in five characters is repeated: "compound", for one, contains "if", "for" and
    "while". White space makes no difference. No paragraph is in two parts of the text.
    """
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            kept[name] = "\n\n".join(paragraphs) + "\n\n"
    return kept


def split(topics: Mapping[str, str], held_out: float = 0.1) -> Corpus:
    """Split the text between topics.

    The fewest topics at the end that are a share of `held_out` of all characters are
    the test text, those before them the validation text.

    Raises:
      ValueError: nothing remains to train on.
    """
    names, total = [*topics], sum(map(len, topics.values()))
    parts: list[str] = []
    for _ in range(2):
        part = ""
        while names and len(part) < held_out * total:
            part = topics[names.pop()] + part
        parts.insert(0, part)
    if not names:
        raise ValueError(
            f"nothing is left to train on of {len(topics)} topics with "
            f"held_out={held_out:g} for each of two parts."
        )
    parts.insert(0, "".join(topics[name] for name in names))
    vocabulary = "".join(sorted({*"".join(parts)}))
    index = {character: i for i, character in enumerate(vocabulary)}
    encoded = (np.array([index[x] for x in part], np.int32) for part in parts)
    return Corpus(vocabulary, *encoded)


def windows(text: np.ndarray, context: int) -> np.ndarray:
    """Cut a text into windows `[N, context + 1]`, each predicted on its own.

    A window starts with the last character of the one before it, so that every
    character but the first is predicted once; an incomplete last one is left out.
    """
    return _cut(text, np.arange(0, len(text) - context, context), context)


def batch(
    text: np.ndarray, context: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw windows `[size, context + 1]` from anywhere in a text."""
    return _cut(text, rng.integers(0, len(text) - context, size), context)


def _cut(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    tokens: np.ndarray = text[starts[:, None] + np.arange(context + 1)]
    return tokens
