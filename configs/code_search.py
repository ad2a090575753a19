"""A search engine over the Python functions installed on this machine.

    python -m jaxcl.train --config configs/code_search.py

On 2 CPU cores: 300 steps in 52 s, 81 s in all with the data and the evaluation, for the 19,173
functions of jaxcl's own environment. MRR@10 of the embedder on unseen files .643 ± .010 (BM25
.495), of the hybrid on the standard library, which it never saw, .456 ± .007 (BM25 .366).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.negatives.tiers import TierBudgets


def get_config(variant: str = "default") -> ConfigDict:
    """The configuration.

    `configs/code_search.py:plain` has the batch's own negatives alone, as all losses take them;
    `…:smoke` is that, shrunk to seconds.
    """
    config = ConfigDict()
    config.seed = 0
    config.steps = 300
    config.global_batch_size = 1_024

    config.data = ConfigDict()
    config.data.name = "code_pairs"  # or a TFDS name, or the folder of a prepared data set
    config.data.code_pairs = ConfigDict()
    config.data.code_pairs.test_packages = ("stdlib",)
    config.data.code_pairs.validation_fraction = 0.1
    config.data.code_pairs.split_seed = 0
    config.data.code_pairs.max_pairs = placeholder(int)
    config.data.splits = ConfigDict({"train": "train", "validation": "validation", "test": "test"})
    config.data.query_field = "query"
    config.data.key_field = "key"
    # Data sets whose rows follow these, in a config file of one's own: name -> the name or folder
    # of a prepared one, splits (role -> split), query_field, key_field, group_field.
    config.data.concatenated = ConfigDict()
    config.data.group_field = "group"
    config.data.metadata_fields = ("name", "package", "qualified_name", "file", "line")
    config.data.negatives = placeholder(str)  # an .npz with each training row's explicit negatives
    config.data.guides = placeholder(str)  # an .npz with each training row's embeddings by a judge
    config.data.topics = placeholder(str)  # an .npz with each training row's topic
    config.data.tokenizer = placeholder(str)  # a tokenizer.json; None trains one
    config.data.vocabulary_size = 16_384
    config.data.max_tokens = ConfigDict({"query": 32, "key": 128})
    config.data.add_cls = False
    config.data.distinct_tokens = True  # the static encoder reads a set of tokens

    config.model = ConfigDict()
    config.model.name = "static"
    config.model.shared = True
    config.model.dim = 512
    config.model.options = ConfigDict({"max_tokens": 128, "token_dropout": 0.4})

    config.loss = ConfigDict()
    config.loss.name = "infonce"
    config.loss.options = ConfigDict()  # its keyword arguments, in a config file of one's own
    config.loss.exchange = "gather"  # or "ring"
    config.loss.implementation = placeholder(str)  # None takes the best that runs here
    config.loss.bias = placeholder(
        float
    )  # where a learned bias of the scores begins, for "sigmoid"
    config.loss.matryoshka_dims = ()  # lengths at which the embeddings are to be good as well
    # The columns of a batch whose equals are no negatives: "row", "text" (equal queries or keys),
    # "group"; and by how much, or which share, a negative must be less similar than the positive.
    config.loss.masks = ("row",)
    config.loss.margin = placeholder(float)
    config.loss.relative_margin = placeholder(float)
    config.loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.01, "maximum": 1.0})

    # Earlier embeddings: a "queue" of the last keys, with so many slots, or an "instance" of each
    # training row, which an update moves towards the new one by 1 - momentum.
    config.negatives = ConfigDict()
    config.negatives.bank = ConfigDict(
        {"kind": placeholder(str), "slots": 16_384, "momentum": 0.5, "dtype": "float32"}
    )
    # How many negatives a query meets beside the batch's: jaxcl.negatives.tiers explains them.
    # Made ones help here, of the batch more than of a bank (README: Negatives beyond the batch).
    made = TierBudgets(mixed=16, mixed_with_query=8, perturbed=8, hardest=32, of_batch=True)
    config.negatives.tiers = ConfigDict(made._asdict())
    # Mined from the instance bank every so many steps, then read and encoded with the batch.
    config.negatives.mined = ConfigDict(
        {"refresh_every": placeholder(int), "per_query": 4, "rank_range": (10, 100)}
        | {"margin": placeholder(float), "relative_margin": placeholder(float)}
        | {"sampling": "random"}
    )
    # Of a stratified draw, by group: "rows", "equal", or "weights", ((group, weight), …), where a
    # group field of texts numbers them in their order, and groups of concatenated data sets follow.
    config.negatives.proportions = "rows"
    config.negatives.weights = ()
    config.negatives.momentum_encoder = ConfigDict({"initial": placeholder(float), "final": 1.0})
    config.negatives.guide = placeholder(
        str
    )  # who judges margins: "momentum", "data", or the model

    # Which rows share a batch: "uniform"; "sourced", by where they come from; or "gcbs", blocks of
    # each other's hard negatives, chosen anew now and then, whole batches or shuffled into them.
    config.assignment = ConfigDict()
    config.assignment.name = "uniform"
    # By "group" (None), "data_set" (of those concatenated) or "topic"; all of them in each batch,
    # "mixed", or "one"; shares by the temperature of sizes, or weights, ((source, weight), …).
    config.assignment.sourced = ConfigDict(
        {"by": placeholder(str), "mix": "mixed", "temperature": 1.0, "weights": ()}
    )
    config.assignment.gcbs = ConfigDict(
        {"refresh_every": 50, "refresh_epochs": placeholder(float)}  # steps, or epochs if given
        | {"method": "bisection"}
        | {"block_size": placeholder(int)}  # None for whole batches
        # How long is searched: "light" trains as well as "full", which closes more of the gap in
        # three times the time. What is not None goes before.
        | {"preset": "light", "neighbours": placeholder(int)}
        | {"swaps": placeholder(int), "refinements": placeholder(int)}
        # None takes the exact graph for up to 10,000 rows, else the "clustered" one.
        | {"graph": placeholder(str), "similarity_cap": placeholder(float)}
        | {"embeddings": "encode"}  # or "bank", which needs an instance bank and no pass
        | {"random_initial": 0.0, "random_final": 0.0}  # the share of blocks that are random
        | {"apart": ("text",)}  # whose equals keep out of each other's batch: "text", "group"
        | {"picture": True}
    )

    # Rows, or tokens, of a device that are encoded at a time; None for all at once.
    config.grad_cache = ConfigDict(
        {"chunk_size": placeholder(int), "chunk_tokens": placeholder(int)}
    )

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.options = ConfigDict()

    config.evaluation = ConfigDict()
    config.evaluation.methods = ("bm25", "dense", "hybrid")
    config.evaluation.rrf_k = 10
    config.evaluation.batch_size = 1_024

    # What is below may change between a stop and a restart; what is above makes another run.
    config.run = ConfigDict()
    config.run.data_dir = "~/.cache/jaxcl"
    # Devices that share rows, and devices that share parameters as well; and along which dimension
    # these cut a parameter, ((expression of its path, number or None), …), if not by length.
    config.run.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.run.parameter_rules = ()
    config.run.log_every = 10
    config.run.evaluate_every = 100
    config.run.checkpoint_every = 100
    config.run.keep_checkpoints = 2

    if variant == "smoke":
        config.steps = 20
        config.global_batch_size = 64
        config.data.code_pairs.max_pairs = 600
        config.optimizer.warmup_steps = 2
        config.assignment.gcbs.refresh_every = 10
    elif variant not in ("default", "plain"):
        raise ValueError(f"variant {variant!r} is unknown; use default, plain or smoke")
    if variant != "default":
        config.negatives.tiers = ConfigDict(TierBudgets()._asdict())
    return config
