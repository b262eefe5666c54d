"""The model card of an export."""

from typing import Any

from lrtrain.checkpoint.weights import RunWeights
from lrtrain.core.files import read_object
from lrtrain.model.counts import parameter_count

HOW = {
    True: "import lrtrain\n\nmodel = lrtrain.load(FOLDER)",
    False: "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)",
}


def card(run: RunWeights, factorized: bool, parameters: int) -> str:
    """The text of README.md: how the model was trained, its losses, and how to load it."""
    config = run.config
    facts: dict[str, Any] = {
        "Method": f"`param={config.param['name']}`, `optim={config.optim['name']}`",
        "Architecture": run.model.config.model_type,
        "Parameters": f"{parameters:,}" + ("" if factorized else f" ({parameter_count(run.model):,} while it trained)"),
        "Data": config.data.name,
        "Tokens": f"{run.meta.progress.tokens:,}",
        "Steps": run.meta.step,
        **losses(run),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: {'lrtrain' if factorized else 'transformers'}\npipeline_tag: text-generation\n---\n\n"
        f"# {config.run.name}\n\n| | |\n| --- | --- |\n{rows}\n\n"
        f"```python\n{HOW[factorized]}\n```\n"
    )


def losses(run: RunWeights) -> dict[str, str]:
    """The losses in the run's summary, if the run ended at the exported step."""
    summary = read_object(run.run_dir / "summary.json") or {}
    if summary.get("step") != run.meta.step:
        return {}
    return {key: f"{value:.4f}" for key, value in summary.items() if key.endswith("loss") and isinstance(value, float)}
