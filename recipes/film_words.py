"""Small film reviews made by rule: who was praised depends on the order of the words, not on which they are.

"not dull but clever" and "not clever but dull" are the same words. A count of words does not tell them apart.
"""

import random

# fmt: off
THINGS = ["the plot", "the cast", "the music", "this film", "the ending", "the script", "the camera work"]
GOOD = ["clever", "moving", "funny", "fresh", "charming", "honest", "thrilling", "warm"]
BAD = ["dull", "clumsy", "shallow", "stale", "tedious", "noisy", "hollow", "cold"]
# fmt: on
SEED = 0  # any number: it only has to stay what it is
SIZES = {"train": 2_000, "dev": 300, "test": 500}


def review(draw: random.Random) -> tuple[str, int]:
    """A sentence, and 1 where it praises.

    Example:
        >>> import random
        >>> from lamina.recipes.film_words import review
        >>> review(random.Random(3))
        ('the music is not fresh but cold .', 0)
    """
    praises = draw.random() < 0.5
    said, denied = (GOOD, BAD) if praises else (BAD, GOOD)
    yes, no, thing = draw.choice(said), draw.choice(denied), draw.choice(THINGS)
    text = draw.choice([
        f"{thing} is not {no} but {yes} .",
        f"{thing} is {yes} and never {no} .",
        f"they say {thing} is {no} , but it is {yes} .",
        f"{yes} , not {no} : that is {thing} .",
    ])  # fmt: skip
    return text, int(praises)


def reviews() -> dict[str, tuple[list[str], list[int]]]:
    """Part -> its sentences and their labels."""
    draw = random.Random(SEED)
    parts = {}
    for part, size in SIZES.items():
        texts, labels = zip(*(review(draw) for _ in range(size)), strict=True)
        parts[part] = list(texts), list(labels)
    return parts
