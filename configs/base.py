"""Every setting with its default, for other configs to start from.

    from jaxcl.configs import base

    def get_config():
        config = base.get_config()
        config.data.name = "my_pairs:1.0.0"
        return config

`jaxcl/settings/sections.py` and `data_sections.py` declare the type and the range of each.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxcl.losses import LOSSES
from jaxcl.models import ENCODERS
from jaxcl.models.augmentations import AUGMENTATIONS
from jaxcl.negatives.tiers import TierBudgets
from jaxcl.settings.optimizers import OPTIMIZERS
from jaxcl.settings.parts import option_fields


def get_config() -> ConfigDict:
    """The defaults; `None` turns a setting off, unless its comment says otherwise."""
    config = ConfigDict()
    config.seed = 0  # the random seed of the whole run
    # Number of batches to train on; the learning-rate schedule spans all of them. Must be
    # None if epochs is set.
    config.steps = 300
    # Number of passes over the training rows, instead of steps; requires steps=None. The total is
    # rounded up to whole batches, and to whole updates with optimizer.accumulate_steps.
    config.epochs = placeholder(float)
    config.global_batch_size = 1_024  # pairs per step, over all devices and hosts
    # The run whose encoders and tokenizer a new run starts with: WORKDIR, WORKDIR/checkpoints/STEP
    # or WORKDIR/checkpoints/best. Its trained weights are used, never their average.
    config.init_from = placeholder(str)
    config.data = _data()
    config.model = _model()
    config.augmentation = _augmentation()
    config.loss = _loss()
    config.negatives = _negatives()
    config.assignment = _assignment()
    # Gradient caching: the number of rows (chunk_size) or tokens (chunk_tokens) that a device
    # encodes at a time. None encodes all rows at once, without gradient caching.
    config.grad_cache = ConfigDict(
        {"chunk_size": placeholder(int), "chunk_tokens": placeholder(int)}
    )
    # The maximum number of distinct lengths to which the texts of a batch are padded. Texts of
    # similar length are encoded together in chunks, even without chunk_size or chunk_tokens. 1 pads
    # all texts to data.max_tokens. None means 1, unless the encoder has attention and more lengths
    # save at least a fifth of the work; then it means 3 on CPUs and 12 on accelerators (where it is
    # not benchmarked yet).
    config.grad_cache.length_buckets = placeholder(int)
    config.optimizer = _optimizer()
    config.evaluation = _evaluation()
    config.run = _run()
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    # A file of pairs (.jsonl, .csv, .tsv, .parquet or .tar), a glob pattern for several files, a
    # folder saved by Hugging Face datasets, a folder of images with a subfolder per class, a TFDS
    # name, the folder of a prepared TFDS data set, or a data set that jaxcl builds: "code_pairs",
    # "glyphs" or "emoji".
    data.name = placeholder(str)
    # The rows used for "train" and "validation". For files of pairs: a percentage, selected by
    # hash; "rest" for all rows in no other split; or the path of another file.
    data.splits = ConfigDict({"train": "train[:95%]", "validation": "train[95%:]"})
    # The column of the queries. In a file of pairs, the default also matches other common names.
    data.query_field = "query"
    data.key_field = "key"  # the column of the positives; the default matches common names too
    # Additional data sets, whose rows are appended. Their settings have the same names and meanings
    # as in config.data, except that name cannot be "code_pairs", "glyphs" or "emoji" (give the
    # folder of the prepared data set instead), and that prompts=None uses data.prompts. To sample
    # the data sets by weights or a temperature, set assignment.sourced.by="data_set".
    data.concatenated = ConfigDict()
    data.group_field = placeholder(str)  # column of group labels: integers, class labels or strings
    # The column of each pair's score, such as a similarity rating, for losses that use one.
    data.score_field = placeholder(str)
    data.metadata_fields = ()  # additional columns to show in search and evaluation
    data.files = _files()
    data.negatives = placeholder(str)  # an .npz with the explicit negatives of each training row
    # The maximum number of negative texts per row, taken from the start of its list; 0 uses none,
    # and None uses all.
    data.negatives_per_row = placeholder(int)
    # An .npz with a guide model's or a teacher's embeddings of each training row.
    data.guides = placeholder(str)
    data.topics = placeholder(str)  # an .npz with the topic of each training row
    # A tokenizer.json. None uses the pretrained model's, or trains one on the training split.
    data.tokenizer = placeholder(str)
    # The modality of each side, "text" or "image".
    data.modality = ConfigDict({"query": "text", "key": "text"})
    data.vocabulary_size = 16_384  # vocabulary size of the tokenizer, if the run trains one
    data.max_tokens = ConfigDict({"query": 32, "key": 128})  # longer texts are truncated
    data.add_cls = False  # whether the run's own tokenizer puts a [CLS] token first
    data.distinct_tokens = False  # True drops repeated tokens of a text, for static encoders
    # Whether to add the tokenizer's special tokens, such as [CLS] and [SEP]. None uses the
    # pretrained model's setting; without a pretrained model, the only one is the [CLS] of
    # data.add_cls, and padding has id 0.
    data.special_tokens = placeholder(bool)
    # The prompt before each text of a side; None uses the pretrained model's; "" means no prompt.
    data.prompts = ConfigDict({"query": placeholder(str), "key": placeholder(str)})
    # Whether pooling leaves out the prompt's tokens; None uses the pretrained model's setting.
    data.exclude_prompt = placeholder(bool)
    # Whether to drop unknown tokens, as model2vec does; None uses the pretrained model's setting.
    data.skip_unknown = placeholder(bool)
    data.images = _images()
    return data


def _images() -> ConfigDict:
    """The sides whose modality is "image"."""
    images = ConfigDict()
    images.size = 224  # the height and width to which images are decoded, in pixels
    # How an image becomes a square: "crop" resizes its short side to size and takes the centre;
    # "stretch" resizes both sides to size.
    images.resize = "crop"
    images.background = (255, 255, 255)  # the colour behind transparent images: red, green, blue
    # How to handle an image that cannot be read: "error", or "skip" to leave its row out.
    images.bad = "error"
    return images


def _files() -> ConfigDict:
    """Files of pairs."""
    files = ConfigDict()
    # The column of negatives: texts or lists of texts. A glob pattern matches several columns.
    # None finds them by common names, such as "negatives".
    files.negatives_field = placeholder(str)
    # The column of a teacher's scores: the score of the key, then of each negative. None finds
    # it by common names, such as "teacher_scores".
    files.scores_field = placeholder(str)
    # The column of the pairs' labels, for min_label. None finds it by common names, such as "label"
    # or "score".
    files.label_field = placeholder(str)
    files.min_label = placeholder(float)  # rows with a smaller label are not used for training
    # The column whose hash determines a row's split: "query", "key" or the name of a column.
    files.split_by = "query"
    files.bad_rows = "error"  # how to handle a row that cannot be read: "error" or "skip"
    return files


def _model() -> ConfigDict:
    model = ConfigDict()
    # An encoder listed in jaxcl/models/README.md. None uses the pretrained model's encoder, or
    # "static" without a pretrained model.
    model.name = placeholder(str)
    model.shared = True  # whether queries and keys share one encoder
    model.dim = 512  # the dimension of the embeddings
    # The options of all encoders; None means the encoder's own default, which its docstring gives.
    model.options = option_fields(ENCODERS)
    # The folder of a pretrained encoder, or its id on the Hugging Face Hub; None starts with random
    # weights. The folder also determines the dimension, the vocabulary, the size of images, and any
    # text options left at their defaults. For a custom encoder that declares `load`, this is a file
    # with its weights.
    model.pretrained = placeholder(str)
    # A separate encoder for the keys; requires shared=False. A pretrained folder with two towers,
    # such as CLIP, needs no separate one if the sides have different modalities.
    model.key = ConfigDict({"name": placeholder(str), "options": option_fields(ENCODERS)})
    model.key.pretrained = placeholder(str)
    # Low-rank adapters; if rank is set, the encoders' own parameters are frozen.
    model.lora = _lora()
    return model


def _lora() -> ConfigDict:
    """Low-rank adapters."""
    lora = ConfigDict()
    # The rank of the adapters, in all encoders; None trains the encoders without adapters.
    lora.rank = placeholder(int)
    lora.alpha = 32.0  # adapters are scaled by alpha / rank
    # Patterns for the paths of the linear layers that get adapters, such as
    # "*/attention/query". The default is the attention and the MLP of all blocks.
    lora.targets = ("*blocks/*",)
    # Patterns for the paths of other encoder parameters to train, such as "towers/both/dense/*".
    lora.also_train = ()
    # The dtype of the frozen kernels and token embeddings: "float32" (also None), "bfloat16" or
    # "float16".
    lora.base_dtype = placeholder(str)
    return lora


def _augmentation() -> ConfigDict:
    augmentation = ConfigDict()
    # An augmentation listed in jaxcl/models/README.md; None disables augmentation.
    augmentation.name = placeholder(str)
    augmentation.sides = ("query", "key")  # the sides to augment
    augmentation.options = option_fields(AUGMENTATIONS)
    return augmentation


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.name = "infonce"  # a loss listed in jaxcl/losses/README.md
    loss.options = option_fields(LOSSES)  # of all losses; None means the loss's own default
    loss.exchange = "gather"  # how devices exchange keys: "gather" (all-gather) or "ring"
    # How to compute the loss from all pairs: "reference" stores all scores, "tiled" a tile at a
    # time; "pallas_tpu" and "pallas_gpu" are kernels. None uses "reference" up to 2**20
    # scores, and "tiled" above.
    loss.implementation = placeholder(str)
    loss.bias = placeholder(float)  # initial value of the learned bias of "sigmoid"
    loss.matryoshka_dims = ()  # also compute the loss on embedding prefixes of these lengths
    # Rows with equal entries in any of these columns are not negatives of each other: "row" (copies
    # of a training row, such as in the bank), "text" (equal queries or keys), "group".
    loss.masks = ("row",)
    # Negatives are masked if their similarity exceeds the positive's similarity minus this margin.
    loss.margin = placeholder(float)
    # The same, with the margin as a fraction of the positive's similarity.
    loss.relative_margin = placeholder(float)
    # The learned temperature starts at initial and is clamped to [minimum, maximum]. With these
    # defaults, a pretrained CLIP or SigLIP starts from the temperature saved in its folder.
    loss.temperature = ConfigDict({"initial": 0.05, "minimum": 0.01, "maximum": 1.0})
    return loss


def _negatives() -> ConfigDict:
    negatives = ConfigDict()
    # A memory bank: "queue" holds the most recent keys; "instance" has a slot per training row,
    # updated to momentum * old + (1 - momentum) * new embedding.
    negatives.bank = ConfigDict(
        {"kind": placeholder(str), "slots": 16_384, "momentum": 0.5, "dtype": "float32"}
    )
    # The tiers of negatives, their sizes and options; jaxcl/negatives/README.md describes them.
    negatives.tiers = ConfigDict(TierBudgets()._asdict())
    # Hard negatives, mined from the instance bank every refresh_every steps and encoded with the
    # batch. sampling="random" draws them from the keys in rank_range; "top" takes the nearest of
    # these.
    negatives.mined = ConfigDict(
        {"refresh_every": placeholder(int), "per_query": 4, "rank_range": (10, 100)}
        | {"margin": placeholder(float), "relative_margin": placeholder(float)}
        | {"sampling": "random"}
    )
    # Quotas of the groups in the tier "stratified": "rows" makes them proportional to the groups'
    # sizes, "equal" makes them equal, and "weights" reads negatives.weights.
    negatives.proportions = "rows"
    # ((group, weight), …). String labels are numbered in alphabetical order, from 0.
    negatives.weights = ()
    # The decay of the momentum encoder rises along a cosine from initial, at the first step, to
    # final, at the last; initial=None disables the encoder.
    negatives.momentum_encoder = ConfigDict({"initial": placeholder(float), "final": 1.0})
    # The guide model, which computes the similarities for loss.margin and loss.relative_margin:
    # "momentum" is the momentum encoder, "data" reads embeddings from data.guides, and None uses
    # the model itself.
    negatives.guide = placeholder(str)
    return negatives


def _assignment() -> ConfigDict:
    assignment = ConfigDict()
    # How rows are grouped into batches: "uniform", at random; "one_per_query", at random, with one
    # row of each distinct query per epoch, such as one caption of each image; "sourced", by source;
    # "gcbs", blocks of mutual hard negatives, reassigned during training.
    assignment.name = "uniform"
    # by: the source of a row, its "group", "data_set" or "topic". None uses "group", or "data_set"
    # if there are several data sets without groups. mix: "mixed" puts all sources in each batch,
    # "single" puts one source in each batch. weights: ((source, weight), …); the default weight is
    # size ** (1 / temperature).
    assignment.sourced = ConfigDict(
        {"by": placeholder(str), "mix": "mixed", "temperature": 1.0, "weights": ()}
    )
    gcbs = ConfigDict()
    gcbs.refresh_every = 50  # steps between refreshes
    gcbs.refresh_epochs = placeholder(float)  # epochs between refreshes, instead of steps
    gcbs.method = "bisection"  # "bisection", "rcm" (the paper's method) or "rcm_device"
    gcbs.block_size = placeholder(
        int
    )  # rows per block of hard negatives; None means the batch size
    # Search effort: "full" comes closer to the global loss than "light", but takes three times as
    # long and does not give better embeddings. Each of the next seven settings, if not None,
    # overrides the preset.
    gcbs.preset = "light"
    gcbs.neighbours = placeholder(int)  # hard negatives to which the graph connects each row
    gcbs.starts = placeholder(int)  # random starting directions tried per bisection
    gcbs.walks = placeholder(int)  # steps of the random walk in each bisection
    gcbs.swaps = placeholder(int)  # rounds of swaps after each bisection
    gcbs.refinements = placeholder(int)  # rounds of swaps between any two blocks at the end
    # Where neighbours are searched: "exact" among all rows, "clustered" in the nearest clusters.
    gcbs.graph = placeholder(str)
    gcbs.similarity_cap = placeholder(float)  # rows more similar than this are not connected
    gcbs.embeddings = "encode"  # "encode" encodes all rows; "bank" reads the instance bank
    # At the first step, this fraction of the blocks is chosen, and their rows are shuffled among
    # them.
    gcbs.random_initial = 0.0
    gcbs.random_final = 0.0  # the same, at the last step
    # Rows with equal entries in any of these columns never share a batch: "text", "group".
    gcbs.keep_apart = ("text",)
    gcbs.picture = False  # draw the similarity matrix at each refresh; needs matplotlib
    assignment.gcbs = gcbs
    return assignment


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    # "adafactor", "adagrad", "adam", "adamw", "adan", "lion", "muon", "radam", "rmsprop" or "sgd".
    # All of them use decoupled weight decay, so "adamw" is the same as "adam". "muon" trains the
    # matrices of layers with Muon, and embedding tables and vectors with Adam.
    optimizer.name = "adam"
    # After a linear warmup, "warmup_cosine" and "warmup_linear" decay until the last step,
    # "warmup_constant" stays at the peak, and "warmup_stable_decay" decays only in the last
    # decay_steps. "cosine", "linear" and "constant" have no warmup. A run with a constant rate can
    # be extended.
    optimizer.schedule = "warmup_cosine"
    optimizer.learning_rate = 2e-3  # the peak learning rate
    # Steps of linear warmup to the peak learning rate; None means a tenth of all steps. A warmup
    # that does not fit into the steps of a short run is shortened, with a warning.
    optimizer.warmup_steps = 30
    # The number of final steps in which "warmup_stable_decay" decays; None means a
    # tenth of all steps.
    optimizer.decay_steps = placeholder(int)
    # The final learning rate of a decaying schedule, as a fraction of the peak.
    optimizer.final_rate = 0.0
    # Weight decay of matrices; biases, norm parameters and the temperature are not decayed.
    optimizer.weight_decay = 0.0
    # Patterns, as for freeze, of additional parameters to exempt from weight decay, such as
    # "*table".
    optimizer.no_decay = ()
    optimizer.clip_norm = 1.0  # the maximum norm of the whole gradient; 0 disables clipping
    # ((pattern, maximum norm), …), with patterns as for freeze. The gradients of the parameters
    # that match a pattern are clipped by their own norm, separately from all others. The first
    # matching pattern applies.
    optimizer.clip_groups = ()
    # Patterns for the paths of parameters that are not trained, such as "towers/both/token_table"
    # or "*/blocks/0/*". A pattern must match the whole path; "*" matches any characters, including
    # "/". A frozen parameter has no gradient and no optimizer state.
    optimizer.freeze = ()
    # ((pattern, factor), …), with patterns as for freeze. The factor multiplies the learning rate,
    # and thus the weight decay too. The first matching pattern applies.
    optimizer.rates = ()
    # Layer-wise learning-rate decay: the last block of an encoder trains at the full rate. Each
    # lower block trains at this factor times the rate of the block above it, and the embeddings at
    # this factor times the rate of the first block. None trains all layers at the same rate.
    optimizer.layer_decay = placeholder(float)
    # The number of batches per update, whose gradients are averaged; must divide steps. This adds
    # no negatives, since a query is compared only with the keys of its own batch. For more
    # negatives in the same memory, use a larger global_batch_size with grad_cache.
    optimizer.accumulate_steps = 1
    # The decay of an exponential moving average of the weights, such as 0.999; None disables it.
    # The average is corrected for bias: the initial weights have no influence.
    # evaluation.weights="average" evaluates and exports it.
    optimizer.average_decay = placeholder(float)
    optimizer.options = option_fields(OPTIMIZERS)  # of all optimizers; None means their own default
    return optimizer


def _evaluation() -> ConfigDict:
    evaluation = ConfigDict()
    # How to rank keys for held-out rows. For texts: "bm25", "dense" (by embeddings) and "hybrid"
    # (both). If a side has images: "dense" and "pixels", a baseline without a model. None means all
    # three for texts, and ("dense",) otherwise.
    evaluation.methods = placeholder(tuple)
    # The directions in which to rank held-out rows: "query_to_key", "key_to_query". None means both
    # if the sides have different modalities, such as images and texts; otherwise ("query_to_key",).
    evaluation.directions = placeholder(tuple)
    # Whether a query's ranking excludes the keys of other rows in its group. The keys of other rows
    # with an equal query are always excluded. Requires data.group_field.
    evaluation.exclude_groups = False
    evaluation.rrf_k = 10  # the constant of reciprocal rank fusion, for "hybrid"
    evaluation.batch_size = 1_024  # number of rows to encode at a time
    # The weights for evaluation and all other commands, such as search and export: "trained", or
    # "average", the moving average of optimizer.average_decay.
    evaluation.weights = "trained"
    # Whether evaluation and all other commands use the embeddings that the loss is computed
    # on. False uses the features below the projection head of an image encoder
    # (model.options.head).
    evaluation.projection_head = True
    # Evaluation sets, as --config.evaluation.sets.NAME=PATH, evaluated every run.evaluate_every
    # steps. PATH is a file or folder, or split:SPLIT (such as split:test) for the labelled rows of
    # one of the run's own splits. The metrics of a set are called NAME/METRIC.
    evaluation.sets = ConfigDict()
    # A metric such as "validation/dense/mrr@10" or "NAME/spearman". The checkpoint with the highest
    # value is kept in addition to the newest ones, as WORKDIR/checkpoints/best.
    evaluation.best_metric = placeholder(str)
    # Early stopping, after this many evaluations in which best_metric has not increased by more
    # than min_delta; None trains for all steps.
    evaluation.patience = placeholder(int)
    evaluation.min_delta = 0.0  # best_metric must increase by more than this to reset patience
    return evaluation


def _run() -> ConfigDict:
    """Settings that may change when a run resumes."""
    run = ConfigDict()
    # The folder of prepared data and token ids, shared by all runs. None means
    # XDG_CACHE_HOME/jaxcl, or ~/.cache/jaxcl if XDG_CACHE_HOME is not set.
    run.data_dir = placeholder(str)
    # Mesh axes: parameters are sharded over the axis fsdp; data=-1 uses all remaining devices. The
    # batch is sharded over both axes.
    run.mesh = ConfigDict({"data": -1, "fsdp": 1})
    # ((regex, dimension or None), …): for parameters whose path matches, the dimension that fsdp
    # shards; None replicates them. By default, it is the longest dimension that fsdp divides, and
    # small parameters are replicated.
    run.parameter_rules = ()
    run.log_every = 10  # steps between entries in metrics.jsonl
    run.evaluate_every = 100  # steps between evaluations
    run.checkpoint_every = 100  # steps between checkpoints
    run.keep_checkpoints = 2  # the number of newest checkpoints to keep
    # Whether to write sheets of images to WORKDIR/sheets: augmented views at the start, nearest
    # neighbours and hardest negatives of the validation split at each evaluation. None writes them
    # if a side has images.
    run.sheets = placeholder(bool)
    return run
