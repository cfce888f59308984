"""The text: the help topics of Python's standard library, split into three parts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Corpus(NamedTuple):
    """Text as indices of characters.

    Attributes:
      vocabulary: the characters, sorted.
      train: of the first topics.
      validation: of those after them.
      test: of the last ones.
    """

    vocabulary: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_topics() -> dict[str, str]:
    """Return the help topics, in sorted order, without what they repeat.

    One in five characters is repeated: "compound", for one, contains "if", "for" and
    "while". A paragraph is kept where it occurs first, so none is in two parts.

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
    """Leave out paragraphs that an earlier topic has, but for white space."""
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
    """Split the text between topics; a topic is in one part.

    Args:
      topics: text by name, in order.
      held_out: least share of the characters in each of validation and test.

    Returns:
      The parts; the fewest topics at the end that are the share, those before them,
      and the rest.

    Raises:
      ValueError: nothing remains to train on.
    """
    names, total = [*topics], sum(map(len, topics.values()))
    parts = []
    for _ in range(2):
        part: list[str] = []
        while names and sum(map(len, part)) < held_out * total:
            part.insert(0, topics[names.pop()])
        parts.append("".join(part))
    test, validation = parts
    if not names:
        raise ValueError(
            f"nothing is left to train on of {len(topics)} topics with "
            f"held_out={held_out:g} for each of two parts."
        )
    vocabulary = "".join(sorted({*"".join(topics.values())}))
    index = {character: i for i, character in enumerate(vocabulary)}

    def encode(text: str) -> np.ndarray:
        return np.array([index[character] for character in text], np.int32)

    train = "".join(topics[name] for name in names)
    return Corpus(vocabulary, encode(train), encode(validation), encode(test))


def windows(text: np.ndarray, context: int) -> np.ndarray:
    """Cut a text into windows `[N, context + 1]`, each predicted on its own.

    A window starts with the last character of the one before it, so that every
    character but the first is predicted once; an incomplete last one is left out.
    """
    starts = np.arange(0, len(text) - context, context)
    tokens: np.ndarray = text[starts[:, None] + np.arange(context + 1)]
    return tokens


def batch(
    text: np.ndarray, context: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw windows `[size, context + 1]` from anywhere in a text."""
    starts = rng.integers(0, len(text) - context, size)
    tokens: np.ndarray = text[starts[:, None] + np.arange(context + 1)]
    return tokens
