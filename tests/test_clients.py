"""What people hand a sentence encoder to: sentence-transformers' evaluators and search with our class, other libraries
with a model of sentence-transformers' own type that runs on our kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sentence_transformers
from sentence_transformers.sentence_transformer import evaluation
from sentence_transformers.util import paraphrase_mining, semantic_search

import triton_st
from triton_st import SentenceTransformer

DOCUMENTS = [
    "A boy plays football in the park.",
    "Rain fell on the city all night.",
    "The cook cuts onions and carrots.",
    "Children are playing with a ball on the grass.",
    "It was raining in town until morning.",
    "A chef is chopping vegetables.",
    "The train to the coast is late again.",
    "Trains towards the sea are delayed.",
]
PAIRS = [(0, 3), (1, 4), (2, 5), (6, 7)]


@pytest.fixture(scope="module")
def ours(minilm_folder) -> SentenceTransformer:
    return SentenceTransformer(minilm_folder, device="cpu")


@pytest.fixture
def theirs(minilm_folder) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(minilm_folder), device="cpu")


def evaluators() -> list[evaluation.SentenceEvaluator]:
    firsts, seconds = ([DOCUMENTS[pair[side]] for pair in PAIRS] for side in (0, 1))
    corpus = {str(i): text for i, text in enumerate(DOCUMENTS) if i not in {a for a, _ in PAIRS}}
    queries = {f"q{a}": DOCUMENTS[a] for a, _ in PAIRS}
    relevant = {f"q{a}": {str(b)} for a, b in PAIRS}
    return [
        evaluation.EmbeddingSimilarityEvaluator(firsts, seconds[::-1], [0.1, 0.4, 0.2, 0.9]),
        evaluation.InformationRetrievalEvaluator(queries, corpus, relevant, precision_recall_at_k=[1], map_at_k=[3]),
        evaluation.TripletEvaluator(firsts, seconds, seconds[1:] + seconds[:1]),
        evaluation.ParaphraseMiningEvaluator(
            {str(i): text for i, text in enumerate(DOCUMENTS)}, [(str(a), str(b)) for a, b in PAIRS]
        ),
        evaluation.BinaryClassificationEvaluator(firsts * 2, seconds + seconds[::-1], [1] * 4 + [0] * 4),
    ]


@pytest.mark.parametrize("which", range(5), ids=["similarity", "retrieval", "triplet", "mining", "binary"])
def test_evaluators_of_sentence_transformers(ours, theirs, which):
    found = [evaluators()[which](model) for model in (ours, theirs)]
    assert found[0].keys() == found[1].keys()
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert all(np.isfinite(value) for value in found[0].values())


def test_search_of_sentence_transformers(ours, theirs):
    results = []
    for model in (ours, theirs):
        embeddings = model.encode(DOCUMENTS, convert_to_tensor=True)
        results.append(semantic_search(embeddings[:3], embeddings, top_k=2))
    for mine, other in zip(*results, strict=True):
        assert [hit["corpus_id"] for hit in mine] == [hit["corpus_id"] for hit in other]
        assert [hit["score"] for hit in mine] == pytest.approx([hit["score"] for hit in other], abs=1e-5)
    mined = [paraphrase_mining(model, DOCUMENTS)[:4] for model in (ours, theirs)]
    assert [pair[1:] for pair in mined[0]] == [pair[1:] for pair in mined[1]]


def test_keybert(theirs):
    keybert = pytest.importorskip("keybert", reason="KeyBERT is not installed (extra: clients)")
    text = " ".join(DOCUMENTS)
    expected = keybert.KeyBERT(theirs).extract_keywords(text, top_n=5)
    with triton_st.accelerate(theirs) as handle:
        assert handle.active
        client = keybert.KeyBERT(theirs)
        assert client.model.embedding_model is theirs
        found = client.extract_keywords(text, top_n=5)
    assert [word for word, _ in found] == [word for word, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-3)


def test_bertopic(theirs):
    bertopic = pytest.importorskip("bertopic", reason="BERTopic is not installed (extra: clients)")
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    def topics(model) -> list[int]:
        client = bertopic.BERTopic(
            embedding_model=model, umap_model=PCA(3, random_state=0), hdbscan_model=KMeans(4, random_state=0, n_init=3)
        )
        assert client.fit_transform(DOCUMENTS) is not None
        assert client.embedding_model.embedding_model is model
        return client.topics_

    expected = topics(theirs)
    with triton_st.accelerate(theirs) as handle:
        assert handle.active
        assert topics(theirs) == expected


def test_langchain(minilm_folder):
    langchain = pytest.importorskip(
        "langchain_huggingface", reason="langchain-huggingface is not installed (extra: clients)"
    )
    client = langchain.HuggingFaceEmbeddings(model_name=str(minilm_folder), model_kwargs={"device": "cpu"})
    documents, query = client.embed_documents(DOCUMENTS), client.embed_query(DOCUMENTS[0])
    with triton_st.accelerate(client._client) as handle:
        assert handle.active
        np.testing.assert_allclose(client.embed_documents(DOCUMENTS), documents, rtol=0, atol=1e-5)
        np.testing.assert_allclose(client.embed_query(DOCUMENTS[0]), query, rtol=0, atol=1e-5)


def test_mteb(theirs):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (extra: clients)")
    from datasets import Dataset, DatasetDict

    class Pairs(mteb.abstasks.AbsTaskSTS):
        metadata = mteb.get_task("STSBenchmark").metadata.model_copy(update={"name": "LocalPairs"})
        min_score, max_score = 0, 5

        def load_data(self, **kwargs) -> None:
            rows = [(a, b, 5.0) for a, b in PAIRS] + [(a, c, 1.0) for (a, _), (_, c) in itertools.pairwise(PAIRS)]
            columns = {
                "sentence1": [DOCUMENTS[a] for a, _, _ in rows],
                "sentence2": [DOCUMENTS[b] for _, b, _ in rows],
                "score": [score for _, _, score in rows],
            }
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    def score() -> float:
        result = mteb.evaluate(theirs, Pairs(), cache=None)
        return result.task_results[0].get_score()

    expected = score()
    with triton_st.accelerate(theirs) as handle:
        assert handle.active
        assert score() == pytest.approx(expected, abs=1e-5)
