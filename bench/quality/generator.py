"""Fresh prompts of the shipped model's language: documents, and questions whose kind says where the answer's parts lie.

A story is told document by document. Every fact has a subject, which is a name (`local`), or a pronoun, or a role, or
whose value is "that city" and the like; the last three need the last mention before them. Where that mention lies in
the same document the question is `incoref`, else it is of the kind `pronoun`, `role` or `that`, and no document holds
the answer alone. `last` asks for the later of trips that stand in different documents: it needs their order. Labels
come from where the mentions were put, never from a guess. A prompt must be one that training could have drawn: weights
and lengths here are those of the model's own training. Knows no tokenizer and no engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import language
from .language import Attribute

CROSS_KINDS = ("pronoun", "role", "that")
"""Need text of another document at the tokens of the document itself."""
CONTROL_KINDS = ("local", "incoref", "last")
KINDS = CROSS_KINDS + CONTROL_KINDS
FILLER_SHARE = 0.55
"""Of the sentences of a document."""


@dataclass(frozen=True)
class Place:
    """A sentence: the number of its document, and its own in there."""

    document: int
    sentence: int


@dataclass(frozen=True)
class Question:
    """What is asked, the one right answer, and where the sentence stands that gives it."""

    text: str
    answer: str
    kind: str
    place: Place


@dataclass(frozen=True)
class Context:
    """Documents with the questions that can be asked about them."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    def of_kind(self, kind: str) -> list[Question]:
        """Its questions of one kind."""
        return [question for question in self.questions if question.kind == kind]


@dataclass(frozen=True)
class Mention:
    """Something named, and where."""

    word: str
    place: Place


def contexts(seed: int, per_kind: int = 1, kinds: Sequence[str] = KINDS) -> Callable[[], Context]:
    """A source of contexts, each with 1 to `per_kind` questions of every kind in `kinds`, the same for one seed."""
    draw = random.Random(seed)

    def one() -> Context:
        while True:
            told = Story(draw, draw.randint(4, 8)).tell(sentences=(6, 10))
            if all(told.of_kind(kind) for kind in kinds):
                asked: list[Question] = []
                for kind in kinds:
                    known = told.of_kind(kind)
                    asked += draw.sample(known, min(per_kind, len(known)))
                return Context(told.documents, tuple(asked))

    return one


@dataclass
class Story:
    """People, what they have, and what was said of it so far."""

    draw: random.Random
    num_documents: int
    pronoun: dict[str, str] = field(init=False)
    """He or She, by name."""
    names: list[str] = field(init=False)
    attributes: list[Attribute] = field(init=False)
    unused: dict[Attribute, list[str]] = field(init=False)
    """Values that nobody has yet: a value never stands for two people unless a sentence says `that ... too`."""
    roles: list[str] = field(init=False)
    known: set[tuple[str, Attribute]] = field(default_factory=set[tuple[str, Attribute]])
    """Who has what already: a second fact would make a question have two answers."""
    holder: dict[str, Mention] = field(default_factory=dict[str, Mention])
    """By role, the person who took it last."""
    person: Mention | None = None
    """Named last."""
    role_spoke: bool = False
    """Whether a role was a subject since: `He` could then mean its holder."""
    value: dict[Attribute, Mention] = field(default_factory=dict[Attribute, Mention])
    """Named last, by sort."""
    trips: dict[str, list[Mention]] = field(default_factory=dict[str, list[Mention]])
    questions: list[Question] = field(default_factory=list[Question])
    hero: str = ""
    """Whom the document at hand mostly tells of."""

    def __post_init__(self) -> None:
        draw = self.draw
        num_people = max(5, self.num_documents + draw.randint(1, 4))
        self.attributes = draw.sample(language.ATTRIBUTES, draw.randint(2, 4))
        men = draw.randint(1, num_people - 1)
        people = [(name, "He") for name in draw.sample(language.MEN, men)]
        people += [(name, "She") for name in draw.sample(language.WOMEN, num_people - men)]
        draw.shuffle(people)
        self.pronoun = dict(people)
        self.names = list(self.pronoun)
        self.unused = {one: draw.sample(one.values, len(one.values)) for one in language.ATTRIBUTES}
        self.roles = draw.sample(language.ROLES, draw.choice((1, 2, 2)))

    def tell(self, sentences: tuple[int, int]) -> Context:
        """The whole story; a document has between `sentences` sentences."""
        heroes = list(self.names)
        documents: list[str] = []
        for number in range(self.num_documents):
            self.hero = heroes.pop() if heroes else self.draw.choice(self.names)
            length = self.draw.randint(*sentences)
            num_fillers = max(0, min(length - 2, round(length * FILLER_SHARE + self.draw.uniform(-1.0, 1.0))))
            facts = [False] * num_fillers + [True] * (length - num_fillers)
            self.draw.shuffle(facts)
            told: list[str] = []
            for is_fact in facts:
                told.append(self._fact(Place(number, len(told))) if is_fact else self._filler())
            documents.append(" ".join(told))
        for name, made in self.trips.items():
            if made[0].place.document != made[-1].place.document:
                text = language.TRIP_QUESTION.format(S=name)
                self.questions.append(Question(text, made[-1].word, "last", made[-1].place))
        return Context(tuple(documents), tuple(self.questions))

    def _filler(self) -> str:
        pick = self.draw.choice
        words = {"a": language.LOOKS, "b": language.LOOKS, "n": language.PLACES, "m": language.PLACES}
        words |= {"v": language.STATES, "t": language.TIMES}
        return pick(language.FILLERS).format(**{letter: pick(among) for letter, among in words.items()})

    def _fact(self, here: Place) -> str:
        """One sentence with content; sorts that lean on another document are drawn more often than others."""
        if not self._missing(self.hero):
            self.hero = self._someone_missing() or self.hero
        kinds: list[tuple[Callable[[Place], str], int]] = [(self._named, 4)]
        if self.unused[language.HOME]:
            kinds.append((self._trip, 1))
        if self.person and not self.role_spoke and self._missing(self.person.word):
            kinds.append((self._of_pronoun, 6 if self.person.place.document != here.document else 1))
        roles, far = self._speaking_roles(here)
        if roles:
            kinds.append((self._of_role, 5 if far else 1))
        values, far = self._repeatable(here)
        if values:
            kinds.append((self._of_that, 3 if far else 1))
        if len(self.holder) < len(self.roles) or self.draw.random() < 0.4:
            kinds.append((self._appointment, 1))
        tell = self.draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
        return tell(here)

    def _missing(self, name: str) -> list[Attribute]:
        """What may still be said of a person."""
        return [one for one in self.attributes if (name, one) not in self.known and self.unused[one]]

    def _someone_missing(self) -> str | None:
        among = [name for name in self.names if self._missing(name)]
        return self.draw.choice(among) if among else None

    def _speaking_roles(self, here: Place) -> tuple[list[str], bool]:
        """Roles whose holder has a fact to come, those of other documents alone if there are any, and whether."""
        roles = [role for role, who in self.holder.items() if self._missing(who.word)]
        far = [role for role in roles if self.holder[role].place.document != here.document]
        return far or roles, bool(far)

    def _repeatable(self, here: Place) -> tuple[list[Attribute], bool]:
        """Sorts whose last value the hero can share, those of other documents alone if there are any, and whether."""
        sorts = [one for one in self.attributes if one in self.value and (self.hero, one) not in self.known]
        far = [one for one in sorts if self.value[one].place.document != here.document]
        return far or sorts, bool(far)

    def _say(self, subject: str, name: str, here: Place, kind: str) -> str:
        """A new fact of `name`, worded with `subject`."""
        sort = self.draw.choice(self._missing(name))
        value = self.unused[sort].pop()
        self.value[sort] = Mention(value, here)
        self._ask(sort, name, value, here, kind)
        return self.draw.choice(sort.sentences).format(S=subject, V=value)

    def _ask(self, sort: Attribute, name: str, value: str, here: Place, kind: str) -> None:
        self.known.add((name, sort))
        self.questions.append(Question(sort.question.format(S=name), value, kind, here))

    def _name(self, name: str, here: Place) -> None:
        """`name` is from now on the person named last."""
        self.person, self.role_spoke = Mention(name, here), False

    def _named(self, here: Place) -> str:
        if self.draw.random() < 0.3:
            self.hero = self.draw.choice(self.names)
        if not self._missing(self.hero):
            self.hero = self._someone_missing() or self.hero
        if not self._missing(self.hero):
            return language.NOTHING.format(n=self.draw.choice(language.PLACES))
        self._name(self.hero, here)
        return self._say(self.hero, self.hero, here, "local")

    def _of_pronoun(self, here: Place) -> str:
        assert self.person is not None
        name = self.person.word
        return self._say(self.pronoun[name], name, here, _kind("pronoun", self.person.place, here))

    def _of_role(self, here: Place) -> str:
        role = self.draw.choice(self._speaking_roles(here)[0])
        who = self.holder[role]
        self.role_spoke = True
        return self._say(f"The {role}", who.word, here, _kind("role", who.place, here))

    def _of_that(self, here: Place) -> str:
        sort = self.draw.choice(self._repeatable(here)[0])
        meant = self.value[sort]
        self._name(self.hero, here)
        self._ask(sort, self.hero, meant.word, here, _kind("that", meant.place, here))
        return sort.again.format(S=self.hero)

    def _appointment(self, here: Place) -> str:
        role = self.draw.choice(self.roles)
        busy = {who.word for who in self.holder.values()}
        name = self.draw.choice([one for one in self.names if one not in busy] or self.names)
        if self.hero not in busy and self.draw.random() < 0.5:
            name = self.hero
        self.holder[role] = Mention(name, here)
        self._name(name, here)
        return self.draw.choice(language.APPOINTMENTS).format(S=name, R=role)

    def _trip(self, here: Place) -> str:
        name = self.draw.choice(list(self.trips)) if self.trips and self.draw.random() < 0.6 else self.hero
        city = Mention(self.unused[language.HOME].pop(), here)
        self.trips.setdefault(name, []).append(city)
        self.value[language.HOME] = city
        self._name(name, here)
        return self.draw.choice(language.TRIPS).format(S=name, V=city.word)


def _kind(far: str, meant: Place, here: Place) -> str:
    return far if meant.document != here.document else "incoref"
