"""The embedded data set: made-up scenes put into words, so that training and evaluation need no download.

A scene is who does what to what, where, when and how. Sentences verbalise scenes in several syntactic forms and with
synonyms. From scenes, not from words, follow the labels:

- entailment: the same scene with details left out and concepts generalised ("boy" -> "child"), put in other words;
- contradiction: the same scene with an element replaced by one that excludes it, or with the roles swapped, in words
  as close to the original's as they can be;
- graded similarity: 0 to 5, by how much of what either scene says the two share.

The scenes are grammatical, not always likely. Everything follows from the seed through `random.Random.random()`, whose
sequence does not change between versions of Python.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from random import Random
from typing import Any, Literal, TypeVar

from datasets import Dataset, DatasetInfo

from triton_st import synthetic_lexicon as lexicon

__all__ = ["synthetic_sts", "synthetic_triplets"]

T = TypeVar("T")
Split = Literal["train", "dev", "test"]
_SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "train", "train", "dev", "test")


# --- concepts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Concept:
    """A node of a taxonomy: its synonyms and what it is a kind of. Each is one object, equal only to itself."""

    words: tuple[str, ...]
    parent: Concept | None = None
    kind: str = ""  # what restricts its use with others: "person", "animal", "food", ...; for actions, who can do it
    objects: tuple[str, ...] = ()  # for actions: the kinds of thing that they are done to

    def ancestors(self) -> list[Concept]:
        """What it is a kind of, nearest first."""
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.strip().split(", "))


def _nouns(table: str, top: str, kind: str = "") -> list[Concept]:
    """The indented lines of a lexicon table, below the lines they are indented under, below `top`."""
    root = Concept(_words(top), kind=kind)
    leaves: list[Concept] = []
    parent = root
    for line in table.strip().splitlines():
        if line.startswith(" "):
            leaves.append(Concept(_words(line), parent, parent.kind))
        else:
            name, words = line.split(": ")
            parent = Concept(_words(words), root, kind or name)
    return leaves


def _verbs(table: str) -> list[Concept]:
    leaves: list[Concept] = []
    parent: Concept | None = None
    for line in table.strip().splitlines():
        if line.startswith(" "):
            words, _, roles = line.partition(": ")
            agents, _, objects = roles.partition(" >")
            kinds = [kind for kind in _words(objects) if kind]
            if "goods" in kinds:
                kinds += lexicon.GOODS
            leaves.append(Concept(_words(words), parent, agents, tuple(kinds)))
        else:
            parent = Concept(_words(line))
    return leaves


def _dimensions(table: str) -> list[list[Concept]]:
    return [[Concept(_words(words)) for words in line.split(" / ")] for line in table.strip().splitlines()]


PEOPLE = _nouns(lexicon.PEOPLE, lexicon.PERSON, "person")
ANIMALS = _nouns(lexicon.ANIMALS, lexicon.ANIMAL, "animal")
OBJECTS = _nouns(lexicon.OBJECTS, lexicon.OBJECT)
PLACES = _nouns(lexicon.PLACES, lexicon.SOMEWHERE)
TIMES = _nouns(lexicon.TIMES, lexicon.SOMETIME)
ACTIONS = _verbs(lexicon.ACTIONS)
MANNERS = _dimensions(lexicon.MANNERS)
ANIMATE_ATTRIBUTES = _dimensions(lexicon.ANIMATE_ATTRIBUTES)
OBJECT_ATTRIBUTES = _dimensions(lexicon.OBJECT_ATTRIBUTES)
FOOD_ATTRIBUTES = _dimensions(lexicon.FOOD_ATTRIBUTES)
COUNTS = _dimensions(lexicon.COUNTS)[0]


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


# --- scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Who does what to what, where, when, how; None is left unsaid."""

    action: Concept
    agent: Concept
    object: Concept | None = None
    place: Concept | None = None
    time: Concept | None = None
    manner: Concept | None = None
    agent_attribute: Concept | None = None
    object_attribute: Concept | None = None
    count: Concept | None = None  # None: one agent


_SLOTS = tuple(field.name for field in fields(Scene))
_WEIGHTS = {
    "action": 1.3, "agent": 1.2, "object": 1.2, "place": 0.7, "time": 0.4, "manner": 0.3, "agent_attribute": 0.3,
    "object_attribute": 0.3, "count": 0.2,
}  # fmt: skip


def _with(scene: Scene, slot: str, concept: Concept | None) -> Scene:
    values: dict[str, Any] = {slot: concept}
    return replace(scene, **values)


def _attributes_for(concept: Concept | None) -> list[list[Concept]]:
    if concept is None:
        return []
    if concept.kind in ("person", "animal"):
        return ANIMATE_ATTRIBUTES[1:] if concept.words[0] in lexicon.AGE_IMPLIED else ANIMATE_ATTRIBUTES
    return FOOD_ATTRIBUTES if concept.kind in ("food", "drink") else OBJECT_ATTRIBUTES


@cache
def _agents_of(action: Concept) -> list[Concept]:
    return PEOPLE * 2 + ANIMALS if "animal" in action.kind else PEOPLE


@cache
def _objects_of(action: Concept) -> list[Concept]:
    return [concept for concept in (*PEOPLE, *ANIMALS, *OBJECTS) if concept.kind in action.objects]


def _other(rng: Random, options: Sequence[Concept], concept: Concept | None) -> Concept:
    """One of `options` that is not `concept` nor a kind of the same thing, if there is one."""
    parent = concept.parent if concept else None
    strangers = [o for o in options if o != concept and (parent is None or o.parent != parent)]
    return _pick(rng, strangers or [o for o in options if o != concept])


def _sibling(rng: Random, groups: Sequence[Sequence[Concept]], concept: Concept) -> Concept:
    """Another concept of the same dimension: one that excludes `concept`."""
    group = next(group for group in groups if concept in group)
    return _pick(rng, [other for other in group if other != concept])


def _draw_scene(rng: Random) -> Scene:
    action = _pick(rng, ACTIONS)
    agent = _pick(rng, _agents_of(action))
    scene = Scene(action, agent, place=_pick(rng, PLACES))
    if action.objects:
        thing = _other(rng, _objects_of(action), agent)
        attribute = _pick(rng, _pick(rng, _attributes_for(thing))) if rng.random() < 0.6 else None
        scene = replace(scene, object=thing, object_attribute=attribute)
    if rng.random() < 0.6:
        scene = replace(scene, agent_attribute=_pick(rng, _pick(rng, _attributes_for(agent))))
    if rng.random() < 0.5:
        scene = replace(scene, time=_pick(rng, TIMES))
    if rng.random() < 0.4:
        scene = replace(scene, manner=_pick(rng, _pick(rng, MANNERS)))
    if rng.random() < 0.2:
        scene = replace(scene, count=_pick(rng, COUNTS))
    return scene


def _generalise(rng: Random, scene: Scene, chance: float) -> Scene:
    """Climb from some concepts to what they are kinds of: entailed by `scene`."""
    for slot in ("action", "agent", "object", "place", "time"):
        concept = getattr(scene, slot)
        if concept is None or not concept.ancestors() or rng.random() >= chance:
            continue
        above = _pick(rng, concept.ancestors()[:1] * 3 + concept.ancestors()[1:])
        if above not in (scene.agent, scene.object):  # "a person hugs a person" would not be said
            scene = _with(scene, slot, above)
    return scene


def _drop_details(rng: Random, scene: Scene, chance: float, keep: Sequence[str] = ()) -> Scene:
    """Leave some details unsaid: entailed by `scene`."""
    for slot in ("place", "time", "manner", "agent_attribute", "object_attribute"):
        if slot not in keep and rng.random() < chance:
            scene = _with(scene, slot, None)
    return scene


def _change(rng: Random, scene: Scene, slot: str, near: bool) -> Scene:
    """Replace one element by another that fits the rest of the scene: of the same kind if `near`, else of another."""
    old: Concept = getattr(scene, slot)
    if slot in ("agent_attribute", "object_attribute", "manner"):
        groups = {"agent_attribute": ANIMATE_ATTRIBUTES, "manner": MANNERS}.get(slot) or _attributes_for(scene.object)
        return _with(scene, slot, _sibling(rng, groups, old))
    options: list[Concept]
    if slot == "action":
        options = [
            action
            for action in ACTIONS
            if scene.agent in _agents_of(action)
            and (scene.object.kind in action.objects if scene.object else not action.objects)
        ]
    elif slot == "count":
        options = COUNTS
    else:
        taken = (scene.agent, scene.object)
        options = {"agent": _agents_of(scene.action), "place": PLACES, "time": TIMES}.get(slot) or _objects_of(
            scene.action
        )
        options = [option for option in options if option is old or option not in taken]
    others = [option for option in options if option is not old]
    alike = [option for option in others if option.parent is not None and option.parent is old.parent]
    unlike = [option for option in others if option not in alike]
    choices = (alike or unlike) if near else (unlike or alike)
    if not choices:
        return scene
    scene = _with(scene, slot, _pick(rng, choices))
    attribute: Concept | None = getattr(scene, f"{slot}_attribute", None)
    if attribute is not None:
        groups = _attributes_for(getattr(scene, slot))
        if not any(attribute in group for group in groups):
            scene = _with(scene, f"{slot}_attribute", _pick(rng, _pick(rng, groups)))
    return scene


def _swap_roles(scene: Scene) -> Scene | None:
    """The same deed done by its object to its agent; None where that makes no sense."""
    if (
        scene.object is None
        or scene.object not in _agents_of(scene.action)
        or scene.agent.kind not in scene.action.objects
    ):
        return None
    return replace(
        scene,
        agent=scene.object,
        object=scene.agent,
        agent_attribute=scene.object_attribute,
        object_attribute=scene.agent_attribute,
        count=None,
    )


def _contradict(rng: Random, scene: Scene) -> tuple[Scene, list[str]]:
    """A scene that excludes `scene`, and the slots in which it does."""
    swapped = _swap_roles(scene)
    if swapped is not None and rng.random() < 0.4:
        return swapped, ["agent", "object"]
    slots = [slot for slot in _SLOTS if slot not in ("count", "time") and getattr(scene, slot) is not None]
    changed: list[str] = []
    wanted = 1 if rng.random() < 0.5 else 2
    while len(changed) < wanted:
        slot = _pick(rng, [slot for slot in slots if slot not in changed])
        other = _change(rng, scene, slot, near=False)
        if other is not scene:
            scene = other
            changed.append(slot)
    return scene, changed


def _closeness(a: Concept, b: Concept) -> float:
    """How much of the meaning of one concept is in the other: 1 the same, 0 nothing."""
    if a is b:
        return 1.0
    if a in b.ancestors()[:1] or b in a.ancestors()[:1]:
        return 0.7
    if a in b.ancestors() or b in a.ancestors() or (a.parent is not None and a.parent is b.parent):
        return 0.35
    return 0.0


def _similarity(a: Scene, b: Scene) -> float:
    """0 to 5: what two scenes share of all that either says; a detail that only one mentions counts half."""
    shared = total = 0.0
    for slot, weight in _WEIGHTS.items():
        first, second = getattr(a, slot), getattr(b, slot)
        if first is not None and second is not None:
            shared += weight * _closeness(first, second)
            total += weight
        elif first is not second:
            total += weight / 2
    return round(5 * shared / total, 2)


# --- sentences ---------------------------------------------------------------------------------------------------


class _Speaker:
    """Chooses words for concepts: the ones an earlier sentence used with chance `reuse`, else others."""

    def __init__(self, rng: Random, earlier: dict[Concept, str] | None = None, reuse: float = 0.5) -> None:
        self.rng = rng
        self.earlier = earlier or {}
        self.reuse = reuse
        self.chosen: dict[Concept, str] = {}

    def word(self, concept: Concept) -> str:
        earlier = self.earlier.get(concept)
        others = [word for word in concept.words if word != earlier]
        reused = earlier is not None and (not others or self.rng.random() < self.reuse)
        self.chosen[concept] = earlier if earlier is not None and reused else _pick(self.rng, others)
        return self.chosen[concept]

    def noun_phrase(
        self, concept: Concept, attribute: Concept | None, count: Concept | None = None, definite: bool = False
    ) -> str:
        noun = self.word(concept)
        uncounted, noun = noun.startswith("~"), noun.lstrip("~")
        described = f"{self.word(attribute)} {noun}" if attribute else noun
        if count:
            return f"{self.word(count)} {described[: -len(noun)]}{lexicon.plural(noun)}"
        if definite:
            return f"the {described}"
        if uncounted:
            return f"some {described}"
        return f"{'an' if described[0] in 'aeiou' and not described.startswith('ewe') else 'a'} {described}"


def _verbalise(speaker: _Speaker, scene: Scene) -> str:
    """One sentence about the scene, in a form drawn at random."""
    rng = speaker.rng
    framed = rng.random() < 0.2
    agent = speaker.noun_phrase(
        scene.agent, scene.agent_attribute, scene.count, definite=not framed and rng.random() < 0.3
    )
    thing = ""
    if scene.object:
        thing = speaker.noun_phrase(scene.object, scene.object_attribute, definite=rng.random() < 0.3)
    verb = speaker.word(scene.action)
    does, doing, done = lexicon.inflect(verb)
    does, be = (verb, "are") if scene.count else (does, "is")
    who = "who" if scene.agent.kind == "person" else "that"
    place, time = (speaker.word(concept) if concept else "" for concept in (scene.place, scene.time))
    adverb = speaker.word(scene.manner) if scene.manner else ""
    early, late = (adverb, "") if rng.random() < 0.5 else ("", adverb)

    front = ""
    if not framed and rng.random() < 0.3:
        if time and rng.random() < 0.5:
            front, time = f"{time}, ", ""
        elif place:
            front, place = f"{place}, ", ""
    about = (early, doing, thing, late, place, time)
    forms = [
        (agent, be, *about),
        (agent, be, *about),
        (agent, early, does, thing, late, place, time),
        (agent, be, "busy", *about),
        (agent, "can be seen", *about),
        ("it is", agent, who, be, *about),
        (f"the one{'s' if scene.count else ''}", who, be, *about, be, agent),
    ]
    if thing:
        forms.append(("it is", thing, "that", agent, be, early, doing, late, place, time))
    if thing and verb not in lexicon.NEVER_PASSIVE:
        passive = (thing, "is being", early, done, "by", agent, late, place, time)
        forms += [passive] * 3
    if place:
        forms.append((agent, be, f"{place},", early, doing, thing, late, time))
        forms.append((agent, who, be, place, be, early, doing, thing, late, time))
    if framed:
        sentence = _pick(rng, lexicon.NOUN_FRAMES).format(_join(agent, *about), be=be)
    else:
        sentence = front + _join(*_pick(rng, forms))
        if rng.random() < 0.4:
            sentence = _pick(rng, lexicon.CLAUSE_FRAMES).format(sentence)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _say(
    rng: Random, scene: Scene, split: Split, earlier: dict[Concept, str] | None = None, reuse: float = 0.5
) -> tuple[str, dict[Concept, str]]:
    """A sentence about `scene` that belongs to `split`, and the words chosen in it.

    Each possible sentence belongs to one split, by its checksum: so no two splits ever share one, whatever their sizes
    and seeds.
    """
    while True:
        speaker = _Speaker(rng, earlier, reuse)
        sentence = _verbalise(speaker, scene)
        if re.search(r"\b(\w+) \1\b", sentence):  # "performs on on the mountain"
            continue
        if _SPLITS[zlib.crc32(sentence.encode()) % len(_SPLITS)] == split:
            return sentence, speaker.chosen


# --- data sets ---------------------------------------------------------------------------------------------------


def synthetic_triplets(n: int = 10_112, seed: int = 42) -> Dataset:
    """`n` rows of anchor, positive (entailed by the anchor) and negative (contradicts it); no anchor twice.

    The same `n` and `seed` always give the same rows, and a smaller `n` their beginning. No sentence is also in
    `synthetic_sts`.
    """
    _check_size(n)
    rng = Random(f"train {seed}")
    columns: dict[str, list[str]] = {"anchor": [], "positive": [], "negative": []}
    seen: set[str] = set()
    while len(seen) < n:
        scene = _draw_scene(rng)
        anchor, words = _say(rng, scene, "train")
        entailed = _generalise(rng, _drop_details(rng, scene, 0.4), 0.25)
        positive, _ = _say(rng, entailed, "train", words, reuse=0.2)
        excluded, changed = _contradict(rng, scene)
        excluded = _drop_details(rng, excluded, 0.4, keep=changed)
        negative, _ = _say(rng, excluded, "train", words, reuse=0.8)
        if anchor in seen or anchor == positive:
            continue
        seen.add(anchor)
        for column, sentence in zip(columns.values(), (anchor, positive, negative), strict=True):
            column.append(sentence)
    return Dataset.from_dict(columns, info=DatasetInfo(dataset_name="synthetic-scenes"))


def synthetic_sts(n: int = 1_500, seed: int = 42, split: Literal["dev", "test"] = "dev") -> Dataset:
    """`n` rows of sentence1, sentence2 and score: graded similarity, 0 (nothing in common) to 5 (the same scene).

    Dev and test share no sentence with each other nor with `synthetic_triplets`.
    """
    _check_size(n)
    if split not in ("dev", "test"):
        raise ValueError(f"split: expected 'dev' or 'test', got {split!r}")
    rng = Random(f"{split} {seed}")
    first, second, scores = [], [], []
    for _ in range(n):
        scene = _drop_details(rng, _draw_scene(rng), 0.3)
        other = _vary(rng, scene)
        sentence, words = _say(rng, scene, split)
        first.append(sentence)
        second.append(_say(rng, other, split, words, reuse=0.3)[0])
        scores.append(_similarity(scene, other))
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})


def _vary(rng: Random, scene: Scene) -> Scene:
    """A scene that shares anything from nothing to all with `scene`."""
    slots = [slot for slot in _SLOTS if getattr(scene, slot) is not None]
    fraction = rng.random()
    other = scene
    if fraction > 0.85:
        other = _draw_scene(rng)
    else:
        for slot in slots:
            if rng.random() < fraction:
                other = _change(rng, other, slot, near=rng.random() < 0.3)
    return _generalise(rng, _drop_details(rng, other, 0.2), 0.1)


def _check_size(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
