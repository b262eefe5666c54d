"""What is exported is the model that was trained: for transformers alone, or with its factors."""

import gc
import json
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import crew
import pytest
import torch
from crew import together
from launching import ROOT, TINY
from runs import OPT, run_jobs
from safetensors.torch import load_file

import lrtrain
from lrtrain.checkpoint import safetensors_files
from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.checkpoint.factorized_folder import FACTORIZED
from lrtrain.checkpoint.loading import load
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.errors import ConfigError

pytestmark = pytest.mark.full

RUNS = {
    "dense": ["param=dense", "param.rank=null"],
    "lowrank": ["param=lowrank"],
    "sltrain": ["param=sltrain"],
    "sltrain-block-tied": [*OPT, "param=sltrain", "param.support=block", "param.block=16"],  # has biases too
    "lost-linear": ["param=lost", "param.density=0.1", "param.activation=none"],
    "sst": ["param=sst", "param.iteration=1"],
    "relora": ["param=relora", "param.merge_every=2"],
    "nested-shrunken": ["param=nested", "param.shrink_every=1", "param.shrink_threshold=0.2"],
    "bf16": ["param=lowrank", "train.dtype=bf16_sr"],
    "cola": ["param=cola"],
    "lost": ["param=lost", "param.density=0.1"],
    "dlr": ["param=dlr"],
}
NONLINEAR = ["cola", "lost", "dlr"]
MERGED = [name for name in RUNS if name not in NONLINEAR]
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    """Three steps of each on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*TINY, f"data.path={corpus}", "train.steps=3", "spectra=off"]
    others = [override for override in base if not override.startswith("model")]
    jobs = [
        [*(others if "model=opt_125m" in change else base), *change, f"run.dir={folder}/{name}"]
        for name, change in RUNS.items()
    ]
    run_jobs(jobs, 2, folder)
    return folder


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return lrtrain.load(path)(input_ids=IDS).logits


LOAD_WITHOUT_LRTRAIN = """
import sys, torch
sys.modules["lrtrain"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, found = torch.load("ids.pt"), {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    assert AutoTokenizer.from_pretrained(name).decode(model.generate(ids[:1], max_new_tokens=4)[0])
    found[name] = model(input_ids=ids).logits.detach()
torch.save(found, "logits.pt")
"""


def test_merged_exports_give_the_same_logits_where_lrtrain_is_not_installed(runs: Path, tmp_path: Path):
    """In files of 50 kB."""
    for name in MERGED:
        export_dense(RunWeights(runs / name), tmp_path / name, None, most=50_000)
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", LOAD_WITHOUT_LRTRAIN, *MERGED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(tmp_path / "logits.pt").items():
        error = (found.float() - logits(runs / name).float()).abs().max()
        assert error < (2e-2 if name == "bf16" else 1e-5), name


@pytest.mark.parametrize("name", RUNS)
def test_factors_come_back_as_they_were_and_generate(runs: Path, tmp_path: Path, name: str):
    export_factorized(RunWeights(runs / name), tmp_path / "out", None, most=50_000)
    model = lrtrain.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(runs / name))
    ids = torch.cat([IDS, IDS[:, :2]], dim=1)
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand(2, -1)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone, beside = model.generate(ids, **settings), model.generate(padded, attention_mask=mask, **settings)
    assert alone.shape == (2, 32) and torch.equal(alone, beside[:, 5:])  # caches and masks are heeded
    with pytest.raises((OSError, ValueError)):  # transformers does not take it for a dense model
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_stands_for_no_matrix_is_not_merged(runs: Path, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"q_proj cannot be merged: .*param.activation=silu is not one matrix"):
        export_dense(RunWeights(runs / name), tmp_path / "out", None, most=10**9)
    assert not list(tmp_path.iterdir())


def test_a_dtype_can_be_chosen_and_is_kept_by_default(runs: Path, tmp_path: Path):
    export_dense(RunWeights(runs / "sltrain"), tmp_path / "chosen", torch.bfloat16, most=10**9)
    export_factorized(RunWeights(runs / "bf16"), tmp_path / "kept", None, most=10**9)
    for out, config in (("chosen", "config.json"), ("kept", FACTORIZED)):
        assert {t.dtype for t in load_file(tmp_path / out / "model.safetensors").values()} == {torch.bfloat16}
        stated = json.loads((tmp_path / out / config).read_text())
        assert stated.get("architecture", stated)["dtype"] == "bfloat16"
    difference = (logits(tmp_path / "chosen").float() - logits(runs / "sltrain")).abs().max()
    assert 0 < difference < 2e-2


def test_a_tied_head_is_written_once(runs: Path, tmp_path: Path):
    export_dense(RunWeights(runs / "sltrain-block-tied"), tmp_path / "out", None, most=10**9)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = lrtrain.load(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_nothing_is_overwritten(runs: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        export_dense(RunWeights(runs / "dense"), tmp_path / "out", None, most=10**9)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path):
    living: list[weakref.ref] = []

    def produce(name: str) -> torch.Tensor:
        assert not any(ref() is not None for ref in living)
        tensor = torch.full((3, 5), float(name))
        living.append(weakref.ref(tensor))
        return tensor

    shapes = {str(i): torch.empty(3, 5, device="meta") for i in range(7)}
    safetensors_files.write(tmp_path, shapes, produce, most=130)
    assert len(living) == 7 and len(list(tmp_path.glob("*.safetensors"))) == 4
    read = safetensors_files.SafetensorsFolder(tmp_path)
    assert all(torch.equal(read.tensor(str(i)), torch.full((3, 5), float(i))) for i in range(7))


def held() -> int:
    """Bytes of all tensors on the CPU, but those that `gc.freeze` found."""
    tensors = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if one.is_cpu}
    return sum(storages.values())


@pytest.mark.parametrize("export", [export_dense, export_factorized])
def test_an_export_holds_one_layer_at_a_time(runs: Path, tmp_path: Path, export, monkeypatch: pytest.MonkeyPatch):
    read, seen = RunWeights.tensors, []
    run = RunWeights(runs / ("dense" if export is export_dense else "sst"))
    sizes = [tensor.nbytes for tensor in run.model.state_dict().values()]

    def watched(self: RunWeights, names) -> dict[str, torch.Tensor]:
        seen.append(held())
        return read(self, names)

    monkeypatch.setattr(RunWeights, "tensors", watched)
    gc.freeze()
    export(run, tmp_path / "out", None, most=10**9)
    gc.unfreeze()
    assert len(seen) == len(sizes) > 20 and max(sizes) * 4 < sum(sizes)
    assert max(seen) <= max(sizes)


def test_a_damaged_checkpoint_is_not_exported(runs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        RunWeights(tmp_path)


def test_a_seed_that_gives_other_supports_is_noticed(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lrtrain.checkpoint.weights.generator_for", lambda seed, name: torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="other sparse supports"):
        RunWeights(runs / "sltrain")


# The scripts, in this process: importing everything takes longer than what they do. -----------------------------------


def script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("form", ["run", "hf-dense", "hf-factorized"])
def test_evaluating_finds_the_loss_that_the_run_found(runs: Path, tmp_path: Path, corpus: Path, form: str, monkeypatch):
    run, expected = runs / "sltrain", json.loads((runs / "sltrain" / "summary.json").read_text())["eval_loss"]
    path, text = run, []
    if form != "run":
        path = tmp_path / "out"
        script("export", run, "--to", form, "--out", path, monkeypatch=monkeypatch)
        text = ["data=local", f"data.path={corpus}", "data.seq_len=32", "data.validation_fraction=0.1"]
        text += ["eval.sequences=16"]
    script("evaluate", path, *text, "--json", tmp_path / "found.json", monkeypatch=monkeypatch)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["sequences"] == 16


def test_two_processes_evaluate_all_of_another_text(runs: Path, tmp_path: Path, corpus: Path, monkeypatch):
    text = ["data.path=" + str(corpus / "000.txt"), "data.seq_len=16", "data.validation_fraction=0"]
    arguments = [runs / "sltrain", *text, "eval.sequences=1000", "--json"]
    script("evaluate", *arguments, tmp_path / "one.json", monkeypatch=monkeypatch)
    arguments = [str(argument) for argument in (*arguments, tmp_path / "two.json")]
    together(crew.script, (ROOT / "scripts" / "evaluate.py", arguments), tmp_path)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    tokens = len(load(runs / "sltrain").tokenizer.encode((corpus / "000.txt").read_text())) + 1  # and EOS
    assert 0 <= tokens - one["tokens"] <= 17 and one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_lm_eval_runs_a_local_task(runs: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = [{"question": "abc d", "choices": ["ef", "gh"], "answer": i % 2} for i in range(4)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/letters.jsonl}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
    )
    out = tmp_path / "found.json"
    task = ["--tasks", "letters", "--include_path", tmp_path, "--json", out]
    script("evaluate", runs / "sltrain", *task, monkeypatch=monkeypatch)
    assert json.loads(out.read_text()) == {"letters acc": 0.5}  # the same answer to all four
    with pytest.raises(SystemExit, match="lm-eval has no such task"):
        script("evaluate", runs / "sltrain", "--tasks", "lettres", monkeypatch=monkeypatch)


def test_a_run_goes_on_with_a_prompt(runs: Path, monkeypatch, capsys):
    texts = []
    for temperature in (0.8, 0.8, 0):
        arguments = ["--prompt", "abc ", "--tokens", 8, "--samples", 2, "--temperature", temperature]
        script("generate", runs / "sltrain", *arguments, monkeypatch=monkeypatch)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("abc ") and texts[0].count("\n---\nabc ") == 1
    one, other = texts[2].split("\n---\n")
    assert one.strip() == other.strip()
