"""Runs with adapters: resumed, started from other runs, and exported with merged kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcl
from jaxcl import search
from jaxcl.export import export
from jaxcl.models.lora import has_adapters, without_adapters
from jaxcl.models.trainable import parameter_paths, split
from jaxcl.plan import make_plan
from jaxcl.run.exported import open_exported
from jaxcl.run.initial import with_initial_towers
from jaxcl.run.opened import open_run
from jaxcl.run.training import build_training
from jaxcl.settings.read import read_settings
from jaxcl.train import train
from tests.helpers import bits, final_state, relative_error
from tests.models.pretrained.tiny import write_tiny_bert
from tests.prepared_data import prepare_pairs
from tests.saved_run import TEXTS, save_tuned_run
from tests.test_finetune import config_with
from tests.test_train_optimizer import MOMENTUM, STEPS, assert_resumes_bitwise, small

__all__ = ["small"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("nothing_left_behind"),
]

WIDE = {"model.options.hidden_dim": 24}
ADAPTERS = {"model.lora.rank": 2, "model.lora.targets": ("projection",)}
LORA = {"rank": 2, "alpha": 1.0}


def test_a_run_with_adapters_resumes_bitwise_and_keeps_its_base(
    small, tmp_path, monkeypatch, capfd
):
    narrow = {"model.lora.base_dtype": "bfloat16"}
    config = small(**MOMENTUM, **WIDE, **ADAPTERS, **narrow)
    state = assert_resumes_bitwise(monkeypatch, config, tmp_path)
    training = build_training(read_settings(config))
    assert "of them frozen" in capfd.readouterr().err
    (trained, held), (first, was) = (
        split(params, training.frozen) for params in (state.params, training.init().params)
    )
    assert jax.tree.map(bits, held) == jax.tree.map(bits, was)
    adapters = [f"towers/{side}/projection/lora_{one}" for side in ("key", "query") for one in "ab"]
    assert parameter_paths(trained) == ["log_temperature", *adapters]
    for leaf, before in zip(jax.tree.leaves(trained), jax.tree.leaves(first), strict=True):
        assert bits(leaf) != bits(before)
        assert leaf.dtype == jnp.float32
    assert parameter_paths(state.memory["momentum"]) == parameter_paths(trained["towers"])
    query = held["towers"]["query"]
    assert query["projection"]["kernel"].dtype == query["table"].dtype == jnp.bfloat16
    live, again = (jaxcl.load(tmp_path / name).encode(TEXTS) for name in ("whole", "halves"))
    assert bits(live) == bits(again)


def test_a_run_with_adapters_starts_from_a_run_with_or_without_them(small, tmp_path):
    train(small(**WIDE), tmp_path / "plain")
    plain = final_state(tmp_path / "plain", step=STEPS).params["towers"]
    config = small(**WIDE, **ADAPTERS, init_from=str(tmp_path / "plain"))
    settings = read_settings(config)
    training = build_training(settings)
    initial = training.init()
    state = with_initial_towers(settings, initial, frozen=training.frozen)
    towers = state.params["towers"]
    assert jax.tree.map(bits, without_adapters(towers)) == jax.tree.map(bits, plain)
    layers = (tree["query"]["projection"] for tree in (towers, initial.params["towers"]))
    assert len({bits(layer["lora_a"]) for layer in layers}) == 1
    train(config, tmp_path / "adapted")
    adapted = final_state(tmp_path / "adapted", step=STEPS).params["towers"]
    assert jax.tree.map(bits, without_adapters(adapted)) == jax.tree.map(bits, plain)
    settings = read_settings(small(**WIDE, **ADAPTERS, init_from=str(tmp_path / "adapted")))
    state = with_initial_towers(settings, build_training(settings).init())
    assert jax.tree.map(bits, state.params["towers"]) == jax.tree.map(bits, adapted)
    scaled = settings.model._replace(lora=settings.model.lora._replace(alpha=8.0))
    with pytest.raises(ValueError, match=r"model\.lora\.alpha=8, but .* have 32; set it to 32"):
        with_initial_towers(settings._replace(model=scaled), initial)
    settings = read_settings(small(**WIDE, init_from=str(tmp_path / "adapted")))
    with pytest.raises(ValueError, match=r"lora_a is absent here.*can also start from a run"):
        with_initial_towers(settings, build_training(settings).init())


@pytest.mark.parametrize("base_dtype", [None, "bfloat16"])
def test_an_exported_model_has_merged_kernels_and_the_live_embeddings(tmp_path, base_dtype):
    original = write_tiny_bert(tmp_path / "tiny")
    lora = LORA | {"base_dtype": base_dtype}
    workdir = save_tuned_run(tmp_path / "run", original, model__lora=lora)
    live, base = jaxcl.load(workdir).encode(TEXTS), jaxcl.load(original).encode(TEXTS)
    assert relative_error(live, base) > 0.01
    folder = export(workdir, tmp_path / "model")
    assert relative_error(jaxcl.load(folder).encode(TEXTS), live) < 1e-6
    before, after = (load_file(one / "model.safetensors") for one in (original, folder))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {np.dtype("float32")}
    moved = {name for name in before if np.abs(before[name] - after[name]).max() > 0.02}
    kernels = ("query", "key", "value", "dense")
    assert moved == {
        name
        for name in before
        if name.startswith("encoder.")
        and name.endswith(tuple(f"{kernel}.weight" for kernel in kernels))
    }
    kept = {name for name in before if bits(before[name]) == bits(after[name])}
    assert kept | moved | {"embeddings.word_embeddings.weight"} == before.keys()
    assert ("embeddings.word_embeddings.weight" in kept) == (base_dtype is None)


@pytest.mark.slow
def test_a_pretrained_encoder_trains_its_adapters_over_a_mesh_and_is_exported(tmp_path, capsys):
    original = write_tiny_bert(tmp_path / "tiny")
    config = config_with(
        prepare_pairs(tmp_path),
        **{
            "model.pretrained": str(original),
            "model.lora.rank": 2,
            "grad_cache.chunk_size": 1,
            "run.mesh.fsdp": 2,
            "run.parameter_rules": (("kernel|lora_a", 0),),
            "optimizer.learning_rate": 1e-2,
        },
    )
    train(config, tmp_path / "run")
    before = build_training(read_settings(config)).init().params["towers"]
    after = final_state(tmp_path / "run", step=4).params["towers"]
    base, kept = (jax.tree.map(bits, without_adapters(towers)) for towers in (before, after))
    assert kept == base
    live = jaxcl.load(tmp_path / "run").encode(TEXTS)
    assert relative_error(live, jaxcl.load(original).encode(TEXTS)) > 1e-3
    folder = export(tmp_path / "run", tmp_path / "model")
    assert relative_error(jaxcl.load(folder).encode(TEXTS), live) < 1e-5
    search.main(["--workdir", str(tmp_path / "run"), "query 21"])
    assert "key 2" in capsys.readouterr().out


def test_a_jaxcl_folder_holds_a_model_without_adapters(tmp_path):
    workdir = save_tuned_run(tmp_path / "run", write_tiny_bert(tmp_path / "tiny"), model__lora=LORA)
    folder = export(workdir, tmp_path / "model", format="jaxcl")
    exported, run = open_exported(folder), open_run(workdir)
    assert exported.settings.model.lora.rank is None
    assert not has_adapters(exported.encoder.params)
    assert has_adapters(run.encoder.params)
    live = run.encoder.encode("query", TEXTS)
    assert relative_error(exported.encoder.encode("query", TEXTS), live) < 1e-6
    assert "model.lora.rank" in (folder / "README.md").read_text()


def test_a_new_run_begins_as_its_pretrained_model(tmp_path):
    folder = write_tiny_bert(tmp_path)
    data = {"name": "pairs", "max_tokens": {"query": 12, "key": 12}}
    model = {"pretrained": str(folder)}
    towers = {}
    for name, lora in {"plain": {}, "adapted": LORA}.items():
        settings = read_settings({"data": data, "model": model | {"lora": lora}})
        towers[name] = build_training(settings).init().params["towers"]
    assert has_adapters(towers["adapted"])
    assert jax.tree.map(bits, without_adapters(towers["adapted"])) == jax.tree.map(
        bits, towers["plain"]
    )
    wrong = model | {"lora": LORA | {"targets": ("*/attention/qkv",)}}
    with pytest.raises(ValueError, match=r"encoder/blocks/\*/attention/query, "):
        build_training(read_settings({"data": data, "model": wrong}))


def test_a_plan_counts_an_optimizer_of_the_adapters_alone(small):
    trained = 1 + 2 * (24 * 2 + 2 * 16)  # the temperature, and two towers' A and B
    settings = read_settings(small(**WIDE, **ADAPTERS))
    plan = make_plan(settings, jax.devices(), num_rows=20)
    assert plan.optimizer == 2 * 4 * trained + 2 * 4  # two moments, and two step counts
    everything = make_plan(read_settings(small(**WIDE)), jax.devices(), num_rows=20)
    assert everything.optimizer > 2 * plan.optimizer
    narrow = read_settings(small(**WIDE, **ADAPTERS, **{"model.lora.base_dtype": "bfloat16"}))
    saved = plan.parameters - make_plan(narrow, jax.devices(), num_rows=20).parameters
    assert saved == 2 * 2 * (60 * 24 + 24 * 16)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"model\.lora\.rank=0; set it to at least 1"),
        ({"rank": 2, "alpha": 0.0}, r"model\.lora\.alpha=0\.0; set it above 0"),
        ({"rank": 2, "targets": ()}, r"model\.lora\.targets is empty"),
        ({"rank": 2, "base_dtype": "int8"}, r"model\.lora\.base_dtype='int8' is unknown"),
        ({"rang": 2}, r"model\.lora\.rang is unknown \(did you mean 'rank'\?\)"),
    ],
)
def test_wrong_options_are_errors(small, lora, message):
    config = small(
        **{f"model.lora.{name}": value for name, value in lora.items() if name != "rang"}
    ).to_dict()
    config["model"]["lora"] = config["model"]["lora"] | lora
    with pytest.raises(ValueError, match=message):
        read_settings(config)


@pytest.mark.parametrize("field", ["alpha", "targets", "also_train", "base_dtype"])
def test_an_option_without_a_rank_has_no_effect(small, field):
    with pytest.raises(ValueError, match=rf"model\.lora\.{field} has no effect.*rank reads it"):
        read_settings(small(), changed=[f"model.lora.{field}"])
