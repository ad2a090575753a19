"""What helps when fine-tuning a pretrained encoder: settings that `jaxcl.compare` trains.

    python -m jaxcl.compare --config configs/finetune.py \\
        --settings configs/sweep_finetune.py:negatives.npz --workdir runs/finetune --seeds 3 \\
        --config.model.pretrained=FOLDER --config.data.code_pairs.max_pairs=4200

All settings train on the same number of pairs, each seen once: 48 steps of 64 pairs. The part after
the colon is a file of negatives that `jaxcl.mine` found in another run on the same pairs; without
it, no setting has mined negatives. A run of one step with a tiny learning rate mines with the
pretrained model itself:

    python -m jaxcl.train --config configs/finetune.py --workdir runs/pretrained \
        --config.model.pretrained=FOLDER --config.data.code_pairs.max_pairs=4200 \
        --config.steps=1 --config.optimizer.learning_rate=1e-9
    python -m jaxcl.mine --workdir runs/pretrained --output negatives.npz --per-query 1 \
        --rank-range 10:100 --relative-margin 0.05
"""

STEPS, BATCH = 48, 64
LARGE_BATCH = 1_024

RANDOM = {
    "steps": STEPS,
    "global_batch_size": BATCH,
    "grad_cache.chunk_size": 16,  # on a CPU, small chunks are the fastest
    "data.max_tokens.query": 20,
    "data.max_tokens.key": 40,
    "evaluation.methods": ("dense",),
}


def get_settings(variant: str = "default") -> dict[str, dict]:
    """Random batches of 64 pairs, and one change each; `variant` is a file of mined negatives."""
    settings = {
        "random": RANDOM,
        "chosen batches": RANDOM
        | {"assignment.name": "gcbs", "assignment.gcbs.refresh_every": STEPS // 4},
        "false-negative masks": RANDOM | {"loss.relative_margin": 0.05},
        "LoRA": RANDOM | {"model.lora.rank": 16, "optimizer.learning_rate": 5e-4},
        "batch 1,024": RANDOM
        | {"steps": STEPS * BATCH // LARGE_BATCH, "global_batch_size": LARGE_BATCH}
        | {"optimizer.learning_rate": 2e-4},  # with the square root of the batch size
    }
    if variant != "default":
        settings["mined negatives"] = RANDOM | {"data.negatives": variant}
    return settings
