"""A small text made by rule: people at work, in sentences whose words depend on earlier and later ones.

A trade goes with one tool and one place, a number with the form of noun, verb and pronoun, a season with the
weather. Any of them may be said first: who hides one word finds it by the others, before it and behind it.
"""

import random

# fmt: off
TRADES = {  # one, many: tool, place
    ("farmer", "farmers"): ("plough", "field"),
    ("baker", "bakers"): ("oven", "bakery"),
    ("fisher", "fishers"): ("net", "harbour"),
    ("smith", "smiths"): ("hammer", "forge"),
    ("tailor", "tailors"): ("needle", "workshop"),
    ("painter", "painters"): ("brush", "gallery"),
    ("doctor", "doctors"): ("lancet", "hospital"),
    ("singer", "singers"): ("songbook", "theatre"),
    ("gardener", "gardeners"): ("spade", "park"),
    ("miller", "millers"): ("sieve", "mill"),
    ("teacher", "teachers"): ("chalk", "school"),
    ("sailor", "sailors"): ("compass", "ship"),
}
SEASONS = {
    "spring": ("rain falls", "wet"), "summer": ("sun burns", "hot"), "autumn": ("fog rises", "grey"),
    "winter": ("snow lies", "cold"),
}
NUMBERS = ["two", "three", "four", "five", "many", "some"]
QUALITIES = ["old", "young", "tired", "cheerful", "clever", "quiet", "busy", "famous"]
VERBS = [("carries", "carry"), ("brings", "bring"), ("takes", "take"), ("returns", "return")]
# fmt: on
SEED = 0  # any number: it only has to stay what it is
SIZES = {"train": 12_000, "val": 600, "test": 600}


def sentence(draw: random.Random) -> str:
    """One sentence.

    Example:
        >>> import random
        >>> from lamina.recipes.market_words import sentence
        >>> sentence(random.Random(1))
        'to the harbour five clever fishers carry their net if the rain falls: they are wet in spring.'
    """
    (one, many), (tool, place) = draw.choice(list(TRADES.items()))
    season, (weather, feeling) = draw.choice(list(SEASONS.items()))
    quality, verbs = draw.choice(QUALITIES), draw.choice(VERBS)
    if draw.random() < 0.5:
        who, verb, works, are = f"{draw.choice(NUMBERS)} {quality} {many}", verbs[1], "work", "are"
        they, their = "they", "their"
    else:
        who, verb, works, are = f"the {quality} {one}", verbs[0], "works", "is"
        they, their = draw.choice([("he", "his"), ("she", "her")])
    return draw.choice([
        f"in {season} {who} {verb} {their} {tool} to the {place}, because {they} {works} there.",
        f"to the {place} {who} {verb} {their} {tool} if the {weather}: {they} {are} {feeling} in {season}.",
        f"{their} {tool} is what {who} {verb} to the {feeling} {place} when the {weather} in {season}.",
    ])  # fmt: skip


def sentences() -> dict[str, list[str]]:
    """Part -> its sentences."""
    draw = random.Random(SEED)
    return {part: [sentence(draw) for _ in range(size)] for part, size in SIZES.items()}
