"""Mine hard negatives for queries in a corpus, and write them as JSON lines.

Each line has a query, its positives and its negatives as texts, and the similarities of both, from
which another model can learn:

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
"""Number of texts per block; the vectors of each finished block are on disk. Large blocks waste
less on padding, but a CPU needs minutes for a few hundred long texts."""


_PREFIXES = ("documents", "positives", "queries")
"""Prefixes of the files of embeddings; `positives` are the positives outside the corpus."""


class MinedFiles(NamedTuple):
    """The files that `mine_corpus` reads and writes.

    Attributes:
      queries: queries with their positives, for `jaxcl.data.query_files.read_queries`; with
        `qrels`, queries with ids.
      output: the file to write, `.jsonl`.
      corpus: the documents, for `jaxcl.data.documents.read_documents`; `None` for the positives of
        all queries.
      qrels: relevance judgements in BEIR's format; documents with a grade above 0 are positives.
      scores: scores of pairs from another model, such as a re-ranker, for
        `jaxcl.data.score_files.read_pair_scores`. Margins and limits apply to these scores, which
        are also written to the output. Documents without a score are not mined.
      query_field, positive_field: fields of the queries; `None` for common names.
      id_field, text_field: fields of the corpus; `None` for common names.
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
    """Mine hard negatives for queries in a corpus, and write them to a file.

    Queries with the same text share one line with all of their positives, in the order of the file.
    The negatives of a query never include one of its positives, a document with the text of a
    positive (alone or after a title) or of the query, or, with qrels, a document with the query's
    id. Texts that differ only in white space are equal, and equal documents are mined once.

    Embeddings and unfinished work stay in the user's cache (`cache_folder() / "mining"`), so that
    the same call resumes after a stop, and a call with another rule reuses the embeddings. The
    vectors of all documents must fit on the disk and on the devices. With several processes, each
    of them must make the same call; process 0 writes the files.

    Args:
      model: a model, or a path for `jaxcl.load`.
      files: the files to read and write. A report (`.report.json`) and examples (`.examples.md`)
        are written next to the output.
      rule: the rule that selects negatives among the nearest documents. Similarities are inner
        products of `jaxcl.run.host_vectors.for_inner_products`, which are cosines for most models.
        The margin is measured from the least similar positive of the query.
      guide: a guide model; margins and limits apply to its similarities, which are also written.
      skip_empty: whether to leave out queries without negatives.
      seed: seed of the random draws.
      trust: packages from which an encoder named `package.module:function` may be imported.

    Returns:
      The report.

    Raises:
      ValueError: for an invalid record, with its line; an unknown id; a rule that leaves no
        negatives or does not fit the model; or a guide without a margin or limit.
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
        raise ValueError(
            "scores and a guide are both given, but margins and limits apply to only one of them; "
            "leave one out"
        )
    models = [_loaded(source, trust) for source in (model, guide) if source is not None]
    _check_models(models, rule, scored=files.scores is not None)
    scored = None if files.scores is None else _read_scores(as_path(files.scores), queries, pool)
    embedded = [_embedded(loaded, queries.queries, pool) for loaded in models]
    made_from = {
        "rule": rule_record(rule),
        "seed": seed,
        "positives": json_digest([pool.positives, pool.excluded]),
        "embeddings": [one.name for one in embedded],
        "scores": None if scored is None else scored.fingerprint,
    }
    folder = cache_folder() / "mining" / "unfinished" / json_digest(made_from)
    score: PairScores = embedded[-1].score if scored is None else scored.of
    mined = _mined(embedded, pool, rule, seed, folder, None if scored is None else score)
    report = {
        "records": queries.records,
        **pool.counts(),
        **mined_figures(mined),
        "fields": queries.fields,
        "rule": made_from["rule"],
        "seed": seed,
        "model": models[0].source,
        "guide": models[1].source if guide is not None else None,
        "scores": None if files.scores is None else str(files.scores),
        "made_from": made_from,
    }
    if jax.process_index() == 0:
        write_mined(output, queries, pool, mined, score, report, skip_empty=skip_empty, seed=seed)
        remove_tree(folder)
    return report


class _Embedded(NamedTuple):
    """Embeddings of queries and keys, ready for inner products, and a name that identifies them."""

    name: str
    queries: Float[np.ndarray, "q d"]
    keys: Float[np.ndarray, "k d"]

    def score(
        self, numbers: Integer[np.ndarray, " n"], rows: Integer[np.ndarray, "n p"]
    ) -> Float[np.ndarray, "n p"]:
        """Compute the similarities of queries, by number, to rows of keys."""
        return scores_of(self.queries[numbers], self.keys, rows)


def _checked_output(files: MinedFiles) -> AnyPath:
    output = as_path(files.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"{output} has an unknown suffix; mined texts are written as .jsonl")
    for name in (files.queries, files.corpus, files.qrels, files.scores):
        if name is not None and _same_file(output, as_path(name)):
            raise ValueError(f"{output} is also an input; choose another name for the output")
    # Check the path before hours of work, not after.
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
        raise ValueError("the positives come from --qrels; leave out --positive-field")
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
        raise ValueError("--id-field and --text-field have no effect without --corpus; add it")
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
                f"{text!r:.80}; add scores for the positives of all queries"
            )
    return scored


def _loaded(model: str | os.PathLike[str] | EmbeddingModel, trust: Trust) -> EmbeddingModel:
    return model if isinstance(model, EmbeddingModel) else load(model, trust=trust)


def _check_models(models: list[EmbeddingModel], rule: MiningRule, *, scored: bool) -> None:
    model, guide = models[0], models[-1]
    has_limit = rule.min_score is not None or rule.max_score is not None
    has_rule = has_limit or rule.margin is not None or rule.relative_margin is not None
    if not has_rule and (scored or len(models) > 1):
        name = "scores have" if scored else "a guide has"
        raise ValueError(
            f"{name} no effect without a margin or limit; add --margin, --relative-margin, "
            "--min-score or --max-score"
        )
    if len(models) > 1 and model.made_from == guide.made_from:
        raise ValueError(f"the guide {guide.source} is the model itself; give another one")
    for checked in models:  # before texts are embedded
        empty = np.zeros((1, checked.dim), np.float32)
        for_inner_products(checked.similarity_function, "key", empty)
    distances = guide.similarity_function == "euclidean" and not scored
    if distances and (has_limit or rule.relative_margin is not None):
        raise ValueError(
            f"{guide.source} compares by distances, for which only --margin is meaningful; leave "
            "out --relative-margin, --min-score and --max-score"
        )


def _embedded(model: EmbeddingModel, queries: list[str], pool: MiningPool) -> _Embedded:
    """Embed queries and keys into files that are named by digests of the model and the texts."""
    contents = (pool.documents.fingerprint, pool.outside, queries)
    digests = [json_digest([model.made_from, content]) for content in contents]
    names = [f"{prefix}-{digest}" for prefix, digest in zip(_PREFIXES, digests, strict=True)]
    keys = _embedded_texts(model, "key", names[0], len(pool.rows), pool.read)
    if pool.outside:
        read = _reader(pool.outside)
        more = _embedded_texts(model, "key", names[1], len(pool.outside), read)
        keys = np.concatenate([keys, more])
    vectors = _embedded_texts(model, "query", names[2], len(queries), _reader(queries))
    return _Embedded(json_digest(digests), vectors, keys)


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
                f"{model.source} gives {texts[int(np.argmin(finite))]!r:.80} an embedding that is "
                "not finite; use another model"
            )
        return vectors

    path = cache_folder() / "mining" / f"{name}.npy"
    title = f"embedding {name.partition('-')[0]}"
    block = _BLOCK_TEXTS.get(jax.default_backend(), _ACCELERATOR_TEXTS)
    return embed_in_blocks(path, num_texts, dim, embed, title=title, block_rows=block)


def _mined(
    embedded: list[_Embedded],
    pool: MiningPool,
    rule: MiningRule,
    seed: int,
    folder: Path,
    pair_scores: PairScores | None,
) -> HardNegatives:
    model = embedded[0]
    guide = embedded[1] if len(embedded) > 1 else None
    mine = make_miner(
        model.keys,
        rule=rule,
        candidates=pool.candidates,
        guide=None if guide is None else guide.keys,
        pair_scores=pair_scores,
        seed=seed,
        block_rows=min(BLOCK_ROWS, len(model.queries)),
    )

    def block_of(numbers: np.ndarray) -> QueryBlock:
        return QueryBlock(
            numbers,
            model.queries[numbers],
            [pool.positives[number] for number in numbers],
            [pool.excluded[number] for number in numbers],
            guide=None if guide is None else guide.queries[numbers],
        )

    return mine_in_blocks(mine, block_of, len(model.queries), rule.per_query, folder)
