"""Descriptions of the simulated catalogue: the same facts in many wordings, so that no word is a code for a value."""

import re
from collections.abc import Mapping

import numpy as np

__all__ = ["TEXT_ATTRIBUTES", "write_description", "write_title"]

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "topic": {
        "sailing": ("sailing boats", "the open sea", "a harbour at dawn", "ships and lighthouses"),
        "gardening": ("garden flowers", "growing vegetables", "a greenhouse in spring", "roses and herbs"),
        "astronomy": ("the night sky", "planets and moons", "distant galaxies", "watching the stars"),
        "cooking": ("home cooking", "fresh bread and soup", "a busy kitchen", "family recipes"),
        "music": ("jazz music", "an evening concert", "guitars and drums", "piano melodies"),
        "hiking": ("mountain trails", "a walk through the hills", "backpacks and tents", "climbing to the summit"),
        "railways": ("steam trains", "old railway stations", "locomotives", "a night train journey"),
        "animals": ("wild animals", "cats and dogs", "birds of the forest", "foxes and owls"),
    },
    "material": {
        "cotton": ("cotton", "soft woven cotton", "cotton cloth"),
        "oak": ("oak wood", "solid oak", "oiled oak"),
        "ceramic": ("ceramic", "glazed pottery", "fired clay"),
        "steel": ("steel", "brushed steel", "stainless metal"),
        "paper": ("paper", "recycled paper", "heavy cardboard"),
        "glass": ("glass", "clear glass", "hand-blown glass"),
    },
    "style": {
        "minimalist": ("minimalist", "plain", "understated"),
        "vintage": ("vintage", "retro", "old-fashioned"),
        "playful": ("playful", "cheerful", "funny"),
        "elegant": ("elegant", "refined", "luxurious"),
        "rustic": ("rustic", "country-style", "homespun"),
        "futuristic": ("futuristic", "high-tech", "space-age"),
    },
    "use": {
        "office": ("the office", "your desk at work", "business meetings"),
        "party": ("parties", "birthday celebrations", "festive evenings"),
        "travel": ("travelling", "long holidays", "your next trip"),
        "children": ("children", "the nursery", "little kids"),
        "wedding": ("weddings", "the bride and groom", "a wedding day"),
        "bathroom": ("the bathroom", "the shower", "bath time"),
    },
}
NOUNS = ("poster", "badge", "card", "tile", "tray", "box", "sign", "coaster", "bowl", "panel")
SERIES = ("Alba", "Boreal", "Corvo", "Delphi", "Ember", "Fable", "Gossamer", "Halo", "Indigo", "Juniper", "Lumen")
TEMPLATES = (
    "A {style} {noun} about {topic}, made of {material}, for {use}.",
    "Made of {material}, this {noun} is {style} and right for {use}. It shows {topic}.",
    "{topic}: a {style} {noun} in {material}. Good for {use}.",
    "If you love {topic}, you will love this {noun}. {style}, of {material}, for {use}.",
    "For {use}: a {noun} of {material}, {style}, inspired by {topic}.",
    "Think of {topic}. Our {style} {noun} for {use} is made from {material}.",
    "{material}, {style}, and all about {topic}. A {noun} for {use}.",
    "We made this {noun} with {topic} in mind; {style} design, {material}, meant for {use}.",
)
CLOSINGS = ("", "", "", " Easy to clean.", " Ships tomorrow.", " Small series.", " Comes gift-wrapped.")

TEXT_ATTRIBUTES: dict[str, tuple[str, ...]] = {name: tuple(values) for name, values in PHRASES.items()}
"""Values of each attribute that a description tells."""


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def write_title(number: int, rng: np.random.Generator) -> str:
    """Return a title that tells nothing about the item, distinct for each number."""
    return f"{_pick(SERIES, rng)} {number}"


def write_description(value: Mapping[str, str], rng: np.random.Generator) -> str:
    """Describe one item in one or two sentences of about 20 words.

    Args:
        value: The item's value of each attribute; those of `TEXT_ATTRIBUTES` are read.
        rng: Chooses the wording.

    Returns:
        Text in which each value appears as one of several phrases.
    """
    words = {name: _pick(PHRASES[name][value[name]], rng) for name in PHRASES}
    text = _pick(TEMPLATES, rng).format(noun=_pick(NOUNS, rng), **words)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    sentences = [sentence[:1].upper() + sentence[1:] for sentence in text.split(". ")]
    return ". ".join(sentences) + _pick(CLOSINGS, rng)
