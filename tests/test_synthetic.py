from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset
from scipy.stats import spearmanr

from triton_st import synthetic, synthetic_lexicon
from triton_st.sampler import NoDuplicatesBatchSampler
from triton_st.synthetic import synthetic_sts, synthetic_triplets


@pytest.fixture(scope="module")
def triplets() -> Dataset:
    return synthetic_triplets()


@pytest.fixture(scope="module")
def graded() -> dict[str, Dataset]:
    return {"dev": synthetic_sts(1500, split="dev"), "test": synthetic_sts(1379, split="test")}


def sentences(dataset: Dataset) -> list[str]:
    return [text for name in dataset.column_names if name != "score" for text in dataset[name]]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def test_sizes_columns_and_scores(triplets: Dataset, graded: dict[str, Dataset]) -> None:
    assert (triplets.num_rows, triplets.column_names) == (10_112, ["anchor", "positive", "negative"])
    assert (graded["dev"].num_rows, graded["test"].num_rows) == (1500, 1379)
    for dataset in graded.values():
        assert dataset.column_names == ["sentence1", "sentence2", "score"]
        scores = dataset["score"]
        assert min(scores) == 0.0
        assert max(scores) == 5.0
        share = Counter(min(int(score), 4) for score in scores)
        assert all(share[grade] > 0.1 * len(scores) for grade in range(5))


def test_rich_enough(triplets: Dataset) -> None:
    counts = Counter(chain.from_iterable(words(text) for text in sentences(triplets)))
    assert sum(count >= 20 for count in counts.values()) >= 900
    assert len(set(triplets["anchor"])) == triplets.num_rows
    assert len({" ".join(words(text)[:2]) for text in triplets["anchor"]}) > 300


def test_every_sentence_is_well_formed(triplets: Dataset, graded: dict[str, Dataset]) -> None:
    for text in chain(sentences(triplets), *map(sentences, graded.values())):
        assert re.fullmatch(r"[A-Z][^.]*[^\W\d_]\.", text), text
        assert not re.search(r"  | ,|,,|~|\{|None|\ba (?!ewe)[aeiou]|\ban [^aeiou]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_verbs_agree_with_their_subject() -> None:
    rng = Random(3)
    counted = 0
    for _ in range(2000):
        scene = synthetic._draw_scene(rng)
        text, chosen = synthetic._say(rng, scene, "train")
        noun = chosen[scene.agent]
        counted += scene.count is not None
        if scene.count is not None:
            assert f"{synthetic_lexicon.plural(noun)} is " not in text
        elif synthetic_lexicon.plural(noun) != noun:
            assert f" {noun} are " not in text
            assert not re.search(rf"\b{noun} {chosen[scene.action]}\b", text)
    assert counted > 100


def test_no_split_shares_a_sentence(triplets: Dataset, graded: dict[str, Dataset]) -> None:
    train, dev, test = (set(sentences(dataset)) for dataset in (triplets, graded["dev"], graded["test"]))
    assert not train & dev
    assert not train & test
    assert not dev & test
    assert not set(sentences(synthetic_triplets(500, seed=7))) & (dev | test)


def test_triplets_make_the_reference_runs_79_batches(triplets: Dataset) -> None:
    assert len(NoDuplicatesBatchSampler(triplets, 128, seed=42)) == 79


def test_positives_differ_and_negatives_resemble(triplets: Dataset) -> None:
    """The labels are not in the words: negatives share more words with their anchors than positives do."""

    def overlap(column: str) -> float:
        pairs = zip(triplets["anchor"], triplets[column], strict=True)
        return sum(len(set(words(a)) & set(words(b))) / len(set(words(a)) | set(words(b))) for a, b in pairs) / 10_112

    assert overlap("negative") > overlap("positive") + 0.05
    assert all(
        a != p and a != n and p != n for a, p, n in zip(*(triplets[c] for c in triplets.column_names), strict=True)
    )


def test_word_overlap_does_not_solve_the_graded_pairs(triplets: Dataset, graded: dict[str, Dataset]) -> None:
    frequency = Counter(chain.from_iterable(set(words(text)) for text in sentences(triplets)))
    total = 3 * triplets.num_rows

    def weight(word: str) -> float:
        return math.log((total + 1) / (frequency[word] + 1)) ** 2

    for dataset in graded.values():
        jaccard, cosine = [], []
        for first, second in zip(dataset["sentence1"], dataset["sentence2"], strict=True):
            a, b = set(words(first)), set(words(second))
            jaccard.append(len(a & b) / len(a | b))
            cosine.append(sum(map(weight, a & b)) / math.sqrt(sum(map(weight, a)) * sum(map(weight, b))))
        assert spearmanr(jaccard, dataset["score"])[0] < 0.5
        assert spearmanr(cosine, dataset["score"])[0] < 0.6


def test_scores_follow_from_scenes() -> None:
    rng = Random(0)
    for _ in range(300):
        scene = synthetic._draw_scene(rng)
        assert synthetic._similarity(scene, scene) == 5.0
        other = synthetic._draw_scene(rng)
        assert synthetic._similarity(scene, other) == synthetic._similarity(other, scene) < 5.0
        less = synthetic._drop_details(rng, scene, 0.5)
        above = synthetic._generalise(rng, less, 0.5)
        assert 0 < synthetic._similarity(scene, above) <= synthetic._similarity(scene, less) <= 5.0


def test_entailment_and_contradiction_of_scenes() -> None:
    rng = Random(1)
    swaps = 0
    for _ in range(500):
        scene = synthetic._draw_scene(rng)
        entailed = synthetic._generalise(rng, synthetic._drop_details(rng, scene, 0.5), 0.5)
        for slot in synthetic._SLOTS:
            said, meant = getattr(entailed, slot), getattr(scene, slot)
            assert said is None or said is meant or said in meant.ancestors()
        excluded, changed = synthetic._contradict(rng, scene)
        for slot in changed:
            said, meant = getattr(excluded, slot), getattr(scene, slot)
            assert said is not meant
            assert said not in meant.ancestors()
        swaps += excluded.agent is scene.object and excluded.object is scene.agent
        assert excluded.object is None or excluded.object.kind in excluded.action.objects
        assert excluded.agent in synthetic._agents_of(excluded.action)
    assert swaps > 10


def test_no_word_names_two_concepts_of_one_table() -> None:
    nouns = [*synthetic.PEOPLE, *synthetic.ANIMALS, *synthetic.OBJECTS]
    details = [synthetic.MANNERS, synthetic.ANIMATE_ATTRIBUTES, synthetic.OBJECT_ATTRIBUTES, synthetic.FOOD_ATTRIBUTES]
    for table in (nouns, synthetic.PLACES, synthetic.TIMES, synthetic.ACTIONS, list(chain(*chain(*details)))):
        concepts = {id(c): c for leaf in table for c in (leaf, *leaf.ancestors())}.values()
        counts = Counter(word for concept in concepts for word in concept.words)
        assert {word for word, count in counts.items() if count > 1} == set()


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("chop", ("chops", "chopping", "chopped")),
        ("cook", ("cooks", "cooking", "cooked")),
        ("fix", ("fixes", "fixing", "fixed")),
        ("carry", ("carries", "carrying", "carried")),
        ("play", ("plays", "playing", "played")),
        ("lie down", ("lies down", "lying down", "lied down")),
        ("make off with", ("makes off with", "making off with", "made off with")),
        ("waltz", ("waltzes", "waltzing", "waltzed")),
        ("leaf through", ("leafs through", "leafing through", "leafed through")),
    ],
)
def test_verb_forms(verb: str, forms: tuple[str, str, str]) -> None:
    assert synthetic_lexicon.inflect(verb) == forms


@pytest.mark.parametrize(
    ("noun", "plural"),
    [
        ("lady", "ladies"),
        ("boy", "boys"),
        ("fireman", "firemen"),
        ("human being", "human beings"),
        ("fox", "foxes"),
        ("wolf", "wolves"),
        ("person in uniform", "people in uniform"),
    ],
)
def test_plurals(noun: str, plural: str) -> None:
    assert synthetic_lexicon.plural(noun) == plural


def digest(dataset: Dataset) -> str:
    return hashlib.sha256("\n".join(sentences(dataset)).encode()).hexdigest()


def test_seeds_and_sizes() -> None:
    assert digest(synthetic_triplets(50)) == digest(synthetic_triplets(50))
    assert synthetic_triplets(50).to_dict() == {
        name: cells[:50] for name, cells in synthetic_triplets(80).to_dict().items()
    }
    assert digest(synthetic_triplets(50)) != digest(synthetic_triplets(50, seed=1))
    assert digest(synthetic_sts(50)) != digest(synthetic_sts(50, seed=1))


def test_same_rows_in_every_process() -> None:
    code = (
        "import hashlib\n"
        "from triton_st.synthetic import synthetic_triplets, synthetic_sts\n"
        "for dataset in (synthetic_triplets(200), synthetic_sts(100, split='test')):\n"
        "    texts = [text for name in dataset.column_names if name != 'score' for text in dataset[name]]\n"
        "    print(hashlib.sha256('\\n'.join(texts).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [digest(synthetic_triplets(200)), digest(synthetic_sts(100, split="test"))]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        synthetic_triplets(0)
    with pytest.raises(TypeError, match="n: expected an int, got str"):
        synthetic_sts("5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split: expected 'dev' or 'test', got 'train'"):
        synthetic_sts(5, split="train")  # type: ignore[arg-type]
