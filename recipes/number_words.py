"""A small language pair made by rule: comparisons of numbers, in words. No file is needed.

German says the unit before the ten and writes a number as one word, so that order and segmentation differ, as
they do between the languages: "thirty-four thousand and five" is "vierunddreißigtausendfünf".
"""

import random

# fmt: off
ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GERMAN = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf",
    "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
]
GERMAN_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
# fmt: on
SEED = 0  # any number: it only has to stay what it is
SIZES = {"train": 20_000, "val": 500, "test": 500}


def in_english(number: int) -> str:
    """A number below a million, in British words.

    Example:
        >>> from lamina.recipes.number_words import in_english
        >>> in_english(234_005)
        'two hundred and thirty-four thousand and five'
    """
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return ENGLISH_TENS[tens - 2] + (f"-{ENGLISH[unit]}" if unit else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{ENGLISH[hundreds]} hundred" + (f" and {in_english(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    words = f"{in_english(thousands)} thousand"
    if not rest:
        return words
    return f"{words} {'and ' if rest < 100 else ''}{in_english(rest)}"


def in_german(number: int) -> str:
    """A number below a million, in German words.

    Example:
        >>> from lamina.recipes.number_words import in_german
        >>> in_german(234_005)
        'zweihundertvierunddreißigtausendfünf'
    """
    if number < 20:
        return GERMAN[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return (f"{_before(unit)}und" if unit else "") + GERMAN_TENS[tens - 2]
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_before(hundreds)}hundert" + (in_german(rest) if rest else "")
    thousands, rest = divmod(number, 1000)
    counted = in_german(thousands)
    counted = counted.removesuffix("s") if counted.endswith("eins") else counted
    return f"{counted}tausend" + (in_german(rest) if rest else "")


def sentences(first: int, second: int) -> tuple[str, str]:
    """Which number is the greater, in English and in German.

    Example:
        >>> from lamina.recipes.number_words import sentences
        >>> sentences(21, 101)
        ('twenty-one is less than one hundred and one.', 'einundzwanzig ist kleiner als einhunderteins.')
    """
    english, german = ("less", "kleiner") if first < second else ("greater", "größer")
    return (
        f"{in_english(first)} is {english} than {in_english(second)}.",
        f"{in_german(first)} ist {german} als {in_german(second)}.",
    )


def number_pairs() -> dict[str, tuple[list[str], list[str]]]:
    """Part -> its sentences in English and in German; no number stands in two of them."""
    numbers = random.Random(SEED).sample(range(1_000_000), 2 * sum(SIZES.values()))
    made = [sentences(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    parts, start = {}, 0
    for part, size in SIZES.items():
        english, german = zip(*made[start : start + size], strict=True)
        parts[part] = list(english), list(german)
        start += size
    return parts


def _before(unit: int) -> str:
    """As it is said before a noun: "ein", not "eins"."""
    return "ein" if unit == 1 else GERMAN[unit]
