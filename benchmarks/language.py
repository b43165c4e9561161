"""A synthetic language to train small models on: a probabilistic grammar with agreement, copying and counting.

    sentence  the ADJ* NOUN (that VERB NOUN | near NOUN)? VERB NOUN .   the verb agrees in number with its subject, also
                                                                     across the noun between; nouns prefer verbs,
                                                                     verbs prefer objects, numbers of words follow Zipf
    copy      say NAME NAME ... again NAME NAME ... .                 2 to 6 names, the same ones again
    count     count N NOUN NOUN ... .                                 as many as N says, 1 to 8

Same seed, same tokens. The tables of preferences are the language's own and do not depend on the seed of a text.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

NOUNS, VERBS, ADJECTIVES, NAMES, MOST, LONGEST = 40, 30, 16, 40, 8, 6
_FAVOURITES, _FAITHFUL = 4, 0.85  # preferred partners of a word, and how often one of them is taken


def _words() -> dict[str, int]:
    words = [".", "the", "that", "near", "say", "again", "count", *(f"number{i}" for i in range(1, MOST + 1))]
    words += [f"{kind}{i}{end}" for kind, n in (("noun", NOUNS), ("verb", VERBS)) for i in range(n) for end in "sp"]
    words += [f"{kind}{i}" for kind, n in (("adjective", ADJECTIVES), ("name", NAMES)) for i in range(n)]
    return {word: index for index, word in enumerate(words)}


WORDS = _words()
"""Word -> token. ``noun3s`` and ``noun3p`` are the singular and plural of one noun."""


def _preferences(count: int, partners: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.sample(range(partners), _FAVOURITES) for _ in range(count)]


_VERBS_OF = _preferences(NOUNS, VERBS, 1)  # noun -> verbs it likes
_OBJECTS_OF = _preferences(VERBS, NOUNS, 2)  # verb -> objects it likes


class _Speaker:
    """Sentences from one random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def zipf(self, count: int) -> int:
        return self.random.choices(range(count), [1 / (i + 1) for i in range(count)])[0]

    def partner(self, liked: list[int], count: int) -> int:
        return self.random.choice(liked) if self.random.random() < _FAITHFUL else self.random.randrange(count)

    def number(self) -> str:
        return self.random.choice("sp")

    def sentence(self) -> list[str]:
        kind = self.random.random()
        return self.statement() if kind < 0.6 else self.copy() if kind < 0.8 else self.count()

    def statement(self) -> list[str]:
        noun, number = self.zipf(NOUNS), self.number()
        said = ["the", *(f"adjective{self.zipf(ADJECTIVES)}" for _ in range(self.random.choice((0, 0, 1, 2))))]
        said.append(f"noun{noun}{number}")
        between = self.random.random()
        if between < 0.25:
            said += ["that", *self.predicate(noun, number)]
        elif between < 0.5:
            said += ["near", f"noun{self.zipf(NOUNS)}{self.number()}"]
        return [*said, *self.predicate(noun, number), "."]

    def predicate(self, noun: int, number: str) -> list[str]:
        verb = self.partner(_VERBS_OF[noun], VERBS)
        return [f"verb{verb}{number}", f"noun{self.partner(_OBJECTS_OF[verb], NOUNS)}{self.number()}"]

    def copy(self) -> list[str]:
        names = [f"name{self.random.randrange(NAMES)}" for _ in range(self.random.randint(2, LONGEST))]
        return ["say", *names, "again", *names, "."]

    def count(self) -> list[str]:
        times = self.random.randint(1, MOST)
        return ["count", f"number{times}", *[f"noun{self.zipf(NOUNS)}s"] * times, "."]


def text(tokens: int, seed: int) -> Tensor:
    """int64 [tokens]: sentences one after the other, the last one cut."""
    speaker, found = _Speaker(seed), []
    while len(found) < tokens:
        found += [WORDS[word] for word in speaker.sentence()]
    return torch.tensor(found[:tokens])
