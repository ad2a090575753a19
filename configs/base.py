"""Every setting with its default, for other configs to start from.

    from jaxcl.configs import base

    def get_config():
        config = base.get_config()
        config.data.name = "my_pairs:1.0.0"
        return config

`jaxcl/settings/sections.py` declares the type and the range of each.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.losses import LOSSES
from jaxcl.models import ENCODERS
from jaxcl.models.augmentations import AUGMENTATIONS
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.settings.parts import OPTIMIZERS, option_fields


def get_config() -> ConfigDict:
    """The defaults; `None` means that a setting is off, or what its comment says."""
    config = ConfigDict()
    config.seed = 0  # of all random draws
    config.steps = 300  # updates; the schedule of the learning rate ends there
    config.global_batch_size = 1_024  # pairs over all devices and hosts
    # A workdir, or WORKDIR/checkpoints/STEP or WORKDIR/checkpoints/best, whose encoders and
    # tokenizer a new run starts with.
    config.init_from = placeholder(str)
    config.data = _data()
    config.model = _model()
    config.augmentation = _augmentation()
    config.loss = _loss()
    config.negatives = _negatives()
    config.assignment = _assignment()
    # Rows, or tokens, that a device encodes at a time; None encodes all at once.
    config.grad_cache = ConfigDict(
        {"chunk_size": placeholder(int), "chunk_tokens": placeholder(int)}
    )
    config.optimizer = _optimizer()
    config.evaluation = _evaluation()
    config.run = _run()
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    # A file of pairs (.jsonl, .csv, .tsv or .parquet), a pattern for several, a folder of Hugging
    # Face's datasets, a TFDS name, the folder of a prepared data set, or "code_pairs".
    data.name = placeholder(str)
    # By role. Of files, a share goes by a hash, "rest" is the rows that no other role takes, and a
    # path names another file.
    data.splits = ConfigDict({"train": "train[:95%]", "validation": "train[95%:]"})
    # Columns of the two sides. In a file of pairs, the defaults also stand for other common names.
    data.query_field = "query"
    data.key_field = "key"  # the positive
    # Data sets whose rows follow these: name -> name (or folder), splits (role -> split),
    # query_field, key_field, group_field, metadata_fields, files, prompts (those of the run where
    # they are None). assignment.sourced.by="data_set" mixes them by weights or a temperature.
    data.concatenated = ConfigDict()
    data.group_field = placeholder(str)  # a column of integers, labels or texts
    data.metadata_fields = ()  # further columns, for search and evaluation
    data.files = _files()
    data.negatives = placeholder(str)  # an .npz with the explicit negatives of each training row
    # How many of the negative texts that a row brings are trained on: the first ones, 0 for none,
    # None for as many as the longest list has.
    data.negatives_per_row = placeholder(int)
    data.guides = placeholder(str)  # an .npz with a guide model's embeddings of each training row
    data.topics = placeholder(str)  # an .npz with the topic of each training row
    # A tokenizer.json. None uses the pretrained model's, or trains one on the training split.
    data.tokenizer = placeholder(str)
    data.modality = ConfigDict({"query": "text", "key": "text"})  # of each side
    data.vocabulary_size = 16_384  # of the tokenizer that the run trains
    data.max_tokens = ConfigDict({"query": 32, "key": 128})  # longer texts are cut
    data.add_cls = False  # whether the run's own tokenizer puts a [CLS] token first
    data.distinct_tokens = False  # True keeps each token of a text once, for static encoders
    # Whether texts get the tokenizer's special tokens, such as [CLS] and [SEP]. None uses the
    # pretrained model's setting; without one, it means a tokenizer whose id 0 is padding.
    data.special_tokens = placeholder(bool)
    # The prompt before each text of a side; None uses the pretrained model's, "" means no prompt.
    data.prompts = ConfigDict({"query": placeholder(str), "key": placeholder(str)})
    data.exclude_prompt = placeholder(bool)  # whether pooling leaves out the prompt's tokens
    data.skip_unknown = placeholder(bool)  # whether to leave out unknown tokens, as model2vec does
    return data


def _files() -> ConfigDict:
    """Files of pairs. The columns that are None are found by common names."""
    files = ConfigDict()
    files.negatives_field = placeholder(str)  # of texts or lists; a pattern names several columns
    files.scores_field = placeholder(str)  # a teacher's scores of the key, then of each negative
    files.label_field = placeholder(str)  # how similar query and key are, such as "score"
    files.min_label = placeholder(float)  # the least label of the rows that are trained on
    files.split_by = "query"  # whose hash decides on a row's split: "query", "key" or a column
    files.bad_rows = "error"  # or "skip", which leaves out rows that cannot be read
    return files


def _model() -> ConfigDict:
    model = ConfigDict()
    # An encoder of jaxcl/models/README.md; None is the pretrained model's encoder, or "static"
    # without a pretrained model.
    model.name = placeholder(str)
    model.shared = True  # whether one encoder serves both sides
    model.dim = 512  # the width of the embeddings
    # The options of all encoders; None is the encoder's own default, which its docstring gives.
    model.options = option_fields(ENCODERS)
    # The folder of a pretrained encoder, or its id on the Hugging Face Hub. If name is a custom
    # encoder that declares `load`, a file with its weights. None starts with random weights. The
    # folder also sets the width, the vocabulary and the text options left at their defaults.
    model.pretrained = placeholder(str)
    # A separate encoder for keys; it needs shared=False.
    model.key = ConfigDict({"name": placeholder(str), "options": option_fields(ENCODERS)})
    model.key.pretrained = placeholder(str)
    return model


def _augmentation() -> ConfigDict:
    augmentation = ConfigDict()
    augmentation.name = placeholder(str)  # "token_dropout" or "span_masking"; None changes nothing
    augmentation.sides = ("query", "key")  # the sides that it changes
    augmentation.options = option_fields(AUGMENTATIONS)
    return augmentation


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.name = "infonce"  # a loss of jaxcl/losses/README.md
    loss.options = option_fields(LOSSES)  # of all losses; None is the loss's own default
    loss.exchange = "gather"  # or "ring"
    loss.implementation = placeholder(str)  # None takes the best that runs here
    loss.bias = placeholder(float)  # where a learned bias of the scores starts, for "sigmoid"
    loss.matryoshka_dims = ()  # shorter lengths at which the embeddings are trained as well
    # Columns of a batch whose equal entries are no negatives of each other: "row", "text" (equal
    # queries or keys), "group".
    loss.masks = ("row",)
    loss.margin = placeholder(float)  # by how much less similar than the positive negatives must be
    loss.relative_margin = placeholder(float)  # the same as a share of the positive's similarity
    # The learned temperature starts at initial and stays in its range.
    loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.01, "maximum": 1.0})
    return loss


def _negatives() -> ConfigDict:
    negatives = ConfigDict()
    # A memory bank: a "queue" of the last keys, or an "instance" slot for each training row, which
    # an update moves towards the new embedding by 1 - momentum.
    negatives.bank = ConfigDict(
        {"kind": placeholder(str), "slots": 16_384, "momentum": 0.5, "dtype": "float32"}
    )
    # How many negatives of each tier a query meets: jaxcl.negatives.tiers.TierBudgets.
    negatives.tiers = ConfigDict(TierBudgets()._asdict())
    # Negatives mined from the instance bank every this many steps, encoded with the batch.
    negatives.mined = ConfigDict(
        {"refresh_every": placeholder(int), "per_query": 4, "rank_range": (10, 100)}
        | {"margin": placeholder(float), "relative_margin": placeholder(float)}
        | {"sampling": "random"}  # or "top"
    )
    # The shares of the groups in a stratified draw: "rows", "equal", or "weights".
    negatives.proportions = "rows"
    # ((group, weight), …). A group field of texts is numbered in alphabetical order.
    negatives.weights = ()
    # The share of the momentum encoder that an update keeps, from the first step to the last.
    negatives.momentum_encoder = ConfigDict({"initial": placeholder(float), "final": 1.0})
    # The guide model, whose similarities decide about margins: "momentum", "data", or None, the
    # model itself.
    negatives.guide = placeholder(str)
    return negatives


def _assignment() -> ConfigDict:
    assignment = ConfigDict()
    # Which rows share a batch: "uniform", at random; "sourced", by where rows come from; "gcbs",
    # blocks of each other's hard negatives, reassigned during training.
    assignment.name = "uniform"
    # by: "group", "data_set" (of those concatenated) or "topic"; None is "group", or "data_set" if
    # rows of several data sets have no group. mix: all sources in each
    # batch, "mixed", or "one". Shares by the temperature of sizes, or by ((source, weight), …).
    assignment.sourced = ConfigDict(
        {"by": placeholder(str), "mix": "mixed", "temperature": 1.0, "weights": ()}
    )
    gcbs = ConfigDict()
    gcbs.refresh_every = 50  # steps between refreshes
    gcbs.refresh_epochs = placeholder(float)  # epochs between them instead
    gcbs.method = "bisection"  # or "rcm_device", or "rcm", the paper's
    gcbs.block_size = placeholder(int)  # None for whole batches
    # How long the search is: "light" trains as well as "full", which closes more of the gap in
    # three times the time. Each of the next seven replaces the preset's value unless it is None.
    gcbs.preset = "light"
    gcbs.neighbours = placeholder(int)  # hard negatives of each row in the graph
    gcbs.starts = placeholder(int)  # random initial directions of a split
    gcbs.walks = placeholder(int)  # steps of the random walk in each split
    gcbs.swaps = placeholder(int)  # rounds of swaps after each split
    gcbs.refinements = placeholder(int)  # rounds of swaps between any two blocks at the end
    gcbs.graph = placeholder(str)  # "exact" or "clustered"
    gcbs.similarity_cap = placeholder(float)  # more similar rows are not connected
    gcbs.embeddings = "encode"  # or "bank", which needs an instance bank and no pass over the data
    gcbs.random_initial = 0.0  # the share of random blocks at the first step
    gcbs.random_final = 0.0  # the same at the last step
    gcbs.apart = ("text",)  # columns whose equal entries never share a batch: "text", "group"
    gcbs.picture = False  # of the similarities, at each refresh; needs matplotlib
    assignment.gcbs = gcbs
    return assignment


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "adam"  # or "lion" or "sgd"
    optimizer.schedule = "warmup_cosine"  # or "warmup_constant", which allows a run to be extended
    optimizer.learning_rate = 2e-3  # at its peak
    # Steps in which the learning rate rises to its peak; None is a tenth of all steps.
    optimizer.warmup_steps = 30
    optimizer.weight_decay = 0.0  # of matrices
    optimizer.clip_norm = 1.0  # of the whole gradient; 0 clips nothing
    optimizer.options = option_fields(OPTIMIZERS)  # of all optimizers; None is their own default
    return optimizer


def _evaluation() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.methods = ("bm25", "dense", "hybrid")  # of ranking the keys of held-out rows
    evaluation.rrf_k = 10  # the constant of reciprocal rank fusion, for "hybrid"
    evaluation.batch_size = 1_024  # rows embedded at a time
    # Name -> the file or folder of an evaluation set, evaluated every run.evaluate_every steps as
    # NAME/metric: --config.evaluation.sets.NAME=PATH.
    evaluation.sets = ConfigDict()
    # A metric such as "validation/dense/mrr@10" or "NAME/spearman". The checkpoint with the highest
    # value is kept in addition to the newest ones, as WORKDIR/checkpoints/best.
    evaluation.best_metric = placeholder(str)
    # The run stops after this many evaluations in which best_metric has not increased by more than
    # min_delta; None trains all steps.
    evaluation.patience = placeholder(int)
    evaluation.min_delta = 0.0  # the smallest increase of best_metric that counts for patience
    return evaluation


def _run() -> ConfigDict:
    """What may change between a stop and a restart; everything else makes another run."""
    run = ConfigDict()
    # The folder of prepared data and token ids, which all runs share. None means
    # XDG_CACHE_HOME/jaxcl, or ~/.cache/jaxcl if XDG_CACHE_HOME is not set.
    run.data_dir = placeholder(str)
    # Devices that share the rows, and devices that share the parameters as well.
    run.mesh = ConfigDict({"data": -1, "fsdp": 1})
    # Along which dimension fsdp cuts a parameter, if not its longest: ((path, number or None), …).
    run.parameter_rules = ()
    run.log_every = 10  # steps between two lines of metrics
    run.evaluate_every = 100  # steps between evaluations
    run.checkpoint_every = 100  # steps between checkpoints
    run.keep_checkpoints = 2  # the number of the newest checkpoints that stay
    return run
