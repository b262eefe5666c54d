"""A folder with a model is whole, says what it holds, and chooses no code."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from launching import ROOT, SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lrtrain
from lrtrain.checkpoint.factorized_folder import FACTORIZED, saves_its_factors
from lrtrain.checkpoint.loading import load
from lrtrain.checkpoint.new_folder import new_folder
from lrtrain.config.compose import compose
from lrtrain.config.stored import check_stored_targets
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.init import materialize
from lrtrain.model.supports import support_hash

IDS = torch.arange(12)[None]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model with factors, as its `save_pretrained` writes it."""
    config = compose("model=llama_tiny", *SMALL, "model.config.num_hidden_layers=1", "param=sltrain")
    model = make_model(config)
    materialize(model, 0, torch.device("cpu"))
    saves_its_factors(model, config.param, 0, support_hash(model))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_loaded_model_is_saved_as_it_is_loaded_with_the_values_that_it_has_by_then(saved: Path, tmp_path: Path):
    model = lrtrain.load(str(saved))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
        expected = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(lrtrain.load(str(tmp_path / "again"))(input_ids=IDS).logits, expected)
    with pytest.raises(ValueError, match="lrtrain"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")


@pytest.mark.full
def test_trainer_fine_tunes_a_loaded_model_and_saves_what_is_loaded_again(saved: Path, tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = lrtrain.load(str(saved))
    before = model(input_ids=IDS).logits.detach()
    out = tmp_path / "trainer"
    settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    Trainer(model, TrainingArguments(str(out), **settings, **quiet), train_dataset=rows).train()  # pyright: ignore
    model.eval().save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert (expected - before).abs().max() > 1e-3
        for folder in (tmp_path / "again", out / "checkpoint-2"):
            assert torch.equal(lrtrain.load(str(folder))(input_ids=IDS).logits, expected)


def test_factors_beside_the_config_of_a_dense_model_are_not_taken_for_it(saved: Path):
    architecture = json.loads((saved / FACTORIZED).read_text())["architecture"]
    (saved / "config.json").write_text(json.dumps(architecture))
    (saved / FACTORIZED).unlink()
    with pytest.raises(ConfigError, match="does not hold the weights of its LlamaForCausalLM: it lacks .* has also"):
        lrtrain.load(str(saved))


@pytest.mark.parametrize("change", ["lacks", "has also"])
def test_missing_and_unexpected_tensors_are_named(saved: Path, change: str):
    tensors = load_file(saved / "model.safetensors")
    if change == "lacks":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.weight.more"] = torch.zeros(1)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ConfigError, match=f"it {change} model.norm.weight"):
        lrtrain.load(str(saved))


def test_a_model_that_is_not_finite_is_refused_by_the_name_of_the_parameter(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ConfigError, match="NaN or infinite values in model.norm.weight"):
        lrtrain.load(str(saved))


def test_a_damaged_tokenizer_is_named_in_one_sentence(saved: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as a power cut may leave them
        (saved / name).touch()
    with pytest.raises(ConfigError, match=f"the tokenizer in {saved} cannot be loaded: .") as refused:
        load(saved)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("script", ["evaluate", "generate"])
def test_the_scripts_end_with_1_and_the_name_of_the_parameter(saved: Path, script: str, monkeypatch):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, saved / "model.safetensors")
    arguments = {"evaluate": ["data=local", "data.path=."], "generate": ["--prompt", "def"]}[script]
    monkeypatch.setattr(sys, "argv", [script, str(saved), *arguments])
    with pytest.raises(SystemExit, match="NaN or infinite values in model.norm.weight") as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert isinstance(ended.value.code, str)  # which is printed, and exit code 1


@pytest.mark.parametrize(
    "target",
    [
        "torch.hub.load",
        "transformers.AutoConfig.from_pretrained",
        "lrtrain.layers.base.torch.hub.load",
        "lrtrain.layers.autotune.memory_path",
        "lrtrain.checkpoint.loading.load",
    ],
)
def test_a_folder_chooses_no_code(saved: Path, target: str):
    config = json.loads((saved / FACTORIZED).read_text())
    config["param"]["_target_"] = target
    (saved / FACTORIZED).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"names param._target_={target}, which is no class of lrtrain"):
        lrtrain.load(str(saved))


def test_no_section_of_a_stored_configuration_chooses_code_unless_the_user_names_it():
    for section, target in {"engine": "some.module.x", "optim": "os.system", "data": "os.system"}.items():
        with pytest.raises(ConfigError, match=f"{section}._target_={target}"):
            check_stored_targets({section: {"_target_": target}}, "meta.json", ())
        check_stored_targets({section: {"_target_": target}}, "meta.json", (target,))
    with pytest.raises(ConfigError, match="source.nested._target_=os.system"):
        check_stored_targets({"data": {"source": {"nested": {"_target_": "os.system"}}}}, "meta.json", ())


def test_the_choices_of_lrtrain_are_its_own():
    for param in ("lowrank", "sltrain", "lost", "sst", "relora", "nested", "cola"):
        config = compose(f"param={param}")
        check_stored_targets({"param": config.param}, "x", ())
    others = {"optim": config.optim, "schedule": config.schedule, "engine": config.engine}
    check_stored_targets({**others, "data": {"source": config.data.source}, "callbacks": config.callbacks}, "x", ())


def test_a_folder_appears_when_it_is_whole_and_leftovers_of_a_killed_one_are_gone(tmp_path: Path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00002.safetensors").touch()  # a killed export's
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="no"), new_folder(tmp_path / "out"):
        raise ConfigError("no")
    assert not list(tmp_path.iterdir())


def test_two_at_once_do_not_mix(tmp_path: Path):
    with FileLock(tmp_path / ".out.lock"):
        with pytest.raises(ConfigError, match="is being written by another process"), new_folder(tmp_path / "out"):
            raise AssertionError


def test_a_name_that_is_taken_or_a_dangling_link_is_refused_before_the_work(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    for name, what in {"link": "is a link to nothing", "there": "exists"}.items():
        with pytest.raises(ConfigError, match=what), new_folder(tmp_path / name):
            raise AssertionError
