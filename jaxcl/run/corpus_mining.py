"""Mine hard negatives of queries in a corpus with any model of texts, and write them as JSON lines.

Each line holds a query, its positives and its negatives as texts, and the similarities of both,
which may teach the next model:

    {"query": "…", "positives": ["…"], "negatives": ["…", "…"],
     "teacher_scores": {"positives": [0.81], "negatives": [0.64, 0.6]}}
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.data.beir import read_qrels
from jaxcl.data.documents import Documents, read_documents
from jaxcl.data.mining_pool import MiningPool, mining_pool, positives_as_documents
from jaxcl.data.query_files import QueryFile, read_judged_queries, read_queries
from jaxcl.data.score_files import ScoreFile, read_pair_scores
from jaxcl.host.files import is_remote
from jaxcl.host.paths import AnyPath, as_path
from jaxcl.host.progress import progress_bar, say
from jaxcl.host.remote import remove_tree
from jaxcl.host.user_folders import cache_folder
from jaxcl.negatives.hard_negatives import HardNegatives, QueryBlock, make_miner
from jaxcl.negatives.mining import MiningRule
from jaxcl.negatives.pair_scores import PairScores, scores_of
from jaxcl.run.embedding_model import EmbeddingModel
from jaxcl.run.host_vectors import for_inner_products
from jaxcl.run.load_model import load
from jaxcl.run.mined_blocks import BLOCK_ROWS, embed_in_blocks, mine_in_blocks
from jaxcl.run.mined_lines import write_mined
from jaxcl.run.mining_report import json_digest, mined_figures, rule_record
from jaxcl.settings.parts import Trust
from jaxcl.typing import Float, Integer

__all__ = ["MinedFiles", "mine_corpus"]

_BLOCK_TEXTS = {"cpu": 512}
_ACCELERATOR_TEXTS = 16_384
"""Texts of a block, after which their vectors are on the disk. Large blocks waste less on padding;
a CPU needs minutes for a few hundred long texts."""


class MinedFiles(NamedTuple):
    """The files of `mine_corpus`.

    Attributes:
      queries: queries with their positives, as `jaxcl.data.query_files.read_queries` reads them; or
        with ids, for `qrels`.
      output: the file to write, `.jsonl`.
      corpus: the documents, as `jaxcl.data.documents.read_documents` reads them; `None` for the
        positives of all queries.
      qrels: BEIR's relevance judgements, whose documents above 0 are the positives.
      scores: scores of pairs by another model, such as a re-ranker, as
        `jaxcl.data.score_files.read_pair_scores` reads them. They decide about margins and limits,
        and are written. Documents without a score are not mined.
      query_field, positive_field: fields of the queries; `None` takes common ones.
      id_field, text_field: fields of the corpus; `None` takes common ones.
    """

    queries: str | os.PathLike[str]
    output: str | os.PathLike[str]
    corpus: str | os.PathLike[str] | None = None
    qrels: str | os.PathLike[str] | None = None
    scores: str | os.PathLike[str] | None = None
    query_field: str | None = None
    positive_field: str | None = None
    id_field: str | None = None
    text_field: str | None = None


def mine_corpus(
    model: str | os.PathLike[str] | EmbeddingModel,
    files: MinedFiles,
    *,
    rule: MiningRule = MiningRule(),  # noqa: B008 - immutable
    guide: str | os.PathLike[str] | EmbeddingModel | None = None,
    skip_empty: bool = False,
    seed: int = 0,
    trust: Trust = (),
) -> dict[str, Any]:
    """Mine the hard negatives of queries in a corpus, and write them.

    Queries with the same text are one line, with all of their positives, in the order of the file.
    A query's positives are never among its negatives, nor are documents with the text of a positive
    (alone or after a title) or of the query, and, with qrels, a document with the query's id. White
    space does not tell texts apart, and documents that are equal in this sense count once.

    The embeddings and unfinished work stay in the user's cache (`cache_folder() / "mining"`), so
    that the same call resumes after a stop, and another rule needs no embedding. The vectors of all
    documents are on the disk and on the devices. With several processes, every one must make the
    same call; process 0 writes.

    Args:
      model: a model, or a path for `jaxcl.load`.
      files: the files to read and write. A report (`.report.json`) and examples (`.examples.md`)
        are written next to the output.
      rule: which of the nearest documents are negatives. Similarities are inner products of
        `jaxcl.run.host_vectors.for_inner_products`, which are cosines for most models. A margin is
        measured from the query's least similar positive.
      guide: another model, whose similarities decide about margins and limits, and are written.
      skip_empty: whether to leave out queries without negatives.
      seed: of the random draws.
      trust: the packages whose code a run may name.

    Returns:
      The report.

    Raises:
      ValueError: for a bad record, with its line; an unknown id; a rule by which nothing is found,
        or that does not fit the model; or a guide without a margin or limit.
      OSError: if a file cannot be read or written.
    """
    rule.check()
    output = _checked_output(files)
    queries, documents = _read_files(files)
    pool = mining_pool(documents, queries)
    available = int(pool.candidates.sum())
    if available <= rule.rank_range[0]:
        raise ValueError(
            f"the corpus has {available} different documents, none of rank {rule.rank_range[0]}; "
            "set --rank-range to lower ranks"
        )
    if files.scores is not None and guide is not None:
        raise ValueError("both scores and a guide decide about margins and limits; choose one")
    models = [_loaded(one, trust) for one in (model, guide) if one is not None]
    _check_models(models, rule, scored=files.scores is not None)
    scored = None if files.scores is None else _read_scores(as_path(files.scores), queries, pool)
    sides = [_embedded(one, queries.queries, pool) for one in models]
    what = {
        "rule": rule_record(rule),
        "seed": seed,
        "positives": json_digest([pool.positives, pool.excluded]),
        "embeddings": [side.name for side in sides],
        "scores": None if scored is None else scored.fingerprint,
    }
    folder = cache_folder() / "mining" / "unfinished" / json_digest(what)
    score: PairScores = sides[-1].score if scored is None else scored.of
    mined = _mined(sides, pool, rule, seed, folder, None if scored is None else score)
    report = {
        "records": queries.records,
        **pool.counts(),
        **mined_figures(mined),
        "fields": queries.fields,
        "rule": what["rule"],
        "seed": seed,
        "model": models[0].source,
        "guide": models[1].source if guide is not None else None,
        "scores": None if files.scores is None else str(files.scores),
        "made_from": what,
    }
    if jax.process_index() == 0:
        write_mined(output, queries, pool, mined, score, report, skip_empty=skip_empty, seed=seed)
        remove_tree(folder)
    return report


class _Embedded(NamedTuple):
    """The embeddings of one model, ready for inner products; `name` identifies them."""

    name: str
    queries: Float[np.ndarray, "q d"]
    keys: Float[np.ndarray, "k d"]

    def score(
        self, numbers: Integer[np.ndarray, " n"], rows: Integer[np.ndarray, "n p"]
    ) -> Float[np.ndarray, "n p"]:
        """The similarities of some queries to rows of keys."""
        return scores_of(self.queries[numbers], self.keys, rows)


def _checked_output(files: MinedFiles) -> AnyPath:
    output = as_path(files.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"{output} has an unknown suffix; mined texts are written as .jsonl")
    for name in (files.queries, files.corpus, files.qrels, files.scores):
        if name is not None and _same_file(output, as_path(name)):
            raise ValueError(f"{output} is also an input; choose another name for the output")
    # Mistakes in the path show before hours of work, not after.
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give the path of a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _same_file(path: AnyPath, other: AnyPath) -> bool:
    both_local = not is_remote(path) and not is_remote(other)
    if both_local and path.exists() and other.exists():
        return path.samefile(other)
    return path == other


def _read_files(files: MinedFiles) -> tuple[QueryFile, Documents]:
    path = as_path(files.queries)
    if files.qrels is None:
        queries = read_queries(
            path, query_field=files.query_field, positive_field=files.positive_field
        )
    elif files.positive_field is not None:
        raise ValueError("the qrels say which documents are positives; leave out --positive-field")
    else:
        qrels = read_qrels(as_path(files.qrels))
        queries = read_judged_queries(path, qrels, query_field=files.query_field)
    say(f"{path}: {queries.fields}")
    if files.corpus is not None:
        with progress_bar("reading documents", None) as advance:
            return queries, read_documents(
                as_path(files.corpus),
                id_field=files.id_field,
                text_field=files.text_field,
                advance=advance,
            )
    if files.id_field is not None or files.text_field is not None:
        raise ValueError("--id-field and --text-field are fields of a corpus; add --corpus")
    return queries, positives_as_documents(queries)


def _read_scores(path: AnyPath, queries: QueryFile, pool: MiningPool) -> ScoreFile:
    scored = read_pair_scores(path, queries.queries, pool)
    say(f"{path}: {len(scored.pairs):,} scores, {scored.unknown:,} of unknown queries or documents")
    for number, rows in enumerate(pool.positives):
        scores = scored.of(np.array([number]), np.array([rows]))[0]
        if np.isnan(scores).any():
            text = pool.read([rows[int(np.isnan(scores).argmax())]])[0]
            raise ValueError(
                f"{path} has no score for {queries.queries[number]!r:.80} and its positive "
                f"{text!r:.80}; score the positives of all queries"
            )
    return scored


def _loaded(model: str | os.PathLike[str] | EmbeddingModel, trust: Trust) -> EmbeddingModel:
    return model if isinstance(model, EmbeddingModel) else load(model, trust=trust)


def _check_models(models: list[EmbeddingModel], rule: MiningRule, *, scored: bool) -> None:
    model, judge = models[0], models[-1]
    has_limit = rule.min_score is not None or rule.max_score is not None
    has_rule = has_limit or rule.margin is not None or rule.relative_margin is not None
    if not has_rule and (scored or len(models) > 1):
        name = "scores decide" if scored else "a guide decides"
        raise ValueError(
            f"{name} about margins and limits, but none is set; add --margin, --relative-margin, "
            "--min-score or --max-score"
        )
    if len(models) > 1 and model.made_from == judge.made_from:
        raise ValueError(f"the guide {judge.source} is the model itself; give another one")
    for one in models:  # before texts are embedded
        for_inner_products(one.similarity_function, "key", np.zeros((1, one.dim), np.float32))
    distances = judge.similarity_function == "euclidean" and not scored
    if distances and (has_limit or rule.relative_margin is not None):
        raise ValueError(
            f"{judge.source} compares by distances, for which only --margin has a meaning; leave "
            "out --relative-margin, --min-score and --max-score"
        )


def _embedded(model: EmbeddingModel, queries: list[str], pool: MiningPool) -> _Embedded:
    """Embed queries and keys, each in a file that is named by its texts and the model."""
    documents = json_digest([model.made_from, pool.documents.fingerprint])
    outside, asked = (json_digest([model.made_from, texts]) for texts in (pool.outside, queries))
    keys = _embedded_texts(model, "key", f"documents-{documents}", len(pool.rows), pool.read)
    if pool.outside:
        name, read = f"positives-{outside}", _reader(pool.outside)
        more = _embedded_texts(model, "key", name, len(pool.outside), read)
        keys = np.concatenate([keys, more])
    name = f"queries-{asked}"
    vectors = _embedded_texts(model, "query", name, len(queries), _reader(queries))
    return _Embedded(json_digest([documents, outside, asked]), vectors, keys)


def _reader(texts: Any) -> Callable[[np.ndarray], list[str]]:
    return lambda rows: [texts[row] for row in rows]


def _embedded_texts(
    model: EmbeddingModel,
    side: str,
    name: str,
    num_texts: int,
    read: Callable[[np.ndarray], list[str]],
) -> Float[np.ndarray, "n d"]:
    ready = functools.partial(for_inner_products, model.similarity_function, side)
    dim = ready(np.zeros((1, model.dim), np.float32)).shape[1]

    def embed(rows: np.ndarray, advance: Callable[[int], None]) -> Float[np.ndarray, "n d"]:
        texts = read(rows)
        vectors = ready(model.encode(texts, side=side, progress=advance))
        finite = np.isfinite(vectors).all(1)
        if not finite.all():
            raise ValueError(
                f"{model.source} embeds {texts[int(np.argmin(finite))]!r:.80} as numbers that are "
                "not finite; use another model"
            )
        return vectors

    path = cache_folder() / "mining" / f"{name}.npy"
    what = f"embedding {name.partition('-')[0]}"
    block = _BLOCK_TEXTS.get(jax.default_backend(), _ACCELERATOR_TEXTS)
    return embed_in_blocks(path, num_texts, dim, embed, what=what, block_rows=block)


def _mined(
    sides: list[_Embedded],
    pool: MiningPool,
    rule: MiningRule,
    seed: int,
    folder: Path,
    pair_scores: PairScores | None,
) -> HardNegatives:
    own = sides[0]
    guide = sides[1] if len(sides) > 1 else None
    mine = make_miner(
        own.keys,
        rule=rule,
        candidates=pool.candidates,
        guide=None if guide is None else guide.keys,
        pair_scores=pair_scores,
        seed=seed,
        block_rows=min(BLOCK_ROWS, len(own.queries)),
    )

    def block_of(numbers: np.ndarray) -> QueryBlock:
        return QueryBlock(
            numbers,
            own.queries[numbers],
            [pool.positives[number] for number in numbers],
            [pool.excluded[number] for number in numbers],
            guide=None if guide is None else guide.queries[numbers],
        )

    return mine_in_blocks(mine, block_of, len(own.queries), rule.per_query, folder)
