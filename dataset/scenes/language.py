"""Phrases and captions of a scene.

A phrase is a `Spec` first: `matches` computes from the scene which objects it is true of. `text` turns it into words,
all from the tables below. Only "left", "right", "leftmost" and "rightmost" become false in a mirrored image.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from numpy.random import Generator

from dataset.scenes.world import COLOURS, SHAPES, Scene, Thing, pick, shuffled

# {} is the noun phrase, the second {} of a relation the object that it relates to.
NOUNS: dict[str | None, tuple[str, ...]] = {None: ("thing", "object"), **{shape: (shape,) for shape in SHAPES}}
SIZES = {"small": ("small", "little"), "big": ("big", "large")}
PLACES = {
    "left": ("{} on the left", "left {}", "{} on the left side"),
    "right": ("{} on the right", "right {}", "{} on the right side"),
    "top": ("{} at the top", "top {}"),
    "bottom": ("{} at the bottom", "bottom {}"),
    "middle": ("{} in the middle", "middle {}"),
    "top left": ("{} in the top left corner", "top left {}"),
    "top right": ("{} in the top right corner", "top right {}"),
    "bottom left": ("{} in the bottom left corner", "bottom left {}"),
    "bottom right": ("{} in the bottom right corner", "bottom right {}"),
}
EXTREMES = {
    "leftmost": ("leftmost {}",),
    "rightmost": ("rightmost {}",),
    "biggest": ("biggest {}", "largest {}"),
    "smallest": ("smallest {}",),
}
RELATIONS = {
    "left": ("{} left of {}", "{} to the left of {}"),
    "right": ("{} right of {}", "{} to the right of {}"),
    "above": ("{} above {}",),
    "below": ("{} below {}", "{} under {}"),
}
KINDS = ("attribute", "size", "position", "relation")

CAPTION_WORDS = 24  # training cuts captions to 25 tokens, [CLS] included
CAPTION_STYLES = ("plain", "size", "place", "relation")
OPENINGS = ("a picture of", "an image with")
FUNCTION_WORDS = "a an another and the"


def known_words() -> list[str]:
    """All words of phrases and captions, sorted."""
    tables = (NOUNS, SIZES, PLACES, EXTREMES, RELATIONS)
    templates = [template for table in tables for row in table.values() for template in row]
    return sorted(set(re.findall("[a-z]+", " ".join([*templates, *COLOURS, *OPENINGS, FUNCTION_WORDS]))))


def synonyms() -> list[tuple[str, list[str]]]:
    """Words, and others that mean the same and can stand in their place."""
    meanings = [forms for table in (SIZES, EXTREMES, NOUNS, RELATIONS, PLACES) for forms in table.values()]
    # "{} on the left" and "left {}" cannot: the words stand on other sides of the noun.
    same = [[form for form in forms if form.startswith("{}") == after] for forms in meanings for after in (False, True)]
    words = [[form.replace("{}", "").strip() for form in forms] for forms in same]
    return [(one, [other for other in forms if other != one]) for forms in words if len(forms) > 1 for one in forms]


# ---- phrases and their truth


class Spec(NamedTuple):
    """What a phrase says of an object; None: nothing.

    Args:
        place: a key of `PLACES`.
        extreme: a key of `EXTREMES`; never together with a place or a relation.
        relation: a key of `RELATIONS`: where the object lies, seen from the `anchor`.
    """

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    extreme: str | None = None
    relation: str | None = None
    anchor: "Spec | None" = None

    @property
    def form(self) -> tuple[object, ...]:
        """Which fields are set. Phrases of the same form differ in their words only."""
        return tuple(value.form if isinstance(value, Spec) else value is not None for value in self)


def matches(spec: Spec, scene: Scene, lenient: bool = False) -> list[int]:
    """The indices of the objects that a phrase is clearly true of.

    Args:
        lenient: include unclear cases: an object between left and middle, or hardly further left than another.
    """
    things = scene.things
    found = [
        i
        for i, thing in enumerate(things)
        if spec.colour in (None, thing.colour) and spec.shape in (None, thing.shape) and spec.size in (None, thing.size)
    ]
    if spec.place:
        found = [i for i in found if in_place(spec.place, things[i], scene, lenient)]
    if spec.relation and spec.anchor:
        relation, anchors = spec.relation, matches(spec.anchor, scene, lenient)
        found = [i for i in found if any(related(relation, things[i], things[j], lenient) for j in anchors if i != j)]
    return _extreme(spec.extreme, found, scene, lenient) if spec.extreme else found


def is_unique(spec: Spec, scene: Scene, target: int) -> bool:
    """Whether the phrase is clearly true of the target and clearly false of all other objects."""
    return matches(spec, scene, lenient=True) == [target] == matches(spec, scene)


def in_place(place: str, thing: Thing, scene: Scene, lenient: bool = False) -> bool:
    """Whether the object's centre lies in a part of the image: an outer third or so, or (middle) around the centre."""
    x, y = thing.centre
    x, y = x / scene.width, y / scene.height
    if place == "middle":
        return max(abs(x - 0.5), abs(y - 0.5)) <= (0.25 if lenient else 0.13)
    limit = 0.48 if lenient else 0.35
    return (
        ("left" not in place or x <= limit)
        and ("right" not in place or x >= 1 - limit)
        and ("top" not in place or y <= limit)
        and ("bottom" not in place or y >= 1 - limit)
    )


def _places(thing: Thing, scene: Scene) -> list[str]:
    return [place for place in PLACES if in_place(place, thing, scene)]


def related(relation: str, thing: Thing, anchor: Thing, lenient: bool = False) -> bool:
    """Whether an object clearly lies in a direction from another; lenient: by any distance between the centres."""
    if not lenient:
        return direction(thing, anchor) == relation
    (x, y), (ax, ay) = thing.centre, anchor.centre
    return {"left": x < ax, "right": x > ax, "above": y < ay, "below": y > ay}[relation]


def direction(thing: Thing, anchor: Thing) -> str | None:
    """The relation of an object to the anchor, if one is clear: the boxes do not overlap in the main direction."""
    (x, y), (ax, ay) = thing.centre, anchor.centre
    if abs(x - ax) > abs(y - ay):
        relation, gap = ("left", anchor.box[0] - thing.box[2]) if x < ax else ("right", thing.box[0] - anchor.box[2])
    else:
        relation, gap = ("above", anchor.box[1] - thing.box[3]) if y < ay else ("below", thing.box[1] - anchor.box[3])
    return relation if gap >= 0 else None


def _extreme(extreme: str, among: list[int], scene: Scene, lenient: bool) -> list[int]:
    """The objects of `among` that are the most extreme by a margin; lenient: that no other one beats by it."""
    if extreme in ("biggest", "smallest"):
        margin, values = math.log(1.15), {i: math.log(scene.things[i].side) for i in among}
    else:
        margin, values = 0.08, {i: scene.things[i].centre[0] / scene.width for i in among}
    sign = 1 if extreme in ("biggest", "rightmost") else -1
    lead = -margin if lenient else margin
    return [i for i in among if all(sign * (values[i] - values[j]) >= lead for j in among if j != i)]


# ---- phrases for an object


def find_phrase(scene: Scene, target: int, kind: str, rng: Generator) -> Spec | None:
    """A random phrase of one of `KINDS` that is true of the target alone; None if there is none.

    In most phrases the size, place or relation is needed: without it, they would be true of other objects too.
    """
    heads = shuffled(rng, nouns(scene.things[target]))
    if kind == "attribute":
        return next((head for head in heads if is_unique(head, scene, target)), None)
    if kind == "size":
        heads.append(Spec())
    if rng.random() < 0.8:
        heads.sort(key=lambda head: len(matches(head, scene)) == 1)
    for head in heads:
        for spec in _further(head, scene, target, kind, rng):
            if is_unique(spec, scene, target):
                return spec
    return None


def nouns(thing: Thing) -> list[Spec]:
    """The three ways to name an object: by colour and shape, by shape, by colour."""
    return [Spec(thing.colour, thing.shape), Spec(shape=thing.shape), Spec(colour=thing.colour)]


def _further(head: Spec, scene: Scene, target: int, kind: str, rng: Generator) -> Iterator[Spec]:
    """The noun with what is true of the target besides, in random order: size, places, extremes or relations."""
    things = scene.things
    if kind == "relation":
        for j in shuffled(rng, range(len(things))):
            relation = direction(things[target], things[j]) if j != target else None
            for anchor in shuffled(rng, nouns(things[j])) if relation else []:
                if is_unique(anchor, scene, j):
                    yield head._replace(relation=relation, anchor=anchor)
        return
    if kind == "size":
        specs, extremes = [head._replace(size=things[target].size)], ("biggest", "smallest")
    else:
        specs = [head._replace(place=place) for place in _places(things[target], scene)]
        extremes = ("leftmost", "rightmost")
    among = matches(head, scene)
    if len(among) > 1:  # otherwise the noun alone singles it out
        true = [extreme for extreme in extremes if target in _extreme(extreme, among, scene, False)]
        specs += [head._replace(extreme=extreme) for extreme in true]
    yield from shuffled(rng, specs)


def text(spec: Spec, rng: Generator, articles: Sequence[str] = ("the ", "")) -> str:
    """The words of a phrase, with random templates, synonyms and one of the articles."""
    size = pick(rng, SIZES[spec.size]) if spec.size else None
    phrase = " ".join(filter(None, (size, spec.colour, pick(rng, NOUNS[spec.shape]))))
    if spec.place:
        phrase = pick(rng, PLACES[spec.place]).format(phrase)
    if spec.extreme:
        phrase = pick(rng, EXTREMES[spec.extreme]).format(phrase)
    if spec.relation and spec.anchor:
        phrase = pick(rng, RELATIONS[spec.relation]).format(phrase, text(spec.anchor, rng, ("the ",)))
    return pick(rng, articles) + phrase


# ---- captions of a whole scene


class Mention(NamedTuple):
    """An object in a caption.

    Args:
        phrase: its noun phrase.
        first: index of that phrase's first token in the caption.
    """

    spec: Spec
    phrase: str
    first: int


class Caption(NamedTuple):
    """A caption as tokens (words and commas), and the objects that it mentions."""

    tokens: list[str]
    mentions: list[Mention]

    @property
    def text(self) -> str:
        return " ".join(self.tokens).replace(" ,", ",")


def compose(scene: Scene, rng: Generator, style: str, limit: int = CAPTION_WORDS, opening: float = 0.3) -> Caption:
    """A caption that lists all objects in random order.

    Args:
        style: one of `CAPTION_STYLES`: what is said besides colours and shapes, as far as `limit` allows.
        limit: most words, not counting commas; at least 19.
        opening: probability of an opening ("a picture of"), if `limit` allows.
    """
    order = shuffled(rng, range(len(scene.things)))
    specs = [nouns(scene.things[i])[0] for i in order]
    spare = limit - 3 * len(order) - 1
    start = ""
    if rng.random() < opening and spare >= 3:
        start = pick(rng, OPENINGS)
        spare -= 3
    if style == "relation" and spare >= 4:
        _relate(specs, order, scene)
    for k, i in enumerate(order):
        if style == "size" and spare >= 1 and rng.random() < 0.8:
            specs[k] = specs[k]._replace(size=scene.things[i].size)
            spare -= 1
        if style == "place" and rng.random() < 0.7 and (places := _places(scene.things[i], scene)):
            place = pick(rng, places)
            if (cost := _words_of(place)) <= spare:
                specs[k] = specs[k]._replace(place=place)
                spare -= cost
    return _say(specs, start, rng)


def compose_part(scene: Scene, rng: Generator, limit: int = CAPTION_WORDS) -> Caption:
    """A caption of one to three of the objects, in such detail that it is rarely true of another scene.

    A single object is described in full. Of several, some lack their colour or their shape.
    """
    order = shuffled(rng, range(len(scene.things)))[: pick(rng, (1, 2, 2, 3))]
    spare = limit - 3 * len(order) - 1
    specs = []
    for i in order:
        full, *parts = nouns(scene.things[i])
        specs.append(pick(rng, parts) if len(order) > 1 and rng.random() < 0.4 else full)
    if len(order) > 1 and rng.random() < 0.3:
        _relate(specs, order, scene)
    for k, i in enumerate(order):
        if len(order) == 1 or rng.random() < 0.6:
            specs[k] = specs[k]._replace(size=scene.things[i].size)
            spare -= 1
    for k, i in enumerate(order):
        related_here = specs[k].relation or (k and specs[k - 1].relation)
        places = _places(scene.things[i], scene)
        cost = max(map(_words_of, places), default=limit)
        if cost <= spare and not related_here and (len(order) == 1 or rng.random() < 0.7):
            specs[k] = specs[k]._replace(place=pick(rng, places))
            spare -= cost
    return _say(specs, "", rng)


def _words_of(place: str) -> int:
    """How many words a place adds to a caption."""
    return len(PLACES[place][0].format("").split())


def _relate(specs: list[Spec], order: list[int], scene: Scene) -> None:
    """Relate the first object that has a clear direction from the next one in the list to it."""
    for k, (i, j) in enumerate(itertools.pairwise(order)):
        if relation := direction(scene.things[i], scene.things[j]):
            specs[k] = specs[k]._replace(relation=relation, anchor=specs[k + 1])
            return


def _say(specs: list[Spec], start: str, rng: Generator) -> Caption:
    """The caption of a list of objects. An object with a relation is followed by its anchor."""
    caption = Caption(start.split(), [])
    last = len(specs) - (2 if len(specs) > 1 and specs[-2].relation else 1)
    for k, spec in enumerate(specs):
        before = specs[k - 1].relation if k else None
        if before:
            caption.tokens.extend(pick(rng, RELATIONS[before]).format("", "").split())
        elif k:
            caption.tokens.append("and" if k == last else ",")
        noun = text(spec._replace(place=None, relation=None), rng, ("",))
        again = any((spec.colour, spec.shape) == (other.spec.colour, other.spec.shape) for other in caption.mentions)
        phrase = f"{'another' if again else 'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        caption.mentions.append(Mention(spec, phrase, len(caption.tokens)))
        caption.tokens.extend(phrase.split())
        if spec.place:
            caption.tokens.extend(PLACES[spec.place][0].format("").split())
    return caption
