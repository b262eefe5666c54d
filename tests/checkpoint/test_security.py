"""What comes from outside is read and not run, and what is secret is not written down."""

import ast
import json
from pathlib import Path

import pytest
from launching import ROOT

FORBIDDEN = {
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "os.system",
}
CHECKED = {  # what each is allowed for
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
}


def calls(path: Path) -> list[tuple[str, str]]:
    """(name, source) of every call in a file."""
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), ast.unparse(node)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_of_ours_runs_what_it_reads():
    """Pickles, `eval`, code of models: each use in the package, the scripts and the launcher is a safe one."""
    files = [path for folder in ("lrtrain", "launch", "scripts") for path in (ROOT / folder).rglob("*.py")]
    found = [(path.name, name, source) for path in files for name, source in calls(path) if name in FORBIDDEN]
    assert [(file, source) for file, name, source in found if CHECKED.get(name, "\0") not in source] == []
    everything = [source for path in files for _, source in calls(path)]
    assert not [source for source in everything if "trust_remote_code=True" in source or "weights_only=False" in source]


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({touched!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_is_run_only_where_that_is_asked_for(tmp_path: Path, launch, monkeypatch):
    folder, touched = tmp_path / "mine", tmp_path / "touched"
    folder.mkdir()
    (folder / "mine.py").write_text(CODE.format(touched=str(touched)))
    settings = {"model_type": "mine", "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    settings |= {"num_hidden_layers": 2, "vocab_size": 384, "architectures": ["MineForCausalLM"]}
    settings["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings))
    job = ["model=hf", f"model.path={folder}", "model.vocab_size=384", "param.rank=8", "dry_run=true"]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    refused = launch(job)
    assert refused.returncode == 2 and not touched.exists()
    told = "has its own Python code; model.trust_remote_code=true runs it"
    assert refused.stderr.strip() == f"model.path={folder} {told}"
    job.append("model.trust_remote_code=true")
    done = launch(job)
    assert done.returncode == 0 and touched.exists(), done.stderr


@pytest.mark.full
def test_keys_of_the_environment_are_not_in_the_run_directory(tmp_path: Path, tiny: list[str], launch, monkeypatch):
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_thisisasecretofmine"}
    run = tmp_path / "run"
    job = [*tiny, "tracking=wandb", "train.steps=3", "spectra.every=1", "checkpoint.every=2", f"run.dir={run}"]
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    done = launch(job)
    assert done.returncode == 0 and [*run.glob("wandb/offline-run-*")], done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in secrets.values():
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in done.stdout + done.stderr
