"""The small English that the shipped model was trained on: its words, and the sentences they may form.

Data alone: no chance and no story (generator.py). Every word with the space before it is one token of that model; a
word that is not here is broken into bytes, which the model never saw.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYSTEM = "Answer the question from the documents."

MEN = _words(
    "Adam Boris Carl David Edgar Felix George Henry Ivan Jacob Karl Liam Marcus Nolan Oscar Peter Quentin Robert Simon "
    "Thomas Victor Walter Xavier Yuri Zane Alan Bruno Cedric Derek Elias Frank Gavin Hugo Igor Jonas Kevin Leon Martin "
    "Neil Owen"
)
WOMEN = _words(
    "Alice Bella Clara Diana Emma Fiona Greta Helen Irene Julia Karen Laura Maria Nora Olga Paula Quinn Rosa Sarah "
    "Tina Ursula Vera Wendy Xenia Yvonne Zoe Anna Bertha Carla Dora Elsa Flora Gloria Hilda Iris Jane Kate Linda Mona "
    "Nina"
)
ROLES = _words("captain mayor chief treasurer chairman director steward manager warden speaker")

_CITIES = (
    "Oslo Paris Rome Madrid Berlin Vienna Prague Dublin London Athens Lisbon Warsaw Cairo Tokyo Delhi Lima Boston "
    "Denver Dallas Seattle Toronto Sydney Geneva Milan Munich Porto Turin Bergen Riga Kyoto Seoul Hanoi Manila Havana "
    "Quito Tunis Nairobi Lagos Bern Lyon"
)
_JOBS = (
    "baker teacher doctor lawyer farmer painter writer singer dancer pilot sailor tailor barber butcher plumber "
    "carpenter miner weaver potter nurse judge banker chemist engineer gardener hunter jeweler miller mason printer "
    "sculptor surgeon waiter welder actor poet clerk cook driver guard"
)
_THINGS = (
    "lamp boat car chair table piano violin watch mirror vase clock bicycle wagon kite drum flute carpet basket ladder "
    "kettle hammer candle trunk desk sofa guitar lantern tent helmet telescope"
)
_FOODS = (
    "rice bread soup cheese pasta salad pizza noodles beans fish chicken beef lamb honey apples pears plums cherries "
    "grapes olives mushrooms onions carrots pumpkin cabbage pancakes waffles cookies chocolate pudding yogurt almonds "
    "walnuts lentils spinach bacon shrimp lobster turkey eggs"
)
_ANIMALS = (
    "dog cat horse goat sheep cow pig rabbit parrot falcon turtle snake lizard frog hamster ferret donkey camel llama "
    "goose duck hen pigeon owl monkey fox wolf otter badger squirrel"
)


@dataclass(frozen=True)
class Attribute:
    """Something that a person has one of."""

    sentences: tuple[str, ...]
    """{S} is who, {V} what."""
    again: str
    """Says that {S} has the one of this sort that was named last."""
    question: str
    values: tuple[str, ...]


def _attribute(sentences: tuple[str, ...], again: str, question: str, values: str) -> Attribute:
    return Attribute(sentences, again, question, _words(values))


HOME = _attribute(
    ("{S} lives in {V}.", "{S} has a home in {V}."), "{S} lives in that city too.", "Where does {S} live?", _CITIES
)
ATTRIBUTES = (
    HOME,
    _attribute(
        ("{S} works as a {V}.", "{S} earns money as a {V}."),
        "{S} works in that trade too.",
        "What is the job of {S}?",
        _JOBS,
    ),
    _attribute(("{S} owns a {V}.", "{S} bought a {V}."), "{S} owns that too.", "What does {S} own?", _THINGS),
    _attribute(
        ("{S} likes to eat {V}.", "{S} often cooks {V}."),
        "{S} likes to eat that food too.",
        "What does {S} eat?",
        _FOODS,
    ),
    _attribute(
        ("{S} keeps a {V}.", "{S} feeds a {V}."), "{S} keeps that animal too.", "Which animal does {S} keep?", _ANIMALS
    ),
)
TRIPS = ("{S} travelled to {V}.", "{S} went to {V}.")
TRIP_QUESTION = "Where did {S} travel last?"
APPOINTMENTS = ("{S} became the {R}.", "{S} was chosen as {R}.")

FILLERS = (
    "The {a} {n} {v} {b} that {t}.",
    "Rain fell on the {a} {n} all {t}.",
    "People walked along the {a} {n} every {t}.",
    "It was a {a} {t} near the {n}.",
    "Nobody crossed the {n} behind the {m} that {t}.",
    "The {n} and the {m} {v} {a}.",
)
NOTHING = "The {n} was empty."
PLACES = _words(
    "street river bridge market garden tower valley forest harbor station library museum meadow village church field "
    "road wall gate window"
)
LOOKS = _words("old cold warm quiet narrow broad dusty bright dark gentle heavy empty crowded broken wooden stone")
TIMES = _words("morning evening winter summer autumn night week month")
STATES = _words("looked seemed stayed remained became")
