"""What a user gets wrong is told in one sentence with the key, the value and what would be right."""

import re
import subprocess

import pytest
from launching import ROOT, command

from lrtrain.config.check import check, check_directories
from lrtrain.config.compose import compose, composition_sentence, default_composition
from lrtrain.config.naming import fingerprint, run_name
from lrtrain.data.prepare import check_data
from lrtrain.errors import ConfigError


@pytest.mark.parametrize(
    "override,message",
    [
        ("train.steps=many", "train.steps=many must be a valid integer"),
        ("train.clip=[1]", "train.clip=.1. must be a valid number, or null"),
        ("optim.lr=fast", "optim.lr=fast must be a valid number"),
        ("param.density=thick", "param.density=thick must be a valid number"),
        ("engine.replicas=two", "engine.replicas=two must be a valid integer"),
        ("tracking.wandb=sometimes", "tracking.wandb=sometimes must be 'offline', 'online' or 'disabled'"),
        ("data.path=???", "data.path has no value"),
        ("+train.stps=3", "train.stps is not a key .*did you mean train.steps"),
        ("+param.densty=3", "param.densty is not a key .*did you mean param.density"),
        ("+optim.beta=3", "optim.beta is not a key .*did you mean optim.betas"),
    ],
)
def test_wrong_types_and_unknown_keys_are_named(override: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        compose(override)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "override,message",
    [
        ("train.stps=3", "train.stps is not a key of the configuration; did you mean train.steps?"),
        ("param=sltran", "param=sltran is not one of cola, dense,"),
        ("param=sltran", "; did you mean sltrain?"),
        ("lr=1e-3", "lr is not a key of the configuration; did you mean optim.lr?"),
        ("optim=base", "optim=base is not one of adamw,"),
        ("batch=4", "did you mean train.batch_size?"),
        ("optim.typo=1", "optim.typo is not a key of the configuration"),
        ("engine.zero_stage=3", "zero_stage is not a key of the engine that is chosen; it belongs to engine=deepspeed"),
    ],
)
def test_what_hydra_itself_refuses_is_one_sentence(override: str, message: str):
    with pytest.raises(Exception) as raised:  # noqa: B017
        default_composition(override)
    sentence = composition_sentence(raised.value)
    assert message in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "override,processes,message",
    [
        ("train.steps=0", 1, "train.steps=0 trains nothing"),
        ("init_from=/nonexistent/model", 1, "init_from=/nonexistent/model does not exist"),
        ("data.streams=4", 1, "data.streams=4 has no effect: data=pystdlib is no stream"),
        ("compress.by=outputs", 1, "compress.by=outputs has no effect without init_from"),
        ("compress.affine=true", 1, "compress.affine=true has no effect without init_from"),
        ("compress.budget=0.5", 1, "compress.budget=0.5 has no effect without init_from"),
        ("train.profile=999", 1, "train.profile=999 is not one of the steps 1 to train.steps=320"),
        ("train.batch_size=20", 3, "train.batch_size=20 is not a multiple of 12.*4 × 3 processes"),
        (
            "train.recompute_keep=bottleneck",
            1,
            "train.recompute_keep=bottleneck has no effect .* train.recompute_every=1",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(override: str, processes: int, message: str):
    with pytest.raises(ConfigError, match=message):
        check(compose(override), processes)


@pytest.mark.parametrize(
    "override,message",
    [
        ("resume=/nowhere run.dir=/nowhere/else", "resume=/nowhere is not never, auto, or the path"),
        ("run.dir=/", "run.dir=/ exists; go on with resume=auto"),
        ("run.dir=/ resume=/tmp", "run.dir=/ exists; go on with resume=auto"),
    ],
)
def test_directories_are_looked_at_by_a_start_and_not_by_a_plan(override: str, message: str):
    config = compose(*override.split())
    check(config, 1)
    with pytest.raises(ConfigError, match=message):
        check_directories(config)


def test_a_run_is_named_by_what_it_is_and_not_by_when():
    composed = default_composition()
    assert run_name(composed, ["model=llama_tiny", "param=sltrain", "resume=auto"]) == "llama_tiny-sltrain"
    one = run_name(composed, ["param.rank=4", "optim.lr=3"])
    assert one == run_name(composed, ["optim.lr=3", "resume=auto", "param.rank=4", "dry_run=true"])
    assert one != run_name(composed, ["optim.lr=4", "param.rank=4"])
    longer = ["train.steps=4", "eval.every=2", "checkpoint.every=3", "spectra=full", "+spectra.every=1"]
    assert one == run_name(composed, ["optim.lr=3", "param.rank=4", *longer])


def test_an_experiment_names_its_run():
    def name(*overrides: str) -> str:
        return compose(*overrides).run.name

    assert name("experiment=sltrain_60m", "resume=auto", "tracking=none") == "sltrain_60m"
    changed = name("experiment=sltrain_60m", "model=llama_130m")
    assert changed.startswith("sltrain_60m-") and changed != name("experiment=sltrain_60m", "model=llama_350m")


def test_the_fingerprint_notices_any_difference():
    assert fingerprint(compose()) == fingerprint(compose()) != fingerprint(compose("train.seed=1"))


def test_wandb_is_configured_by_its_own_variables_which_hosts_need_not_agree_on(monkeypatch: pytest.MonkeyPatch):
    plain = compose()
    assert (plain.tracking.wandb, plain.tracking.project) == ("offline", "lrtrain")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    told = compose()
    assert (told.tracking.wandb, told.tracking.project) == ("disabled", "mine")
    assert compose("tracking.wandb=online", "tracking.project=other").tracking.project == "other"
    assert fingerprint(told) == fingerprint(plain)
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(ConfigError, match="tracking.wandb=dryrun"):
        compose()


@pytest.mark.full
def test_every_yaml_of_every_group_composes():
    for group in ("model", "param", "optim", "schedule", "data", "engine", "spectra", "tracking"):
        folder = ROOT / "conf" / group
        for path in folder.glob("*.yaml"):
            needs = {"local": ["data.path=/x"], "hf": ["model.path=/x"]}.get(path.stem, [])
            compose(f"{group}={path.stem}", *needs)


# --- as a user meets it ------------------------------------------------------------------------------------------


def test_the_command_exits_with_2_and_one_sentence(launch, tiny):
    done = launch([*tiny, "param.rank=900"])
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "param.rank=900 is not between 1 and min(in, out)=48 of model.layers.0.self_attn.q_proj"
    )
    threads, named = done.stdout.splitlines()  # the header, and nothing more
    assert "threads each" in threads and named.startswith("run llama_tiny-sltrain-")


@pytest.mark.full
def test_only_one_of_two_processes_speaks(tiny, tmp_path):
    """With torchrun itself, which ends the other one."""
    line = command([*tiny, "param.rank=900", f"run.dir={tmp_path}/run"], 2)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and len(re.findall("^param.rank=900 is not between", done.stderr, re.MULTILINE)) == 1
    assert re.search(
        "traceback : param.rank=900 is not between", done.stderr
    )  # torchrun's own report says it at its end
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(launch, tiny, tmp_path):
    run = [*tiny, f"run.dir={tmp_path}/run", "train.steps=2"]
    assert launch(run).returncode == 0
    done = launch([*run, "resume=auto", "param.rank=4"])
    assert done.returncode == 2
    assert "is of another model: param.rank is 8 there and 4 here" in done.stderr


def test_a_run_that_exists_can_be_planned_but_not_started(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    line = ["train.steps=1", f"run.dir={tmp_path}/run"]
    planned, started = launch([*line, "dry_run=true"]), launch(line)
    assert planned.returncode == 0 and "memory per process" in planned.stdout, planned.stderr
    assert started.returncode == 2 and "exists; go on with resume=auto" in started.stderr


def test_dry_run_prints_the_plan_and_leaves_nothing(launch, tmp_path):
    done = launch(["model=llama_1b", "param=sltrain", "dry_run=true"])
    assert done.returncode == 0, done.stderr
    assert "645.55 M" in done.stdout and "1,339.08 M" in done.stdout and "memory per process" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_updates_in_backward_refuse_to_accumulate():
    config = compose("optim.in_backward=true", "train.clip_by=parameter", "train.batch_size=16")
    with pytest.raises(ConfigError, match="accumulates gradients, .* set train.micro_batch_size=8"):
        check(config, 2)


class Looks:
    """A callback that reads gradients."""

    needs_gradients = True


def test_updates_in_backward_refuse_a_callback_that_needs_gradients():
    config = compose(
        "optim.in_backward=true", "train.clip_by=parameter", "train.batch_size=8", "train.micro_batch_size=8"
    )
    check(config, 1)
    config.callbacks["mine"] = {"_target_": f"{__name__}.Looks"}
    with pytest.raises(ConfigError, match="callbacks.mine reads the gradients of a whole step"):
        check(config, 1)


def test_updates_in_backward_keep_no_gradients_to_look_at():
    config = compose("optim.in_backward=true", "train.clip_by=parameter", "spectra=full")
    with pytest.raises(ConfigError, match="spectra.gradients=. looks at the gradients of a whole step, .* set spectra"):
        check(config, 2)


@pytest.mark.parametrize("key", ["parts", "gradients", "updates"])
def test_a_choice_of_layers_is_a_regular_expression(key: str):
    with pytest.raises(ConfigError, match=rf"spectra.{key}=\* is not a regular expression"):
        check(compose(f"spectra.{key}=*"), 1)


@pytest.mark.parametrize(
    "override,message",
    [
        ("param.rank=null", "param.rank=null is no rank"),
        ("param.rank=[8]", r"param.rank=\[8\] must be a rank such as 128"),
        ("param.rank=true", "param.rank=True must be a rank such as 128"),
        ("param.rank={.:60%}", "must be a rank such as 128, .* or a mapping from patterns"),
        ("param.pattern=null", "param.pattern=null must be a valid string"),
        ("+callbacks.mine={_target_:lrtrain.run.callbacks.log.Log}", "callbacks.mine.every has no value"),
        ("data.path=", "data.path= has an empty name"),
    ],
)
def test_values_of_no_type_of_the_schema_are_named_too(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_data(compose("data=local", "data.path=x", override).data)
